"""Many systems at once: what is left to say when everything is compared with everything."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from ..protocols import protocol
from ..records import Difference, like, paired, stale, summary


def gather(
    found: Sequence[dict], setting: str, systems: Mapping[str, Mapping], draws: Sequence[int]
) -> dict[str, dict[int, dict]]:
    """{system: {draw: record}} of systems given as {name: changes to the protocol}.

    A draw's seed is its number. Of several records, a fresh one, of these the latest."""
    results = {}
    for name, changes in systems.items():
        config = protocol(setting, **changes)
        same = sorted(like(found, config), key=lambda r: (not stale(r), r["finished"]))
        by_draw = {c["draw"]: r for r in same if (c := r["config"])["draw"] == c["seed"]}
        results[name] = {d: by_draw[d] for d in draws if d in by_draw}
    return results


def p_value(difference: Difference) -> float:
    """Two-sided, of Student's test that the mean paired difference is zero; nan of one pair."""
    s = summary(difference.values)
    if s.n < 2 or s.std == 0:
        return math.nan if s.n < 2 else float(s.mean == 0)
    return float(2 * stats.t.sf(abs(s.mean) / s.std * math.sqrt(s.n), s.n - 1))


def holm(p: Sequence[float]) -> list[float]:
    """p values corrected for their number (Holm 1979), towards which nan does not count."""
    p = np.asarray(p, float)
    order, count = np.argsort(p), np.isfinite(p).sum()
    steps = np.maximum.accumulate(p[order] * np.maximum(count - np.arange(len(p)), 1))
    return np.minimum(steps, 1)[np.argsort(order)].tolist()


def needed(n: int, comparisons: int = 1) -> float:
    """Mean of n differences, in their standard deviations, whose p is 0.05 / comparisons."""
    return float(stats.t.isf(0.025 / comparisons, n - 1) / math.sqrt(n))


class Comparison(NamedTuple):
    difference: Difference  # with its interval alone
    p: float  # as one of many; this decides the verdict

    @property
    def verdict(self) -> str:
        side = "better" if self.difference.mean > 0 else "worse"
        return side if self.p < 0.05 else "not distinguishable"


def compare(results: Mapping[str, Mapping[int, dict]], base: str) -> dict[str, Comparison]:
    """mIoU of every system minus that of `base`, where they share a draw; p corrected by `holm`."""
    known = [n for n, by in results.items() if n != base and by.keys() & results[base].keys()]
    found = [paired(results[name].values(), results[base].values()) for name in known]
    adjusted = holm([p_value(difference) for difference in found])
    return dict(zip(known, map(Comparison, found, adjusted), strict=True))


def told(comparisons: Mapping[str, Comparison]) -> str:
    """Such as "3 better, 1 worse, 20 not distinguishable, 2 with a single draw"."""
    alone = "with a single draw"
    count = Counter(alone if math.isnan(c.p) else c.verdict for c in comparisons.values())
    words = ["better", "worse", "not distinguishable", *[alone] * (alone in count)]
    return ", ".join(f"{count[word]} {word}" for word in words)


class Ranking(NamedTuple):
    ranks: dict[str, list[float]]  # per draw; 1 is the highest value, ties share
    p: float  # of Friedman's test that all are equal (an approximation)
    critical: float  # mean ranks less far apart are not distinguishable (Nemenyi, 5 % of all pairs)


def ranking(values: Mapping[str, Sequence[float]]) -> Ranking:
    """Of {system: [value per draw]}. ValueError: fewer than 3 systems or 2 draws."""
    table = np.array(list(values.values()), float)
    if table.ndim < 2 or len(table) < 3 or table.shape[1] < 2:
        raise ValueError(f"values {table.shape}: ranks need 3 systems and 2 draws of each")
    k, n = table.shape
    width = stats.studentized_range.ppf(0.95, k, math.inf) * math.sqrt(k * (k + 1) / (12 * n))
    ranks = dict(zip(values, stats.rankdata(-table, axis=0).tolist(), strict=True))
    return Ranking(ranks, float(stats.friedmanchisquare(*table).pvalue), float(width))


def left_out(values: Mapping[str, Sequence[float]]) -> list[tuple[str, float]]:
    """Per draw: the system with the highest mean over the others, and its rank in this one."""
    ranks, draws = ranking(values).ranks, range(len(next(iter(values.values()))))
    best = [max(values, key=lambda n, i=i: sum(values[n]) - values[n][i]) for i in draws]
    return [(name, ranks[name][i]) for i, name in enumerate(best)]


class Agreement(NamedTuple):
    n: int
    tau: float  # Kendall's tau-b
    tau_p: float  # two-sided; exact where nothing is tied
    rho: float  # Spearman's
    rho_p: float  # two-sided, by all permutations of up to 7 systems, by 10 000 of more


def agreement(one: Mapping[str, float], other: Mapping[str, float]) -> Agreement:
    """Rank correlation over common names. ValueError: fewer than 3, or all of a side are equal."""
    names = [name for name in one if name in other]
    x, y = (stats.rankdata([side[name] for name in names]) for side in (one, other))
    if len(names) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        raise ValueError(f"{len(names)} common systems: an order needs 3, and differing values")
    product = lambda x, axis: np.sum(x * (y - y.mean()), axis)  # noqa: E731
    how = {"permutation_type": "pairings", "n_resamples": 10_000, "vectorized": True, "rng": 0}
    rho_p = stats.permutation_test((x,), product, **how).pvalue
    return Agreement(len(names), *stats.kendalltau(x, y), np.corrcoef(x, y)[0, 1], rho_p)


def front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Of {name: (cost, score)} those that nothing as cheap surpasses or equals, cheapest first."""
    order = sorted(points, key=lambda name: (points[name][0], -points[name][1]))
    best = np.maximum.accumulate([-math.inf, *(points[name][1] for name in order)])
    return [name for name, before in zip(order, best, strict=False) if points[name][1] > before]
