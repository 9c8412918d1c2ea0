"""s4 bench ranks: two gloo processes are measured apart and together; the model's arithmetic."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from s4lib.bench.step import CLASSES
from s4lib.book.scaling import batch_statistics, checked, measured, predicted, rate
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


@pytest.mark.slow
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
    path.rename(tmp_path / "bench-ranks-tiny.json")
    rows = measured(tmp_path).rows
    assert [row[3] for row in rows[:3]] == ["apart", "SyncBN", "own BN"]
    assert len(rows) == 3 + 1 and rows[-1][1:] == [""] * 8  # no GPU has measured it yet


def row(together: bool, sync_bn: bool, batch: int, ms: float, calls: int = 0, sent: int = 0):
    each = [ms, ms / 2]
    counts = {"calls": calls, "bytes": sent, "images": 2 * batch}
    about = {"ranks": 2, "together": together, "sync_bn": sync_bn, "batch": batch}
    return {**about, **counts, "step_ms": ms, "each_ms": each}


def test_the_model_is_calibrated_on_one_point_and_checked_on_the_others():
    rows = [row(False, False, b, 10.0 * b) for b in (1, 2)]
    rows += [row(True, True, b, 10.0 * b + 40 + 1, 20, 10**6) for b in (1, 2)]  # 2 ms a call
    rows += [row(True, False, b, 10.0 * b + 4 + 1, 2, 10**6) for b in (1, 2)]
    record = {"rows": rows, "links": {"2": {"latency": 1e-3, "bandwidth": 1e9}}}  # 1 ms a MB
    table, found = checked(record)
    assert found["point"] is rows[2] and found["waiting"] == pytest.approx(2e-3)
    assert found["worst"]["SyncBN"] == pytest.approx((100 * 20 / 51, 0))
    assert found["worst"]["own BN"] == pytest.approx((100 * 2 / 15, 0))
    assert [cells[-1] for cells in table.rows][:2] == ["the point", "61.0 (+0 %)"]
    assert rate(rows[0]) == pytest.approx(2e3 / 10 + 2e3 / 5)  # apart: each at its own pace
    assert rate(rows[2]) == pytest.approx(2 * 2e3 / 51)


def test_statistics_of_larger_batches_vary_less():
    features = torch.randn(64, 8, 5, 5, generator=torch.Generator().manual_seed(0))
    pixels = batch_statistics(features, [1, 4, 16], draws=2000)["mean"]
    assert pixels == pytest.approx([0.2, 0.1, 0.05], rel=0.15)  # 1 / sqrt(size * 25)
    images = features[:, :, :1, :1].expand(-1, -1, 5, 5)  # all places of an image are alike
    whole = batch_statistics(images, [1, 4, 16], draws=2000)["mean"]
    assert whole == pytest.approx([1.0, 0.5, 0.25], rel=0.1)
    assert batch_statistics(images, [1])["variance"] == [pytest.approx(0, abs=1e-9)]
