"""All systems under one protocol, from records, as tables of the results chapter.

stand = Standings.of(records.load(records.COMMITTED), "mosaic-32", draws=(0, 1, 2))
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median

import numpy as np

from ..config import Config
from ..methods import METHODS
from ..passes import Passes, passes
from ..protocols import protocol
from ..records import paired, score, stale, summary
from .ranking import Comparison, agreement, compare, gather, holm, needed, p_value
from .tables import Table

BASE = "supervised"
_PLACE = ("draw", "seed", "data_root")  # of a config, not part of what is changed


@dataclass(frozen=True)
class Standings:
    """Systems are methods, by name for their preset paper, else "method, preset"."""

    setting: str
    systems: dict[str, dict]  # {system: changes to the protocol}
    results: dict[str, dict[int, dict]]  # {system: {draw: record}}, empty where nothing ran

    @classmethod
    def of(
        cls,
        found: Sequence[dict],
        setting: str,
        draws: Sequence[int],
        changes: Mapping | None = None,
    ) -> Standings:
        """Every preset of every method, and supervised-only with a doubled batch."""
        changes = changes or {}
        systems = {
            (m if preset == "paper" else f"{m}, {preset}"): {
                **changes,
                "method": m,
                "preset": preset,
            }
            for m, kind in METHODS.items()
            for preset in kind.presets
        }
        batch = 2 * protocol(setting, **changes).batch
        systems[f"{BASE}, doubled batch"] = {**systems[BASE], "batch": batch}
        return cls(setting, systems, gather(found, setting, systems, draws))

    @cached_property
    def place(self) -> str:
        """Protocol and number of labels, such as "mosaic-32, 32 labels"."""
        return f"{self.setting}, {protocol(self.setting, **self.systems[BASE]).labeled} labels"

    @cached_property
    def full(self) -> dict[str, list[float]]:
        """{system: [mIoU per draw]} of those with all the draws that supervised-only has."""
        draws = self.results[BASE].keys()
        whole = {n: by for n, by in self.results.items() if by and by.keys() == draws}
        return {name: [score(r) for r in by.values()] for name, by in whole.items()}

    @cached_property
    def mean(self) -> dict[str, float]:
        return {name: summary(values).mean for name, values in self.full.items()}

    def marked(self, name: str) -> str:
        return name + "*" * any(map(stale, self.results[name].values()))

    def table(self, names: Sequence[str], *against: str) -> Table:
        """Mean, deviation, n of each system, and its differences to each of `against`.

        The verdict stands beside p where there is one other than "not distinguishable".
        """
        columns = [self.verdicts(names, b) for b in against]
        header, rows = ["", "n", "last mIoU", "best epoch"], []
        for name in names:
            if not (group := list(self.results[name].values())):
                rows.append([name, "not run", "", "", *[""] * 2 * len(against)])
                continue
            sums = [summary(score(r, when=when) for r in group) for when in ("last", "best")]
            pairs = [cell for column in columns for cell in _brief(column.get(name))]
            rows.append([self.marked(name), len(group), *sums, *pairs])
        header += [cell for base in against for cell in (f"minus {base}", "p")]
        caption = f"mIoU in % on {self.place}. p is corrected for its column; where it is below "
        return Table(header, rows, f"{caption}0.05 the verdict follows, elsewhere there is none.")

    def verdicts(self, names: Sequence[str], base: str) -> dict[str, Comparison]:
        """Of each system that shares draws with `base`; p corrected for their number."""
        return compare({n: self.results[n] for n in (*names, base)}, base)

    def classes(self, names: Sequence[str]) -> str:
        """How many of `names` are above supervised-only, on the draws that they share, in the mean
        over the half of the classes that it knows best, and over the others."""
        base = {d: _class_iou(r) for d, r in self.results[BASE].items()}
        ours = {n: {d: _class_iou(r) for d, r in self.results[n].items()} for n in names}
        pairs = [[by[d] - base[d] for d in by.keys() & base] for n, by in ours.items() if n != BASE]
        gains = [np.mean(pair, axis=0) for pair in pairs if pair]
        level = np.mean([*base.values()], axis=0)  # nan, in neither half: occurs nowhere
        halves = level >= np.nanmedian(level), level < np.nanmedian(level)
        above = [sum(gain[half].mean() > 0 for gain in gains) for half in halves]
        return (
            f"Above supervised-only in mean IoU: {above[0]} of {len(gains)} systems over the "
            f"{halves[0].sum()} classes that it knows best, {above[1]} over the other "
            f"{halves[1].sum()}."
        )

    def presets(self) -> Table:
        """Each system that is no method's own preset paper, minus that; one family of p values."""
        pairs = {}
        for name in (n for n in self.systems if n not in METHODS):
            ours, paper = self.results[name], self.results[name.partition(",")[0]]
            if ours.keys() & paper.keys():
                pairs[name] = paired(ours.values(), paper.values())
        adjusted, rows = holm([p_value(d) for d in pairs.values()]), []
        for (name, difference), p in zip(pairs.items(), adjusted, strict=True):
            level = summary(map(score, self.results[name].values()))
            rows.append([self.marked(name), level.n, level, *_cells(Comparison(difference, p))])
        absent = [n for n in self.systems if n not in METHODS and n not in pairs]
        caption = "mIoU in %; p is corrected for all rows together."
        caption += f" Not run on draws of its method's paper: {'; '.join(absent)}." * bool(absent)
        return Table(["", "n", "last mIoU", "minus paper", "p", "verdict"], rows, caption)

    def best(self, names: Sequence[str]) -> str:
        """Which of `names` has the highest mean over all draws of supervised-only."""
        return max((n for n in names if n in self.full), key=self.mean.get, default=BASE)

    def everywhere(self, found: Sequence[dict], draws: Sequence[int]) -> dict[str, Standings]:
        """The same systems by place, this one too."""
        by_place = {}
        for where, labels in places(found):
            systems = {n: {**changes, "labeled": labels} for n, changes in self.systems.items()}
            there = Standings(where, systems, gather(found, where, systems, draws))
            by_place[there.place] = there
        return by_place

    def elsewhere(self, by_place: Mapping[str, Standings], names: Sequence[str]) -> Table:
        """Mean mIoU of systems in each place of `everywhere`; below, how the order of those with
        all our draws agrees with ours."""
        columns, last = {}, ["Kendall's tau (p)"]
        for place, there in by_place.items():
            ran = {n: there.results[n].values() for n in names if there.results[n]}
            columns[place] = {n: summary(map(score, group)) for n, group in ran.items()}
        for levels in columns.values():
            both = {n: s.mean for n, s in levels.items() if s.n == len(self.results[BASE])}
            last.append(_agreed(both, self.mean))
        rows = [
            [n, *(f"{v[n]} ({v[n].n})" if n in v else "" for v in columns.values())] for n in names
        ]
        rows = [row for row in rows if any(row[1:])]
        return Table(["", *columns], [*rows, last], "Last mIoU: mean, standard deviation (draws).")

    def passes(self, name: str) -> Passes:
        """Of one of its steps."""
        return passes(self.systems[name]["method"], self.systems[name]["preset"])

    def price(self, name: str) -> float:
        """`work` of a run, supervised-only's = 1."""
        both = []
        for each in (name, BASE):
            record = next(iter(self.results[each].values()))
            both.append(work(self.passes(each)) * record["steps"] * record["config"]["batch"])
        return both[0] / both[1]

    def seconds(self, name: str) -> float:
        """Of a run, on average; supervised-only's = 1."""
        both = [summary(r["seconds"] for r in self.results[n].values()) for n in (name, BASE)]
        return both[0].mean / both[1].mean

    def cost(self, names: Sequence[str]) -> Table:
        rows, devices = [], set()
        for n in names:
            group = list(self.results[n].values())
            count = [f"{each:g}" for each in self.passes(n)]
            if not group:
                rows.append([n, "not run", *count, *[""] * 3])
                continue
            devices |= {r["device"] for r in group}
            images, spent = f"{group[0]['images_seen']:,}", summary(r["seconds"] for r in group)
            times = f"{self.price(n):.1f}" if self.results[BASE] else ""
            rows.append([self.marked(n), summary(map(score, group)), *count, times, images, spent])
        header = ["", "last mIoU", *Passes._fields, "times supervised", "images seen", "seconds"]
        where = f" Runs on {', '.join(sorted(devices))}." if devices else ""
        passed = "Encoder passes of a late step (warm-ups are cheaper; of stages, the last)."
        return Table(header, rows, passed + where)


def changed(found: Sequence[dict], configs: Sequence[Config], draws: Sequence[int]) -> Standings:
    """Supervised-only, and the methods of `configs` (all of one protocol) as they are and changed.

    "u2pl, decay 0.98" is named after what is not usual in its configs but draw, seed, data_root.
    """
    (setting,) = {c.protocol for c in configs}
    systems = {BASE: {"method": BASE, "preset": "paper"}}
    for config in configs:
        own = {"method": config.method, "preset": config.preset}
        usual, new = protocol(setting, **own).to_dict(), config.to_dict()
        unusual = {k: v for k, v in new.items() if v != usual[k] and k not in _PLACE}
        args = {k: v for k, v in config.method_args.items() if v != usual["method_args"].get(k)}
        said = {k: v for k, v in unusual.items() if k != "method_args"} | args
        systems.setdefault(config.method, own)
        name = ", ".join([config.method, *(f"{k} {v}" for k, v in said.items())])
        systems[name] = {**unusual, **own, **({"method_args": args} if args else {})}
    return Standings(setting, systems, gather(found, setting, systems, draws))


def places(found: Sequence[dict]) -> list[tuple[str, int]]:
    """(protocol, number of labeled images) with records of three methods.

    But for smoke protocols, which train for too short to be compared.
    """
    ran = {(c["protocol"], c["labeled"], c["method"]) for c in (r["config"] for r in found)}
    methods = Counter(ran_at[:2] for ran_at in ran if "smoke" not in ran_at[0])
    return sorted(place for place, count in methods.items() if count >= 3)


def work(step: Passes) -> float:
    """Encoder passes of a step, of which a backward one counts as two."""
    return step.forward + step.teaching + 2 * step.backward


def needed_table(comparisons: Mapping[str, Comparison], draws: int) -> Table:
    """Mean paired differences that would be told from zero at 5 %, of `draws` and other numbers."""
    tested = [c.difference for c in comparisons.values() if not math.isnan(c.p)]
    spread = median(summary(d.values).std for d in tested) if tested else math.nan
    rows = []
    for n in sorted({2, 3, 5, 10, 20} | {draws} - {0, 1}):
        units = [needed(n, m) for m in (1, max(len(tested), 1))]
        points = [f"{u * spread:.1f}" if tested else "" for u in units]
        rows.append([n, f"{units[0]:.2f}", points[0], f"{units[1]:.2f}", points[1]])
    about = "Mean difference that is told from zero at 5 %: in standard deviations, and in points "
    if not tested:
        about += "if one were known: no system shares two draws with supervised-only."
    else:
        about += f"for the median one of {spread:.1f}. The largest mean difference here is "
        about += f"{max(abs(d.mean) for d in tested):.1f}."
    header = ["draws", "alone", "points", f"smallest of {len(tested)}", "points"]
    return Table(header, rows, about)


def _class_iou(record: dict) -> np.ndarray:
    """Of the deployed network's last evaluation; nan where a class occurs nowhere."""
    return np.array(record["networks"][record["deployed"]]["last"]["iou"], float)


def _cells(comparison: Comparison | None) -> list[object]:
    if comparison is None:
        return [""] * 3
    p = "" if math.isnan(comparison.p) else f"{comparison.p:.2g}"
    return [comparison.difference, p, comparison.verdict]


def _brief(comparison: Comparison | None) -> list[object]:
    """`_cells`, with the verdict behind p and only if it says something; one pair is a number."""
    difference, p, verdict = _cells(comparison)
    if comparison and not p:
        difference = f"{comparison.difference.mean:+.1f}"
    return [difference, f"{p} {verdict}" if verdict in ("better", "worse") else p]


def _agreed(one: Mapping[str, float], other: Mapping[str, float]) -> str:
    if len(one.keys() & other.keys()) < 3:
        return ""
    a = agreement(one, other)
    return f"{a.tau:+.2f} ({a.tau_p:.2f}), n = {a.n}"
