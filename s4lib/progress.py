"""Progress of long work: a bar in a terminal or a notebook (and its static page), or lines."""

from __future__ import annotations

import html
import sys
import time

from tqdm import tqdm


def in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and hasattr(shell, "kernel")


def duration(seconds: float) -> str:
    """Seconds as a person says them: 8 s, 3 min 5 s, 1 h 2 min."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


class Progress:
    """`total` units of work. Call `update(done, text)` as often as you like, `close(text)` once."""

    def __init__(self, title: str, total: int):
        self.title, self.total, self.done, self.text = title, max(total, 1), 0, ""
        self.started = self.shown = time.monotonic()
        self.first = None  # work that was done before, which does not count into the pace
        self.kind = "notebook" if in_notebook() else "terminal" if sys.stderr.isatty() else "lines"
        if self.kind == "terminal":
            form = "{desc} {percentage:3.0f}%|{bar}| {n}/{total} [{elapsed}<{remaining}{postfix}]"
            self.bar = tqdm(total=self.total, desc=title, bar_format=form, dynamic_ncols=True)
        elif self.kind == "notebook":
            from IPython.display import display

            self.handle = display(self._bundle(), raw=True, display_id=True)

    def update(self, done: int, text: str = "") -> None:
        if self.first is None:
            self.first = done
        self.done, self.text = done, text or self.text
        now = time.monotonic()
        if self.kind == "terminal":
            self.bar.set_postfix_str(self.text, refresh=False)
            self.bar.update(done - self.bar.n)
        elif now - self.shown > (0.3 if self.kind == "notebook" else 20):
            self.shown = now
            self._show()

    def close(self, text: str = "", metadata: dict | None = None) -> None:
        """Show the final state; `metadata` goes with a notebook's output, for the run record."""
        self.text = text or self.text
        if self.kind == "terminal":
            self.bar.set_postfix_str(self.text)
            self.bar.close()
        else:
            self._show(metadata)

    def _line(self) -> str:
        spent = time.monotonic() - self.started
        here = self.done - (self.first or 0)
        left = spent / here * (self.total - self.done) if here > 0 else None
        times = duration(spent) + (f", {duration(left)} left" if left else "")
        return f"{self.title}: {self.done}/{self.total} ({times}) {self.text}".rstrip()

    def _show(self, metadata: dict | None = None) -> None:
        if self.kind == "notebook":
            self.handle.display(self._bundle(), raw=True, update=True, metadata=metadata or {})
        else:
            print(self._line(), file=sys.stderr, flush=True)

    def _bundle(self) -> dict[str, str]:
        share = self.done / self.total
        bar = (
            '<div class="s4-progress" role="progressbar" aria-valuemin="0" '
            f'aria-valuemax="{self.total}" aria-valuenow="{self.done}" '
            f'aria-label="{html.escape(self.title)}" '
            'style="height:6px;border-radius:3px;background:#8884;max-width:32rem">'
            '<div style="height:100%;border-radius:3px;background:#4a77c4;'
            f'width:{share:.1%}"></div></div>'
        )
        line = html.escape(self._line())
        return {
            "text/plain": self._line(),
            "text/html": f'{bar}<small class="s4-progress-text">{line}</small>',
        }
