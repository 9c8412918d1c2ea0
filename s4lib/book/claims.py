"""What the four papers claim (book/claims.yaml), and verdicts that are computed from records."""

from __future__ import annotations

import re
import typing
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import yaml

from .. import records
from ..config import checked, one_of
from ..protocols import protocol
from . import published

CLAIMS = records.HERE / "book" / "claims.yaml"
WORDS = REPRODUCED, PARTLY, NOT, UNTESTED = "reproduced", "partly", "not", "not tested here"

# What is demanded of records paired by label draw, of mean and 95 % interval ("partly": of the mean
# alone), or of a paper's own table at each number of labels ("partly": at some).
STATISTICS = {
    "higher": "the first run minus the second is above 0",
    "similar": "the first run minus the second is within the margin, either way",
    "printed margin": "the first row minus the second is the figure, to within its last digit",
    "printed higher": "the first row minus the second is above the figure, or above 0",
    "printed similar": "the highest row minus the lowest is within the margin",
    "none": "nothing here can test it; the note says why",
}


@dataclass(frozen=True)
class Run:
    """One side of a comparison: what was run, and which of its scores counts."""

    name: str
    changes: dict  # to the config of the setting
    network: tuple[str, ...] = ()  # their mean; the deployed one if none is named
    when: typing.Literal["last", "best"] = "last"

    def __str__(self) -> str:
        which = f"{' and '.join(self.network)} of " if self.network else ""
        return which + self.name + " at its best" * (self.when == "best")

    def score(self, record: dict) -> float:
        networks = self.network or (record["deployed"],)
        return sum(records.score(record, n, self.when) for n in networks) / len(networks)


@dataclass(frozen=True)
class Claim:
    """One comparison that a paper claims. ValueError for what its statistic cannot work with."""

    id: str
    paper: str  # key of references.bib
    where: str  # section, table or line
    quote: str  # exact words
    statistic: str  # one of STATISTICS
    setting: str  # protocol of the runs
    figure: str = ""  # the paper's numbers, its digits
    note: str = ""  # what the test leaves open, or why there is none
    runs: tuple[Run, ...] = ()  # two
    table: str = ""  # of book/published/<paper>.csv
    rows: tuple[str, ...] = ()  # two of it, or one to be compared with the best other
    within: float = 1.0  # margin in points; ours, for the papers print none

    def __post_init__(self) -> None:
        one_of("statistic", self.statistic, *STATISTICS)
        if self.statistic == "none" and not self.note:
            raise ValueError("statistic 'none' needs a note that says why")
        evaluate([self], [])  # its setting, runs, rows and figures make sense


class Verdict(typing.NamedTuple):
    claim: Claim
    word: str  # one of WORDS
    found: str  # the computed numbers, or why there are none
    holds: str = ""  # where they do
    difference: records.Difference | None = None  # of the runs


def load(path: str | Path = CLAIMS) -> list[Claim]:
    """The claims of a file. ValueError: a malformed one; names file and id."""
    given, claims = yaml.safe_load(Path(path).read_text("utf8")), {}
    for number, entry in enumerate(given["claims"], 1):
        name = entry.get("id", f"claim {number}")
        try:
            for run in (runs := entry.get("runs", [])):
                run["changes"] = given["runs"][one_of("name", run.get("name"), *given["runs"])]
            entry = {"setting": given["setting"], **entry, "runs": [_typed(Run, r) for r in runs]}
            if name in claims:
                raise ValueError("two claims have this id")
            claims[name] = _typed(Claim, entry)
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, {name}: {error}") from None
    return list(claims.values())


def _typed(kind: type, given: dict):
    kinds = typing.get_type_hints(kind)
    return kind(**{key: checked(key, v, kinds.get(key, object)) for key, v in given.items()})


def evaluate(claims: list[Claim], found: list[dict], setting: str = "") -> list[Verdict]:
    """What records say of each claim. Stale ones do not count; `setting` replaces the claims'."""
    return [_verdict(claim, found, setting or claim.setting) for claim in claims]


def _verdict(claim: Claim, found: list[dict], setting: str) -> Verdict:
    if claim.statistic == "none":
        return Verdict(claim, UNTESTED, claim.note)
    if claim.statistic.startswith("printed"):
        return _printed(claim)
    (ours, base), pair = claim.runs, []
    for run in claim.runs:
        config = protocol(setting, **run.changes)
        fresh = [r for r in records.like(found, config) if not records.stale(r)]
        pair.append([{**r, "score": run.score(r)} for r in fresh])
    try:
        d = records.paired(*pair, value=lambda record: record["score"])
    except ValueError:
        none = f"no label draw with records of both, by the present code: {ours}; {base}"
        return Verdict(claim, UNTESTED, none, f"on {setting}")
    low, high = (0, float("inf")) if claim.statistic == "higher" else (-claim.within, claim.within)
    interval = low < d.low and d.high < high
    word = NOT if not low < d.mean < high else REPRODUCED if interval else PARTLY
    text = f"{ours} minus {base}: {d} points, n = {len(d.values)}"
    toy = ", a tiny network and synthetic images, not for VOC" * (config.dataset == "mosaic")
    return Verdict(claim, word, text, f"on {setting}{toy}", d)


def _printed(claim: Claim) -> Verdict:
    gaps = published.gaps(published.load(claim.paper, claim.table), *claim.rows)
    figures = [Decimal(number) for number in re.findall(r"\d+\.\d+", claim.figure)]
    if claim.statistic == "printed margin":
        if len(figures) != len(gaps):
            raise ValueError(f"figure={claim.figure!r}: give one for each of {', '.join(gaps)}")
        off = [abs(g - f) for g, f in zip(gaps.values(), figures, strict=True)]
        holds = [o < Decimal(1).scaleb(figures[0].as_tuple().exponent) for o in off]
    elif claim.statistic == "printed similar":
        holds = [gap <= claim.within for gap in gaps.values()]
    else:
        holds = [gap > max(figures, default=0) for gap in gaps.values()]
    word = REPRODUCED if all(holds) else PARTLY if any(holds) else NOT
    what = " minus ".join(map(repr, claim.rows)) or "highest minus lowest row"
    what += " minus the best other row" * (len(claim.rows) == 1)
    text = f"{', '.join(f'{gap:+}' for gap in gaps.values())} points at {', '.join(gaps)} labels"
    return Verdict(claim, word, f"{what}: {text}", "in the paper's own table")
