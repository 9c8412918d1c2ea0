"""Numbers as others printed them: book/published/<source>.csv, digits kept as text.

Flags: lost (not in the text we have), reconstructed (garbled there, recovered from what surrounds
it), copied (another work's number), suspicious (something else contradicts it); the note says why.
"""

import csv
import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from decimal import Decimal
from fnmatch import fnmatch

import numpy as np

from ..config import one_of
from ..records import HERE, score, summary
from .analysis import paired_values
from .tables import Table

PUBLISHED = HERE / "book" / "published"
NUMBER, FLAGS = r"(\d+(\.\d+)?)?", "|lost|suspicious|copied|reconstructed"
VALID = {"value": NUMBER, "std": NUMBER, "epoch": "best|last|unstated", "flag": FLAGS, "note": ".*"}
ROW = ("method", "network", "dataset", "split_family", "epoch", "quantity", "table", "source")
# Which of our systems a printed name means; "MT" and "CutMix" are U2PL's, whose tables others copy,
# except in PixelSSL's (ke2020), which has the first ones.
OURS = {
    **dict.fromkeys(("SupOnly", "SupBaseline", "labelled images only"), "supervised"),
    **dict.fromkeys(("Supervised-only", "Supervised Baseline"), "supervised"),
    **dict.fromkeys(("UniMatch", "UniMatch, re-run"), "unimatch"),
    **dict.fromkeys(("U2PL", "U2PL (w/ CutMix)"), "u2pl"),
    "MT": "cutmix_mt, mt",
    "CutMix": "cutmix_mt",
    "CCT": "cct",
    "GCT": "gct",
    "CPS": "cps",
    "AEL": "ael",
    "ST++": "st_plus_plus",
    "PseudoSeg": "pseudoseg",
    "PC2Seg": "pc2seg",
    "GTA-Seg": "gta_seg",
    "Dual Teacher": "dual_teacher",
    "PS-MT, ensemble": "ps_mt",
    "FixMatch": "fixmatch",
    "AugSeg": "augseg",
    "UniMatch V2": "unimatch_v2",
}
PIXELSSL = {**OURS, "MT": "mean_teacher", "CutMix": "cutmix_seg"}


@dataclass(frozen=True)
class Cell:
    """One printed number. ValueError for a field that VALID forbids or a flag that lacks a note."""

    source: str  # key of references.bib
    table: str  # where it stands there
    method: str
    dataset: str
    split_family: str  # which lists of this length, or unstated
    labels: str  # labelled images; the printed fraction where their list is not known
    network: str
    quantity: str
    value: str
    std: str
    epoch: str
    flag: str
    note: str

    def __post_init__(self) -> None:
        for name, text in vars(self).items():
            if not re.fullmatch(valid := VALID.get(name, ".+"), text):
                raise ValueError(f"{name} {text!r} does not match {valid}")
        if (self.flag == "lost") == bool(self.value) or bool(self.std) > bool(self.value):
            raise ValueError(
                f"value {self.value!r}, flag {self.flag!r}: lost, and it alone, has none"
            )
        if self.flag and not self.note:
            raise ValueError(f"flag {self.flag!r} without a note that says why")


def load(source=None, table=None, dataset=None, split_family=None, method=None) -> list[Cell]:
    """The cells that agree with what is given. ValueError: a malformed row, or no cell at all."""
    wanted, cells = {k: v for k, v in locals().items() if v is not None}, []
    for file in sorted(PUBLISHED.glob("*.csv")):
        rows = csv.reader(file.read_text("utf8").splitlines())
        if next(rows, None) != (names := [f.name for f in fields(Cell)]):
            raise ValueError(f"{file}: the first line is not {','.join(names)}")
        for row in rows:
            try:
                cells.append(Cell(*row))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{file}, line {rows.line_num}: {error}") from None
    if not (found := [c for c in cells if wanted.items() <= vars(c).items()]):
        known = "; ".join(f"{k}: {', '.join({vars(c)[k]: 0 for c in cells})}" for k in wanted)
        raise ValueError(f"nothing published has {wanted}; known are {known}")
    return found


@dataclass(frozen=True)
class Noted(Table):
    """A table with notes under it."""

    notes: Sequence[str] = ()

    def _repr_html_(self) -> str:
        return super()._repr_html_() + "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)

    def __repr__(self) -> str:
        return "\n".join([super().__repr__(), *self.notes])


def pivot(cells: Sequence[Cell], caption: str = "") -> Noted:
    """Methods by label counts in the order of `cells`; what else differs has a column too.

    [1] is a flag or note, listed below. ValueError where two cells share a place: select fewer.
    """
    shown = [k for k in ROW if k == "method" or len({vars(c)[k] for c in cells}) > 1]
    labels, notes = list(dict.fromkeys(c.labels for c in cells)), []
    rows: dict[tuple, dict[str, str]] = {}
    for c in cells:
        row = rows.setdefault(tuple(vars(c)[k] for k in shown), {})
        if c.labels in row:
            raise ValueError(f"two cells for {c.method} with {c.labels} labels in {c.source}")
        row[c.labels] = (c.value or "lost") + (f" ± {c.std}" if c.std else "")
        if c.note:
            note = f"{c.flag}: {c.note}" if c.flag else c.note
            notes += [note] if note not in notes else []
            row[c.labels] += f" [{notes.index(note) + 1}]"
    body = [[*key, *(row.get(n, "") for n in labels)] for key, row in rows.items()]
    header = [*("lists" if k == "split_family" else k for k in shown), *labels]
    return Noted(header, body, caption, [f"[{i}] {n}" for i, n in enumerate(notes, 1)])


def remarks(cells: Sequence[Cell]) -> str:
    """Markdown: whose numbers have fewer decimals than others', and who leads by label count."""
    there = [c for c in cells if c.value]
    decimals = {c.method: len(c.value.partition(".")[2]) for c in there}
    coarse = [method for method, count in decimals.items() if count < max(decimals.values())]
    leaders = []
    for labels in dict.fromkeys(c.labels for c in there):
        best = max((c for c in there if c.labels == labels), key=lambda c: float(c.value))
        leaders.append(f"{labels}: {best.method}")
    fewer = f"Fewer decimals than the other rows: {', '.join(coarse)}. " if coarse else ""
    return f"{fewer}The highest number by labels is {', '.join(leaders)}."


def spread(cells: Sequence[Cell]) -> str:
    """Markdown: how far the numbers lie apart, and from which noise on runs of one setting would.

    `n` draws of a normal distribution lie, from the smallest to the largest, on average as many
    standard deviations apart as the integral says: 1.13 for two, 3.34 for thirteen.

    Raises:
        ValueError: fewer than two numbers.
    """
    from scipy import stats

    values = [float(c.value) for c in cells if c.value]
    if (n := len(values)) < 2:
        raise ValueError(f"{n} number(s): a spread needs two")
    x = np.linspace(-8, 8, 1601)
    below = stats.norm.cdf(x)
    chance = np.trapezoid(1 - below**n - (1 - below) ** n, x)
    width = max(values) - min(values)
    return (
        f"From the lowest to the highest of the {n} numbers it is {width:.2f} points. If runs of "
        f"*one* setting had a standard deviation of {width / chance:.2f} points, {n} of them would "
        f"on average lie as far apart."
    )


def above(
    cells: Sequence[Cell], ours: Mapping[str, Sequence[dict]], protocol: str, caption: str = ""
) -> Noted:
    """`pivot`, and under it a row of mIoU per name in `ours`, blank where no record is of the list.

    Ours is the last evaluation, over runs; in brackets their number and their best evaluations.
    `protocol` is what the records must have been trained by, with * for the number of labels:
    "voc-classic-*-gta_seg". (That may be off by one: some papers print 2645 for lists of 2646.)
    """
    table = pivot(cells, caption)
    for name, records in ours.items():
        row = [name]
        for labels in table.header[1:]:
            there = [
                r
                for r in records
                if labels.isdigit()
                and fnmatch(r["config"]["protocol"], protocol)
                and abs(r["config"]["labeled"] - int(labels)) <= 1
            ]
            last, best = ([score(r, when=when) for r in there] for when in ("last", "best"))
            about = f"{summary(last)} (n = {len(there)}; best {summary(best)})" if there else ""
            row.append(about)
        table.rows.append(row)
    return table


def beside(
    cells: Sequence[Cell], ours: Mapping[str, Mapping[int, float]], base: str, caption: str = ""
) -> Noted:
    """`pivot` of one column of numbers, with ours: {method: {label draw or seed: value}}.

    Levels on other data do not compare, so each side has its difference to method `base`, ours
    within common draws. What is not there is blank. ValueError: `base` or a method of `ours` is
    not among `cells`, or these have several label counts.
    """
    table, printed = pivot(cells, caption), {c.method: c.value for c in cells}
    for name in (base, *ours):
        one_of("method", name, *printed)
    if len(counts := {c.labels for c in cells}) > 1:
        raise ValueError(f"cells of {len(counts)} label counts: select one")
    rows = []
    for row in table.rows:
        value, mine = printed[row[0]], ours.get(row[0], {})
        known = row[0] != base and value and printed[base]
        gap = f"{float(value) - float(printed[base]):+z.2f}" if known else ""
        both = sorted(mine.keys() & ours.get(base, {}).keys()) if row[0] != base else []
        pair = [[side[i] for i in both] for side in (mine, ours.get(base, {}))]
        level = summary(mine.values()) if mine else ""
        rows.append([*row, gap, level, len(mine) or "", paired_values(*pair) if both else ""])
    header = [*table.header, "difference", "ours", "runs", "our difference"]
    return Noted(header, rows, f"{caption} Differences are to: {base}.".strip(), table.notes)


def columns(cells: Sequence[Cell]) -> dict[tuple[str, ...], dict[str, Cell]]:
    """{(source, table, dataset, network, labels): {our name: cell}} of known systems' mIoU.

    Of several cells of a system, the first.
    """
    found: dict[tuple[str, ...], dict[str, Cell]] = {}
    for c in cells:
        name = (PIXELSSL if c.source == "ke2020" else OURS).get(c.method)
        if name and c.value and c.quantity == "mIoU %":
            place = (c.source, c.table, c.dataset, c.network, c.labels)
            found.setdefault(place, {}).setdefault(name, c)
    return found


def gaps(cells: Sequence[Cell], ours: str = "", base: str = "") -> dict[str, Decimal]:
    """{labels: value of method `ours` minus that of `base`}, exact to the printed digits.

    Without `base` it is the best other method; without both, the highest minus the lowest value.
    ValueError: nothing is printed, or a column has not the method, or has one twice.
    """
    columns: dict[str, dict[str, Decimal]] = {}
    for c in (c for c in cells if c.value):
        column = columns.setdefault(c.labels, {})
        if c.method in column:
            raise ValueError(f"two cells for {c.method} with {c.labels} labels in {c.source}")
        column[c.method] = Decimal(c.value)
    if not columns:
        raise ValueError("none of these cells has a value")
    found = {}
    for labels, column in columns.items():
        for method in filter(None, (ours, base)):
            one_of("method", method, *column)
        if ours:
            other = [column[base]] if base else [v for m, v in column.items() if m != ours]
            found[labels] = column[ours] - max(other)
        else:
            found[labels] = max(column.values()) - min(column.values())
    return found
