"""Records of older code stay valid only if a repetition gives the same numbers."""

from __future__ import annotations

import json

import pytest

from s4lib import cli, records, renew
from s4lib.trainer import fit


@pytest.fixture
def file(tiny, tmp_path):
    """Two draws of one setting and one of another, all made by older code."""
    made = [fit(tiny(epochs=1, draw=d), out=tmp_path / "runs") for d in (0, 1)]
    made += [fit(tiny(epochs=1, method="mean_teacher"), out=tmp_path / "runs")]
    file = tmp_path / "some.jsonl"
    file.write_text("".join(json.dumps({**r, "method_source": "older"}) + "\n" for r in made))
    return file


@pytest.mark.slow
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_what_comes_out_the_same_is_renewed_and_what_does_not_stays_stale(file, capsys, jobs):
    old = records.load(file)
    assert all(map(records.stale, old))
    wrong = json.loads(json.dumps(old[2]))
    wrong["networks"]["teacher"]["last"]["miou"] += 1e-9
    file.write_text("".join(json.dumps(r) + "\n" for r in [*old[:2], wrong]))
    assert cli.main(["renew", str(file), "--jobs", jobs]) == 1
    now = records.load(file)
    assert [records.stale(r) for r in now] == [False, False, True]
    assert {r["renewed"]["by"] for r in now[:2]} <= {r["run_id"] for r in old[:2]}
    assert all(r["renewed"]["from"] == "older" for r in now[:2])
    assert [r["networks"] for r in now[:2]] == [r["networks"] for r in old[:2]]
    assert now[2] == wrong
    assert "3 stale, 2 runs to repeat" in capsys.readouterr().out
    file.write_text("".join(json.dumps(r) + "\n" for r in now[:2]))
    assert cli.main(["renew", str(file)]) == 0  # nothing left to do
    assert "0 stale, 0 runs to repeat" in capsys.readouterr().out


def test_a_run_is_repeated_where_the_data_lies_now(tiny, monkeypatch):
    monkeypatch.setattr(renew, "fit", lambda config, out: {"data_root": config.data_root})
    assert renew._repeat({"config": tiny().to_dict()}, "CamVid") == {"data_root": "CamVid"}


def test_a_file_that_is_not_there_is_named(tmp_path, capsys):
    assert cli.main(["renew", str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl: no such file of records" in capsys.readouterr().err
