"""s4 bench ranks: two gloo processes are measured apart and together; the model's arithmetic."""

from __future__ import annotations

import json

import pytest
from torch import nn

from s4lib.bench_ranks import predicted
from s4lib.bench_step import CLASSES
from s4lib.build import build_method
from s4lib.cli import main
from s4lib.config import Config


@pytest.mark.parametrize(
    ("calls", "sent", "ranks", "expected"),
    [
        (0, 0, 1, 0.5),
        (9, 1e9, 1, 0.5),  # alone nothing is exchanged
        (10, 0, 2, 0.5 + 10 * 1e-3),
        (0, 4e8, 2, 0.5 + 0.2),  # half of it twice
        (10, 4e8, 8, 0.5 + 10 * 1e-3 + 2 * 7 / 8 * 0.2),
    ],
)
def test_time_is_computing_plus_calls_plus_bytes(calls, sent, ranks, expected):
    found = predicted(0.5, calls, sent, ranks, latency=1e-3, bandwidth=2e9)
    assert found == pytest.approx(expected)


def test_two_processes_are_measured_apart_and_together(tmp_path, capsys):
    path = tmp_path / "ranks.json"
    arguments = ["--ranks", "2", "--batches", "1", "--net", "tiny", "--crop", "32", "32"]
    arguments += ["--method", "supervised", "--device", "cpu", "--count", "2", "--out", str(path)]
    assert main(["bench", "ranks", *arguments]) == 0
    assert "2 x 1 images, SyncBN" in capsys.readouterr().out
    record = json.loads(path.read_text())
    apart, synced, own = record["rows"]
    student = build_method(Config(net="tiny"), CLASSES).student
    layers = sum(isinstance(m, nn.BatchNorm2d) for m in student.modules())
    gradients = 4 * sum(p.numel() for p in student.parameters())
    assert [row["gradient_bytes"] for row in record["rows"]] == [gradients] * 3
    assert (apart["calls"], apart["bytes"], apart["average_ms"]) == (0, 0, 0)
    assert (own["calls"], own["bytes"]) == (2, gradients + 4)  # and the count of labeled pixels
    assert synced["calls"] == own["calls"] + 2 * layers  # forward and backward
    for row in record["rows"]:
        assert row["ranks"] == len(row["each_ms"]) == 2
        assert row["step_ms"] == max(row["each_ms"]) > 0
    assert 0 < own["average_ms"] < own["step_ms"]
    assert record["links"]["2"]["latency"] > 0 and record["links"]["2"]["bandwidth"] > 1e6
    assert record["config"]["net"] == "tiny" and record["versions"]["torch"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--ranks", "0"], "ranks=0"),
        (["--ranks", "9999"], "ranks=9999"),
        (["--batches", "0"], "batches=0"),
        (["--count", "0"], "count=0"),
        (["--net", "nope"], "net='nope'"),
    ],
)
def test_bad_input_is_one_line(refused, arguments, word):
    assert word in refused("bench", "ranks", *arguments, "--device", "cpu")
