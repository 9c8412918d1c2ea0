"""Tables for notebooks, as text in a terminal and HTML in a page; numbers from records only."""

from __future__ import annotations

import html
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..config import Config
from ..records import Summary, like, paired, score, stale, summary
from .analysis import paired_values

CLOCK = "Seconds are by the clock, with whatever else the machine did in them."


@dataclass(frozen=True)
class Table:
    """A header, rows of anything printable, a caption. The first column is left-aligned."""

    header: Sequence[str]
    rows: Sequence[Sequence[object]]
    caption: str = ""

    def _repr_html_(self) -> str:
        caption = f"<caption><span>{html.escape(self.caption)}</span></caption>"
        caption = caption if self.caption else ""
        head, body = _line("th", self.header), "".join(_line("td", row) for row in self.rows)
        table = f"<table>{caption}<thead>{head}</thead><tbody>{body}</tbody></table>"
        return f'<div class="s4-table" style="overflow-x:auto">{table}</div>'

    def __repr__(self) -> str:
        lines = [[str(v) for v in row] for row in (self.header, *self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = "\n".join(
            "  ".join(
                v.rjust(w) if i else v.ljust(w)
                for i, (v, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in lines
        )
        return f"{self.caption}\n{text}" if self.caption else text


def _line(tag: str, values: Sequence[object]) -> str:
    """A row; a cell of words may take several lines, one of numbers stays on its line."""
    cells = []
    for i, value in enumerate(map(str, values)):
        words = ' class="s4-words"' if re.search("[A-Za-z]{2}", value) else ""
        side = "right" if i else "left"
        cells.append(f'<{tag}{words} style="text-align:{side}">{html.escape(value)}</{tag}>')
    return f"<tr>{''.join(cells)}</tr>"


def rounded(
    header: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "", digits: int = 3
) -> Table:
    """A table whose floats have this many significant digits."""
    short = lambda v: f"{v:.{digits}g}" if isinstance(v, float) else v  # noqa: E731
    return Table(header, [[short(v) for v in row] for row in rows], caption)


def comparison(results: Mapping[str, Sequence[dict]], base: str, caption: str = "") -> Table:
    """mIoU of the deployed network of each group of records, and its paired difference to `base`.

    Columns: n runs; mean and sample standard deviation at the last and at the best evaluation;
    difference at the last one with a 95 % interval over label draws; what that allows to say. A *
    marks records of older code.
    """
    rows = []
    for name, records in results.items():
        last, best = (summary(score(r, when=when) for r in records) for when in ("last", "best"))
        difference = paired(records, results[base]) if name != base else None
        row = [name + ("*" if any(map(stale, records)) else ""), last.n, last, best]
        rows.append([*row, difference or "", difference.verdict if difference else "the reference"])
    header = ["", "n", "last mIoU", "best mIoU", f"minus {base}", "verdict"]
    return Table(header, rows, caption)


def class_iou(results: Mapping[str, Sequence[dict]]) -> Table:
    """IoU of every class and mIoU of each group of records (last evaluation, deployed network):
    mean over the runs in which the class occurs, and sample standard deviation."""
    columns = [[r["networks"][r["deployed"]]["last"] for r in group] for group in results.values()]
    classes = next(iter(results.values()))[0]["classes"]
    rows = [
        [name, *(_known(run["iou"][i] for run in runs) for runs in columns)]
        for i, name in enumerate(classes)
    ]
    rows.append(["mIoU", *(_known(run["miou"] for run in runs) for runs in columns)])
    return Table(
        ["class", *results], rows, "IoU in %, last evaluation; – where a class occurs nowhere."
    )


def _known(values: Iterable[float | None]) -> Summary | str:
    present = [v for v in values if v is not None]
    return summary(present) if present else "–"


def differences(
    quantities: Mapping[str, Mapping[str, Sequence[float]]], base: str, caption: str = ""
) -> Table:
    """Any quantities measured once per label draw, {quantity: {name: [value per draw]}}: mean and
    sample standard deviation, paired difference to `base` with its 95 % interval, and verdict."""
    words, rows = {"better": "higher", "worse": "lower"}, []
    for quantity, values in quantities.items():
        for name, ours in values.items():
            row = [quantity, name, summary(ours)]
            if name == base:
                rows.append([*row, "", "the reference"])
                continue
            difference = paired_values(ours, values[base])
            rows.append([*row, difference, words.get(difference.verdict, difference.verdict)])
    return Table(["", "", "mean", f"minus {base}", "verdict"], rows, caption)


def changes(
    base: Mapping[str, Sequence[dict]],
    known: Sequence[dict],
    configs: Mapping[str, Config],
    caption: str = "",
) -> Table:
    """`comparison` of one group, {name: records}, with what `known` has of other configs.

    A config without any record has an empty row that says so.
    """
    found = {name: group for name, config in configs.items() if (group := like(known, config))}
    table = comparison({**base, **found}, next(iter(base)), caption)
    lines = dict(zip([*base, *found], table.rows, strict=True))
    rows = [lines.get(name, [name, *[""] * 4, "not run"]) for name in [*base, *configs]]
    return Table(table.header, rows, caption)


def cost(results: Mapping[str, Sequence[dict]]) -> Table:
    """What a run of each group of records cost: seconds, steps, images seen, device."""
    rows = []
    for name, group in results.items():
        seconds = summary(record["seconds"] for record in group)
        one = group[0]
        rows.append([name, seconds, one["steps"], f"{one['images_seen']:,}", one["device"]])
    caption = f"What a run cost. {CLOCK}"
    return Table(["", "seconds", "steps", "images seen", "device"], rows, caption)


def beside(results: Mapping[str, dict], committed: Sequence[dict]) -> Table:
    """Each record beside the committed one of the same run: last mIoU of the deployed network.

    Equal on the machine and versions of the committed one; elsewhere floating-point sums round
    differently, and training amplifies that to about what another seed does.
    """
    ours = {record["run_id"]: record for record in committed}
    rows = []
    for name, record in results.items():
        row, other = [name, f"{score(record):.1f}"], ours.get(record["run_id"])
        if other is None:
            rows.append([*row, "none", "", ""])
            continue
        mark = "*" if stale(other) else ""
        difference = score(record) - score(other)
        where = f"{other['device']}, torch {other['versions']['torch']}"
        rows.append([*row, f"{score(other):.1f}{mark}", f"{difference:+.1f}", where])
    return Table(["", "this page", "in the repository", "difference", "made on"], rows)


def claims(results: Mapping[str, Sequence[dict]], order: Sequence[str]) -> str:
    """Markdown that says which neighbours in `order`, the worst first, can be told apart."""
    said = []
    for low, high in zip(order, order[1:], strict=False):
        difference = paired(results[high], results[low])
        words = {
            "better": f"{high} is better than {low}",
            "worse": f"{high} is worse than {low}",
            "not distinguishable": f"{high} and {low} are not distinguishable",
        }
        draws = len(difference.values)
        said.append(f"- **{words[difference.verdict]}**: {difference} points, {draws} draw(s)")
    return "\n".join(["Mean paired difference and its 95 % interval:", "", *said])


def listing(function: Callable) -> str:
    """Markdown of a function's source, the very code that runs."""
    return f"```python\n{textwrap.dedent(inspect.getsource(function))}```"
