"""s4 bench step and eval: figures that add up, records, one line for bad input."""

from __future__ import annotations

import json

import pytest
import torch

from s4lib import mixing
from s4lib.bench.commands import table
from s4lib.bench.step import bench_step
from s4lib.cli import main
from s4lib.config import Config
from s4lib.methods import cutmix_seg

TINY = ["--net", "tiny", "--batch", "4", "--unlabeled_batch", "4", "--device", "cpu"]


def test_steps_are_measured_by_part_and_recorded(tmp_path, capsys):
    path = tmp_path / "bench-step-tiny.json"
    before = torch.Tensor.backward, mixing.Mix.__call__, cutmix_seg.ema
    arguments = ["bench", "step", *TINY, "--method", "cutmix_seg", "--crop", "32", "32"]
    assert main([*arguments, "--count", "2", "--out", str(path)]) == 0
    assert (torch.Tensor.backward, mixing.Mix.__call__, cutmix_seg.ema) == before
    assert "cutmix_seg tiny [32, 32] x 8" in capsys.readouterr().out
    record = json.loads(path.read_text())
    (row,) = record["rows"]
    parts = row["parts_ms"]
    wanted = ["data", "mixing", "forward teacher", "forward student", "backward", "optimizer"]
    assert set(parts) == {*wanted, "EMA", "rest"} and min(parts.values()) > 0
    assert parts["backward"] > parts["forward teacher"]
    assert row["images_per_second"] == pytest.approx(8e3 / row["step_ms"])
    assert 0 < row["share_of_matmul"] < 1 and row["compile"] is False
    text = table(tmp_path)
    assert f"{row['images_per_second']:.1f}" in text and record["versions"]["torch"] in text
    assert "bf16, compiled | | | | | |" in text  # no GPU has measured it yet


def test_work_grows_with_the_crop_as_it_must():
    small, large = (
        bench_step(Config(net="tiny", crop=(s, s), batch=2, device="cpu"), 1) for s in (32, 64)
    )
    work = [row["tflops"] * row["step_ms"] for row in (small, large)]
    assert 3.5 < work[1] / work[0] < 4.1  # all but the pooled branch of the ASPP


def test_evaluation_is_measured(tmp_path, capsys):
    path = tmp_path / "eval.json"
    arguments = ["bench", "eval", *TINY, "--method", "mean_teacher", "--size", "32", "40"]
    assert main([*arguments, "--count", "3", "--out", str(path)]) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert row["networks"] == 2 and row["images_per_second"] > 0


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["step", "--count", "0"], "steps=0"),
        (["step", "--net", "nope"], "net='nope'"),
        (["step", "--suite", "nope"], "suite"),
        (["eval", "--evaluation", "nope"], "evaluation='nope'"),
    ],
)
def test_bad_input_is_one_line(refused, arguments, word):
    assert word in refused("bench", *arguments, "--device", "cpu")
