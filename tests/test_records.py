"""Records: loading, paired differences, and what may be claimed from them."""

from __future__ import annotations

import copy
import json
import math
import re

import pytest
from scipy import stats

from s4lib import records
from s4lib.build import method_source


def record(miou: float, draw: int = 0, seed: int = 0, method: str = "supervised") -> dict:
    return {
        "run_id": f"{method}-{draw}-{seed}",
        "config": {"draw": draw, "seed": seed, "method": method, "dataset": "mosaic"},
        "deployed": "student",
        "networks": {
            "student": {"last": {"miou": miou}, "best": {"miou": miou + 1}},
            "teacher": {"last": {"miou": miou + 2}, "best": {"miou": miou + 3}},
        },
        "method_source": method_source(method, "mosaic"),
    }


OURS = [record(v, d) for d, v in enumerate([41.0, 44.5, 43.0, 47.0, 42.5])]
BASE = [record(v, d) for d, v in enumerate([40.0, 42.0, 42.5, 43.0, 41.5])]


def test_score_takes_network_and_time():
    r = record(50.0)
    assert records.score(r) == 50 and records.score(r, when="best") == 51
    assert records.score(r, "teacher") == 52 and records.score(r, "teacher", "best") == 53


def test_summary_is_mean_and_sample_standard_deviation():
    s = records.summary([1.0, 2.0, 6.0])
    assert s.mean == 3 and s.std == pytest.approx(math.sqrt(7)) and s.n == 3
    assert str(s) == "3.0 ± 2.6"
    assert str(records.summary([2.0])) == "2.0"


@pytest.mark.parametrize("level", [0.9, 0.95, 0.99])
def test_the_paired_interval_is_that_of_the_t_test(level):
    difference = records.paired(OURS, BASE, level)
    ours, base = ([records.score(r) for r in side] for side in (OURS, BASE))
    wanted = stats.ttest_rel(ours, base).confidence_interval(level)
    assert difference.low == pytest.approx(wanted.low, abs=1e-9)
    assert difference.high == pytest.approx(wanted.high, abs=1e-9)
    assert difference.mean == pytest.approx(1.8)
    assert difference.values == pytest.approx((1.0, 2.5, 0.5, 4.0, 1.0))


def test_verdicts_follow_the_interval():
    def verdict(*values: float) -> str:
        ours = [record(40 + v, d) for d, v in enumerate(values)]
        return records.paired(ours, [record(40.0, d) for d in range(len(values))]).verdict

    assert verdict(1.0, 1.1, 0.9) == "better"
    assert verdict(-1.0, -1.1, -0.9) == "worse"
    assert verdict(1.0, -0.5, 0.9) == "not distinguishable"
    assert verdict(0.0, 0.0, 0.0) == "not distinguishable"
    assert verdict(5.0) == "not distinguishable"


def test_one_pair_has_no_interval():
    text = str(records.paired(OURS[:1], BASE[:1]))
    assert text == "+1.0 (one pair, no interval)"
    assert str(records.paired(OURS, BASE)).startswith("+1.8 [")


def test_pairs_are_matched_by_draw_and_seed_whatever_the_order():
    assert records.paired(OURS[::-1], BASE) == records.paired(OURS, BASE)
    assert records.paired(OURS[1:], BASE[:4]).values == pytest.approx((2.5, 0.5, 4.0))


def test_nothing_in_common_and_ambiguous_records_are_refused():
    with pytest.raises(ValueError, match="no label draw and seed"):
        records.paired(OURS[:1], BASE[1:])
    with pytest.raises(ValueError, match="two records for draw 0, seed 0"):
        records.paired([*OURS, record(1.0)], BASE)


def test_a_record_is_stale_when_its_methods_file_has_changed():
    fresh = record(40.0)
    assert not records.stale(fresh)
    assert records.stale({**fresh, "method_source": "000000000000"})


def test_records_are_loaded_from_files_and_run_folders(tmp_path):
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(r) + "\n" for r in OURS[:2]))
    for r in BASE[2:4]:
        folder = tmp_path / r["run_id"]
        folder.mkdir()
        (folder / "record.json").write_text(json.dumps(r))
    found = records.load(tmp_path)
    assert sorted(r["run_id"] for r in found) == [f"supervised-{d}-0" for d in range(4)]
    assert records.load(tmp_path / "some.jsonl") == OURS[:2]
    assert records.load(tmp_path / "nowhere") == []


def test_a_file_of_records_does_not_say_where_data_lay(tmp_path):
    mine = copy.deepcopy(OURS[0])
    mine["config"]["data_root"] = "/home/me/CamVid"
    records.save([mine], tmp_path / "a.jsonl")
    (saved,) = records.load(tmp_path)
    assert saved == {**mine, "config": mine["config"] | {"data_root": ""}}
    assert mine["config"]["data_root"], "the run's own record keeps it"


def test_files_of_committed_records_are_small_and_share_no_run():
    files = sorted(records.COMMITTED.glob("*.jsonl"))
    assert files and all(file.stat().st_size < 600 * 1024 for file in files)
    runs = [record["run_id"] for file in files for record in records.load(file)]
    assert len(runs) == len(set(runs))


def test_committed_records_name_no_path_of_a_machine():
    files = [*records.COMMITTED.glob("*.json*")]
    assert files
    for file in files:
        assert not re.search(r'": "(/|~|[A-Z]:)', file.read_text()), file.name


def test_the_last_of_equal_records_counts(tmp_path):
    older, newer = record(1.0), record(2.0)
    (tmp_path / "a.jsonl").write_text(json.dumps(older) + "\n" + json.dumps(newer) + "\n")
    assert records.load(tmp_path) == [newer]


@pytest.mark.parametrize("line", ["{", "[1]", "3", '{"config": {}}', '"run"'])
def test_a_line_that_is_no_record_is_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_text(json.dumps(OURS[0]) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: not a record"):
        records.load(tmp_path)


def test_a_finished_run_has_a_full_record(trained_run):
    (found,) = records.load(trained_run.parent)
    assert found["run_id"] == trained_run.name
    assert set(found["networks"]) == {"student", "teacher"}
    for network in found["networks"].values():
        for when in ("last", "best"):
            assert len(network[when]["iou"]) == len(found["classes"]) == 8
            assert 0 <= network[when]["miou"] <= 100
        assert network["best"]["miou"] >= network["last"]["miou"]
    assert found["labeled"] == 8 and found["unlabeled"] == 12
    assert found["steps"] == 6 and found["images_seen"] == 48
    assert found["world_size"] == 1 and found["seconds"] > 0
    assert found["evaluation"]["rule"] == found["evaluation"]["mode"] == "whole"
    assert (found["evaluation"]["part"], found["evaluation"]["images"]) == ("val", 6)
    assert len(found["split_sha256"]) == 64 and not records.stale(found)
    assert set(found["versions"]) >= {"python", "torch", "timm", "numpy"}
    assert copy.deepcopy(found) == json.loads((trained_run / "record.json").read_text())


def test_like_takes_draws_and_seeds_of_one_setting_only():
    from s4lib.protocols import protocol

    def made(**changes):
        config = protocol("mosaic-32", **changes)
        return {"run_id": config.run_id, "config": config.to_dict(), "made": len(changes)}

    wanted = [made(draw=d, seed=d) for d in (1, 0)]
    others = [made(draw=0, batch=16), made(draw=0, method="mean_teacher")]
    again = {**wanted[0], "made": "later"}
    found = records.like([*wanted, *others, again], protocol("mosaic-32", data_root="x"))
    assert [r["config"]["draw"] for r in found] == [0, 1] and found[1]["made"] == "later"
