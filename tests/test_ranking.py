"""Corrections, ranks and correlations against hand-made cases, printed tables and enumerations."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from s4lib.book import ranking
from s4lib.book.ranking import agreement, compare, front, gather, holm, left_out, needed, p_value
from s4lib.build import method_source
from s4lib.protocols import protocol
from s4lib.records import paired


def record(method, draw, miou, *, seed=None, preset="paper", finished="2026-01-01", source=None):
    config = protocol("mosaic-32", method=method, preset=preset, draw=draw, seed=seed or draw)
    return {
        "run_id": f"{config.run_id}-{finished}",
        "config": config.to_dict(),
        "method_source": source or method_source(method, "mosaic"),
        "deployed": "net",
        "networks": {"net": {"last": {"miou": miou}}},
        "finished": finished,
    }


def by_draw(method, *values):
    return {d: record(method, d, value) for d, value in enumerate(values)}


def test_holm_multiplies_the_smallest_by_all_and_never_lets_a_larger_one_pass_it():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.5]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_leaves_out_what_has_no_p_value():
    first, none, last = holm([0.02, math.nan, 0.03])
    assert (first, last) == pytest.approx((0.04, 0.04)) and math.isnan(none)


def test_holm_lies_between_p_and_bonferroni_and_keeps_the_order():
    rng = np.random.default_rng(0)
    for _ in range(50):
        p = rng.uniform(size=rng.integers(1, 9)) ** 3
        found = np.array(holm(p))
        assert (found >= p).all() and (found <= np.minimum(1, len(p) * p) + 1e-12).all()
        assert (np.diff(found[np.argsort(p)]) >= 0).all()
        swap = rng.permutation(len(p))
        np.testing.assert_array_equal(holm(p[swap]), found[swap])


def test_p_value_is_that_of_the_paired_test_and_agrees_with_the_interval():
    ours, base = [40.0, 44.0, 41.0], [38.0, 39.0, 40.0]
    pair = by_draw("cutmix_seg", *ours).values(), by_draw("supervised", *base).values()
    p = p_value(paired(*pair))
    assert p == pytest.approx(stats.ttest_rel(ours, base).pvalue)
    edge = paired(*pair, level=1 - p)
    assert edge.low == pytest.approx(0, abs=1e-9), "the interval of level 1 - p ends at zero"


def test_p_value_of_one_pair_or_of_equal_differences():
    zero, one = by_draw("supervised", 30.0, 31.0), by_draw("cutmix_seg", 31.0, 32.0)
    assert math.isnan(p_value(paired([one[0]], zero.values())))
    assert p_value(paired(one.values(), zero.values())) == 0
    assert p_value(paired(zero.values(), zero.values())) == 1


def test_needed_is_where_the_corrected_p_value_is_one_in_twenty():
    for n, comparisons in ((3, 1), (3, 20), (10, 7)):
        values = np.arange(n) - (n - 1) / 2
        values = values / values.std(ddof=1) + needed(n, comparisons)
        assert stats.ttest_1samp(values, 0).pvalue == pytest.approx(0.05 / comparisons)


def test_compare_corrects_for_the_systems_that_could_be_compared():
    results = {
        "supervised": by_draw("supervised", 30.0, 31.0, 35.0),
        "good": by_draw("cutmix_seg", 40.0, 41.1, 45.2),
        "unclear": by_draw("mean_teacher", 31.0, 30.0, 36.0),
        "once": {0: record("gps", 0, 50.0)},
        "elsewhere": {7: record("gta_seg", 7, 50.0)},
        "never": {},
    }
    found = compare(results, "supervised")
    assert list(found) == ["good", "unclear", "once"]
    alone = stats.ttest_rel([40.0, 41.1, 45.2], [30.0, 31.0, 35.0]).pvalue
    assert found["good"].p == pytest.approx(2 * alone), "one pair makes no test"
    verdicts = [comparison.verdict for comparison in found.values()]
    assert verdicts == ["better", "not distinguishable", "not distinguishable"]
    assert compare(results, "good")["supervised"].verdict == "worse"


def test_gather_takes_fresh_records_then_late_ones_of_the_exact_setting():
    found = [
        record("supervised", 0, 1.0, finished="2026-01-02"),
        record("supervised", 0, 2.0, finished="2026-01-03"),
        record("supervised", 0, 3.0, finished="2026-01-04", source="stale"),
        record("supervised", 1, 4.0, source="stale"),
        record("supervised", 2, 5.0, seed=9),
        record("supervised", 3, 6.0),
        record("supervised", 0, 7.0, preset="strong"),
    ]
    systems = {"plain": {}, "strong": {"preset": "strong"}, "gps": {"method": "gps"}}
    results = gather(found, "mosaic-32", systems, draws=(2, 1, 0))
    scores = {
        name: {d: r["networks"]["net"]["last"]["miou"] for d, r in by.items()}
        for name, by in results.items()
    }
    assert scores == {"plain": {1: 4.0, 0: 2.0}, "strong": {0: 7.0}, "gps": {}}


def test_ranks_count_from_the_highest_within_a_draw_and_ties_share():
    found = ranking.ranking({"a": [1, 9], "b": [2, 5], "c": [2, 1]})
    assert found.ranks == {"a": [3, 1], "b": [1.5, 2], "c": [1.5, 3]}


def test_critical_difference_is_the_one_that_demsar_prints():
    rng = np.random.default_rng(0)
    scores = {name: rng.normal(size=14) for name in "abcd"}
    assert ranking.ranking(scores).critical == pytest.approx(1.25, abs=0.005)


def test_friedman_follows_its_formula_and_sees_a_constant_order():
    constant = ranking.ranking({name: [i, i + 10, i + 20, i + 30] for i, name in enumerate("abc")})
    assert constant.p == pytest.approx(stats.chi2.sf(8, 2))  # mean ranks 3, 2, 1 over 4 draws
    with pytest.raises(ValueError, match=r"values \(2, 2\): ranks need 3 systems"):
        ranking.ranking({"a": [1, 2], "b": [1, 2]})
    with pytest.raises(ValueError, match=r"values \(3, 1\)"):
        ranking.ranking({"a": [1], "b": [2], "c": [3]})


def test_left_out_looks_the_winner_of_the_others_up_in_the_draw_that_chose_nothing():
    values = {"lucky": [9.0, 1.0, 2.0], "steady": [5.0, 4.0, 5.0], "low": [0.0, 2.0, 0.0]}
    assert left_out(values) == [("steady", 2), ("lucky", 3), ("lucky", 2)]


def test_agreement_by_enumeration():
    ours = {"a": 1.0, "b": 4.0, "c": 2.0, "d": 3.0, "e": 5.0, "only ours": 0.0}
    theirs = {"a": 10.0, "b": 20.0, "c": 30.0, "d": 40.0, "e": 50.0, "only theirs": 0.0}
    found = agreement(ours, theirs)
    assert (found.n, found.tau) == (5, pytest.approx((8 - 2) / 10)), "two of ten pairs swap"
    assert found.rho == pytest.approx(1 - 6 * (2**2 + 1 + 1) / (5 * 24))
    x, y = [1, 4, 2, 3, 5], np.arange(5)
    for statistic, p in ((stats.kendalltau, found.tau_p), (stats.spearmanr, found.rho_p)):
        every = [statistic(each, y).statistic for each in itertools.permutations(x)]
        share = np.mean(np.abs(every) >= abs(every[0]) - 1e-9)
        assert p == pytest.approx(share)


def test_agreement_turns_sign_and_ignores_monotone_maps():
    one = {str(i): float(v) for i, v in enumerate([3, 1, 4, 1.5, 9, 2.6])}
    other = {str(i): float(v) for i, v in enumerate([2, 7, 1, 8, 2.8, 1.8])}
    found, bent = agreement(one, other), agreement({k: v**3 for k, v in one.items()}, other)
    turned = agreement({k: -v for k, v in one.items()}, other)
    assert found == bent
    assert (turned.tau, turned.rho) == pytest.approx((-found.tau, -found.rho))
    assert (turned.tau_p, turned.rho_p) == pytest.approx((found.tau_p, found.rho_p))
    assert agreement(one, one)[:2] == (6, pytest.approx(1))


def test_agreement_needs_an_order():
    with pytest.raises(ValueError, match="2 common systems"):
        agreement({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 2.0, "c": 3.0})
    with pytest.raises(ValueError, match="differing values"):
        agreement(dict.fromkeys("abc", 1.0), {"a": 1.0, "b": 2.0, "c": 3.0})


def test_front_keeps_what_nothing_as_cheap_surpasses():
    points = {"dear": (9, 7), "base": (1, 3), "same": (1, 3), "low": (1, 2), "dominated": (5, 2.9)}
    assert front(points | {"good": (4, 8)}) == ["base", "good"]
    assert front(points) == ["base", "dear"]
    assert front({}) == []


def test_gather_asks_for_the_protocol_with_all_its_changes():
    config = protocol("mosaic-32", method="ps_mt")
    ran = record("ps_mt", 0, 1.0)
    other = ran | {"config": replace(config, method_args={"decay": 0.5}).to_dict(), "run_id": "x"}
    results = gather([ran, other], "mosaic-32", {"ps_mt": {"method": "ps_mt"}}, draws=[0])
    assert results["ps_mt"][0]["run_id"] == ran["run_id"]
