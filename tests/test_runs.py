"""Runs from a notebook: what is recorded is not trained again, what is stale or missing is."""

from __future__ import annotations

import contextlib
import json

import pytest

from s4lib import records, runs
from s4lib.run_folder import RunFolder


@pytest.fixture
def trainings(monkeypatch) -> list[str]:
    """Ids of the runs that were trained, in order."""
    trained, fit = [], runs.fit

    def counted(config, **options):
        trained.append(config.run_id)
        return fit(config, **options)

    monkeypatch.setattr(runs, "fit", counted)
    return trained


def test_a_recorded_run_is_loaded_and_results_keep_their_order(tiny, tmp_path, trainings):
    two = [tiny(epochs=1, draw=d) for d in (1, 0)]
    first = runs.run(two, out=tmp_path)
    again = runs.run(two[::-1], out=tmp_path)
    assert trainings == [c.run_id for c in two]
    assert first == again[::-1]
    assert [r["config"]["draw"] for r in first] == [1, 0]


def test_a_stale_run_is_trained_again(tiny, tmp_path, trainings):
    config = tiny(epochs=1)
    record = runs.run([config], out=tmp_path)[0]
    path = tmp_path / config.run_id / "record.json"
    path.write_text(json.dumps({**record, "method_source": "older"}))
    assert runs.run([config], out=tmp_path)[0]["method_source"] == record["method_source"]
    assert len(trainings) == 2


def test_a_committed_record_will_do_where_no_weights_are_needed(
    tiny, tmp_path, trainings, monkeypatch
):
    config = tiny(epochs=1)
    record = runs.run([config], out=tmp_path / "elsewhere")[0]
    (tmp_path / "book").mkdir()
    lines = tmp_path / "book" / "records.jsonl"
    lines.write_text(json.dumps({**record, "seconds": 1234.5}) + "\n")
    monkeypatch.setattr(records, "COMMITTED", tmp_path / "book")
    here = tmp_path / "here"
    assert runs.run([config], out=here, weights=False)[0]["seconds"] == 1234.5
    assert not here.exists() and len(trainings) == 1
    assert runs.run([config], out=here)[0]["seconds"] != 1234.5  # weights are wanted: trained
    assert runs.run([config], out=here, weights=False)[0]["seconds"] != 1234.5  # one's own first
    assert len(trainings) == 2
    lines.write_text(json.dumps({**record, "method_source": "older"}) + "\n")
    runs.run([config], out=tmp_path / "third", weights=False)
    assert len(trainings) == 3


def test_a_run_that_another_process_trains_is_left_for_later(
    tiny, tmp_path, trainings, monkeypatch
):
    one, two = tiny(epochs=1), tiny(epochs=1, draw=1)
    elsewhere, fit = contextlib.ExitStack(), runs.fit
    elsewhere.enter_context(RunFolder(tmp_path, one).locked(wait=False))

    def then_it_ends(config, **options):
        with elsewhere.pop_all():
            return fit(config, **options)

    monkeypatch.setattr(runs, "fit", then_it_ends)
    found = runs.run([one, two], out=tmp_path)
    assert trainings == [two.run_id, one.run_id]
    assert [r["run_id"] for r in found] == [one.run_id, two.run_id]


def test_bad_input_is_found_before_anything_is_trained(tiny, tmp_path, trainings):
    with pytest.raises(ValueError, match="preset='nope'"):
        runs.run([tiny(epochs=1), tiny(preset="nope")], out=tmp_path)
    assert trainings == []
