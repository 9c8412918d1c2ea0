"""The tables of the results chapter, from records made by hand."""

from __future__ import annotations

from collections import Counter

import pytest

from s4lib import records
from s4lib.book import orders
from s4lib.book.ranking import told
from s4lib.book.standings import BASE, Standings, changed, needed_table, places
from s4lib.build import method_source
from s4lib.grid import read
from s4lib.methods import METHODS
from s4lib.protocols import protocol

LEVELS = {
    "supervised": (30.0, 32.0, 37.0),
    "mean_teacher": (30.5, 31.0, 38.0),
    "cct": (33.0, 35.2, 39.9),
    "gct": (32.0, 34.1, 39.1),
    "cutmix_seg": (36.0, 38.0),
}


def record(system, draw, miou, where="mosaic-32", **changes):
    method, _, preset = system.partition(", ")
    changes |= {"method": method, "preset": preset or "paper"}
    config = protocol(where, draw=draw, seed=draw, **changes)
    return {
        "run_id": config.run_id,
        "config": config.to_dict(),
        "method_source": method_source(method, "mosaic"),
        "deployed": "net",
        "networks": {"net": {"last": {"miou": miou}, "best": {"miou": miou + 1}}},
        "finished": "2026-01-01",
        "steps": 100,
        "images_seen": 800,
        "seconds": 60.0 if method == "supervised" else 90.0,
        "device": "CPU",
    }


@pytest.fixture
def found():
    return [record(n, d, v) for n, values in LEVELS.items() for d, v in enumerate(values)]


@pytest.fixture
def stand(found):
    return Standings.of(found, "mosaic-32", draws=(0, 1, 2))


def row(table, name):
    (found,) = [row for row in table.rows if row[0].rstrip("*") == name]
    return dict(zip(table.header, map(str, found), strict=True))


def test_only_systems_with_all_draws_of_the_base_are_full(stand):
    assert set(stand.full) == LEVELS.keys() - {"cutmix_seg"}
    assert stand.mean["supervised"] == 33.0
    assert stand.systems["supervised, doubled batch"]["batch"] == 16


def test_table_has_what_ran_and_says_what_did_not(stand):
    table = stand.table(["supervised", "cct", "cutmix_seg", "gps"], BASE)
    assert row(table, "gps")["n"] == "not run" and not row(table, "supervised")["p"]
    cct, cutmix = row(table, "cct"), row(table, "cutmix_seg")
    assert (cct["n"], cct["last mIoU"], cct["best epoch"]) == ("3", "36.0 ± 3.5", "37.0 ± 3.5")
    assert cct["minus supervised"].startswith("+3.0") and cct["p"].endswith(" better")
    assert cutmix["n"] == "2" and cutmix["minus supervised"].startswith("+6.0")
    assert cutmix["p"] and not cutmix["p"].endswith("distinguishable")
    assert {len(each) for each in (*table.rows, table.header)} == {6}
    assert len(stand.table(["supervised", "gps"], BASE, "cct").rows[1]) == 8
    assert table.caption.startswith("mIoU in % on mosaic-32, 32 labels.")


def test_verdicts_count_what_a_single_draw_cannot_say(found, stand):
    assert told(stand.verdicts(list(LEVELS), BASE)) == "3 better, 0 worse, 1 not distinguishable"
    found.append(record("gps", 0, 31.0))
    again = Standings.of(found, "mosaic-32", draws=(0, 1, 2)).verdicts(["gps", "cct"], BASE)
    assert told(again) == "1 better, 0 worse, 0 not distinguishable, 1 with a single draw"
    assert stand.verdicts(["gps"], "cps") == {}, "neither has run"


def test_changes_are_named_after_what_is_not_usual_and_held_against_their_own_method(found):
    usual = protocol("mosaic-32", method="gct").method_args
    new = {"method_args": {**usual, "mu": 0.25}}, {"warmup": 2}
    pairs = [(new[0], 35.0), (new[1], 39.0)]
    found += [record("gct", d, v, **change) for change, v in pairs for d in (0, 1)]
    configs = [
        protocol("mosaic-32", method="gct", draw=d, seed=d, **c) for c in new for d in (0, 1)
    ]
    looked = changed(found, configs, (0, 1, 2))
    assert list(looked.systems) == [BASE, "gct", "gct, mu 0.25", "gct, warmup 2"]
    assert [len(by) for by in looked.results.values()] == [3, 3, 2, 2]
    assert row(looked.presets(), "gct, warmup 2")["minus paper"].startswith("+5.9")
    verdicts = looked.verdicts(list(looked.systems)[1:], BASE)
    assert told(verdicts) == "1 better, 0 worse, 2 not distinguishable"


def test_every_method_that_does_not_gain_is_examined():
    """Its mean over the draws that it shares with supervised-only is not above that one's."""
    found = [r for r in records.load(records.COMMITTED) if r["config"]["protocol"] == "mosaic-32"]
    stand = Standings.of(found, "mosaic-32", (0, 1, 2))
    behind = [n for n, c in stand.verdicts(list(METHODS), BASE).items() if c.difference.mean <= 0]
    grid = read(records.COMMITTED.parent / "grids" / "mosaic-examined.yaml")
    assert {c.method for c in grid} == set(behind)
    assert all(changed(found, grid, (0, 1, 2)).results.values()), "not run"


def test_stale_records_are_marked(found):
    found[0]["method_source"] = "older"
    table = Standings.of(found, "mosaic-32", draws=(0, 1, 2)).table(["supervised", "cct"], BASE)
    assert [each[0] for each in table.rows] == ["supervised*", "cct"]


def test_classes_that_labels_teach_and_those_they_hardly_teach_are_counted_apart(found):
    iou = {"supervised": [90.0, 50.0, 2.0, None, 1.0], "cct": [91.0, 52.0, 0.0, None, 0.0]}
    iou |= {"gct": [80.0, 50.0, 4.0, None, 1.0], "mean_teacher": [90.0, 50.0, 2.1, None, 0.0]}
    some = [r for r in found if r["config"]["method"] in iou and r["config"]["draw"] < 2]
    for r in some:
        r["networks"]["net"]["last"]["iou"] = iou[r["config"]["method"]]
    said = Standings.of(some, "mosaic-32", draws=(0, 1)).classes([*iou, "gps"])
    assert said.endswith(
        "1 of 3 systems over the 2 classes that it knows best, 1 over the other 2."
    )


def test_what_few_draws_need_is_the_interval_of_the_median_system(stand):
    table = needed_table(stand.verdicts(list(LEVELS), BASE), 3)
    assert "for the median one of 0.1. The largest mean difference here is 6.0" in table.caption
    assert [each[0] for each in table.rows] == [2, 3, 5, 10, 20]
    assert table.rows[1][1:3] == ["2.48", "0.3"], "4.303 / sqrt(3), times 0.105"
    assert table.rows[1][3] == "5.12", "t beyond 0.05 / 8, over sqrt(3)"
    nothing = needed_table({}, 0)
    assert nothing.rows[0][2] == "" and "no system shares" in nothing.caption


def test_presets_are_held_against_their_own_paper(found):
    found += [record("cct, code", d, v - 1) for d, v in enumerate(LEVELS["cct"])]
    found += [record("supervised", d, 40.0, batch=16) for d in range(2)]
    table = Standings.of(found, "mosaic-32", draws=(0, 1, 2)).presets()
    assert row(table, "cct, code")["minus paper"] == "-1.0 [-1.0, -1.0]"
    assert row(table, "supervised, doubled batch")["minus paper"].startswith("+9.0")
    assert len(table.rows) == 2 and "gct, code" in table.caption


def test_elsewhere_has_a_column_where_three_have_run_and_its_agreement(found, stand):
    names = list(LEVELS)
    found += [
        record(n, d, 2 * v, "mosaic-64")
        for n in ("supervised", "cct", "gct")
        for d, v in enumerate(LEVELS[n])
    ]
    found += [record("gps", 0, 50.0, "mosaic-16"), record("gps", 0, 1.0, "mosaic-smoke")]
    assert places(found) == [("mosaic-32", 32), ("mosaic-64", 64)]  # three methods, not smoke
    table = stand.elsewhere(stand.everywhere(found, (0, 1, 2)), names)
    assert table.header == ["", "mosaic-32, 32 labels", "mosaic-64, 64 labels"]
    assert row(table, "cct")["mosaic-64, 64 labels"] == "72.1 ± 7.0 (3)"
    assert not row(table, "cutmix_seg")["mosaic-64, 64 labels"]
    assert stand.place == "mosaic-32, 32 labels" and stand.place in stand.everywhere(found, (0,))
    last = row(table, "Kendall's tau (p)")
    assert last["mosaic-64, 64 labels"] == "+1.00 (0.33), n = 3"


def test_orders_are_those_of_published_columns_with_three_of_ours(stand):
    (sixteenth, eighth, *_) = found = orders.of(stand)
    assert {o.place[0] for o in found} == {"ke2020"} and len(found) == 4
    assert list(sixteenth.printed) == ["cct", "gct", "mean_teacher", "supervised"]
    assert sixteenth.agreement.tau == 1 and sixteenth.single == pytest.approx([1, 2 / 3, 1])
    assert eighth.agreement.tau == pytest.approx(2 / 3), "GCT and CCT have changed places"
    assert sum(sixteenth.duels.values()) == 6 and eighth.duels["worse"] >= 1
    counts = sum((o.duels for o in found), Counter())
    assert f"**confirm {counts['better']}, contradict {counts['worse']}**" in orders.told(found)
    assert "can reach is 0.083 with 4 systems" in orders.told(found)
    table = orders.table(found)
    assert table.rows[0][2] == "cct > gct > mean_teacher > supervised"
    column = orders.beside(stand, sixteenth.place)
    assert row(column, "SupOnly")["our difference"] == ""
    assert row(column, "CCT")["our difference"].startswith("+3.0")


def test_cost_counts_passes_steps_and_batches(found):
    found += [record("supervised", d, 40.0, batch=16) for d in range(3)]
    stand = Standings.of(found, "mosaic-32", draws=(0, 1, 2))
    assert stand.price("supervised") == 1 and stand.seconds("mean_teacher") == 1.5
    assert stand.price("supervised, doubled batch") == 2
    assert stand.price("mean_teacher") == pytest.approx(7 / 3), "2 + 1 forward, 2 backward"
    table = stand.cost(["supervised", "mean_teacher"])
    mean_teacher = row(table, "mean_teacher")
    assert mean_teacher["times supervised"] == "2.3" and mean_teacher["teaching"] == "1"
    assert {len(each) for each in (*table.rows, table.header)} == {8} and "CPU" in table.caption
    alone = Standings.of([record("cct", 0, 33.0)], "mosaic-32", draws=(0, 1, 2)).cost(
        ["cct", "gct"]
    )
    assert row(alone, "cct")["last mIoU"] == "33.0" and row(alone, "cct")["times supervised"] == ""
    assert row(alone, "gct")["last mIoU"] == "not run" and row(alone, "gct")["seconds"] == ""


def test_nothing_has_run():
    stand = Standings.of([], "camvid-23", draws=(0, 1))
    assert orders.told([]).startswith("No published column")
    assert stand.full == {} and orders.of(stand) == [] and stand.presets().rows == []
    assert {each[1] for each in stand.table(list(stand.systems), BASE, "gps").rows} == {"not run"}
