"""A slider over pictures or tables that are ready, for pages that have no server behind them."""

import html
import io
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import quote

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

# It finds its frames from the input: there is no id that a second slider or a copy could share.
MOVE = (
    "const card = this.closest('.s4-slider'), frames = card.querySelectorAll('[data-frame]');"
    "frames.forEach((frame, i) => { frame.hidden = i != this.value; });"
    "const name = frames[this.value].dataset.frame;"
    "this.setAttribute('aria-valuetext', name); card.querySelector('b').textContent = name;"
)
# Paper stays light in the dark, and with it the page's own colours of what lies on it.
CARD = (
    "background: #fff; color: #222; color-scheme: light; border-radius: 0.4rem; padding: 0.5rem;"
    "--pst-color-text-base: #222; --pst-color-text-muted: #555;"
    "box-sizing: border-box; max-width: 100%"
)
IMAGE = "display: block; max-width: 100%; height: auto; margin: auto"


@dataclass(frozen=True)
class Slider:
    """Frames, as HTML by their label, of which a page shows one at a time."""

    frames: Mapping[str, str]
    title: str
    start: str

    def _repr_html_(self) -> str:
        place, name = list(self.frames).index(self.start), html.escape(self.start)
        shown = "".join(
            f'<div data-frame="{html.escape(label)}" style="overflow-x: auto"'
            f"{'' if label == self.start else ' hidden'}>{frame}</div>"
            for label, frame in self.frames.items()
        )
        return (
            f'<div class="s4-slider" style="{CARD}"><label>{html.escape(self.title)} '
            f'<input type="range" min="0" max="{len(self.frames) - 1}" value="{place}" '
            f'autocomplete="off" aria-valuetext="{name}" oninput="{html.escape(MOVE)}" '
            f'style="vertical-align: middle; width: 9rem"></label> '
            f'<b aria-hidden="true">{name}</b>{shown}</div>'
        )

    def __repr__(self) -> str:
        return f"{self.title}: {', '.join(self.frames)} (a slider; a browser shows its pictures)"


def slider(
    frames: Mapping[str, Figure | str], *, title: str, alt: str, start: str | None = None
) -> Slider:
    """`frames`, matplotlib figures (which it closes) or HTML, behind a slider called `title`.

    `alt` says what the pictures show; each has its label added. `start` (the first, if None) is
    seen first, and alone where there is no JavaScript. ValueError: no frame, no alt, no such start.
    """
    if not frames or not alt.strip():
        raise ValueError(f"{len(frames)} frames, alt={alt!r}: give at least one frame and an alt")
    if start is not None and start not in frames:
        raise ValueError(f"start={start!r}: choose one of {', '.join(frames)}")
    drawn = {k: f if isinstance(f, str) else _image(f, f"{alt} {k}") for k, f in frames.items()}
    return Slider(drawn, title, next(iter(frames)) if start is None else start)


def _image(figure: Figure, alt: str) -> str:
    """An <img> with the figure as SVG, where the ids of several figures cannot meet."""
    file = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "s4"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    plt.close(figure)
    data = quote(file.getvalue(), safe=" +,=:;()")  # as small as base64, and without slashes
    return f'<img src="data:image/svg+xml,{data}" alt="{html.escape(alt)}" style="{IMAGE}">'
