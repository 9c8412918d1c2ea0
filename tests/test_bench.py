"""s4 bench step and eval: figures that add up, records, one line for bad input."""

from __future__ import annotations

import json
import os
from concurrent.futures import Executor, Future

import pytest
import torch

from s4lib import mixing
from s4lib.bench import commands, tables
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
    text = tables.steps(tmp_path)
    assert f"{row['images_per_second']:.1f}" in text and record["versions"]["torch"] in text
    assert "bf16, compiled | | | | | |" in text  # no GPU has measured it yet


def test_work_grows_with_the_crop_as_it_must():
    small, large = (
        bench_step(Config(net="tiny", crop=(s, s), batch=2, device="cpu"), 1) for s in (32, 64)
    )
    work = [row["tflops"] * row["step_ms"] for row in (small, large)]
    assert 3.5 < work[1] / work[0] < 4.1  # all but the pooled branch of the ASPP


def test_a_stopped_suite_goes_on_and_a_row_without_room_is_a_row(tmp_path, capsys, monkeypatch):
    rows = [{"net": "tiny", "crop": [32, 32], "method": m} for m in ("supervised", "mean_teacher")]
    monkeypatch.setattr(commands, "SUITES", {**commands.SUITES, "cpu": rows})
    path = tmp_path / "bench-step-cpu.json"
    arguments = ["bench", "step", *TINY, "--suite", "cpu", "--count", "1", "--out", str(path)]

    def stopped(measure, config, number):
        if config.method == "mean_teacher":
            raise KeyboardInterrupt
        return bench_step(config, number)

    with monkeypatch.context() as patch:
        patch.setattr(commands, "_alone", stopped)
        assert main(arguments) == 130
    first = json.loads(path.read_text())["rows"]
    assert [row["method"] for row in first] == ["supervised"]

    def full(config: Config, number: int) -> dict:
        raise torch.OutOfMemoryError("no room")

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(commands, "ProcessPoolExecutor", Here)
        patch.setattr(commands, "bench_step", full)
        assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "after 1 of 2 rows" in said and "mean_teacher tiny [32, 32], off: out of memory" in said
    both = json.loads(path.read_text())["rows"]
    assert both[0] == first[0] and both[1]["failed"] == "out of memory"
    assert "| mean_teacher | tiny | 32 x 32 | off | out of memory | | | | |" in tables.steps(
        tmp_path
    )


@pytest.mark.slow
def test_a_row_of_a_suite_is_measured_in_a_process_of_its_own():
    config = Config(net="tiny", crop=(32, 32), batch=2, device="cpu")
    row = commands._alone(process_of, config, 7)
    assert row == {"net": "tiny", "number": 7, "pid": row["pid"]} and row["pid"] != os.getpid()


def process_of(config: Config, number: int) -> dict:
    return {"net": config.net, "number": number, "pid": os.getpid()}


class Here(Executor):
    """As a pool of one process, without the process."""

    def __init__(self, *arguments):
        pass

    def submit(self, call, *arguments):
        future = Future()
        try:
            future.set_result(call(*arguments))
        except torch.OutOfMemoryError as error:
            future.set_exception(error)
        return future


def test_evaluation_is_measured(tmp_path, capsys):
    path = tmp_path / "eval.json"
    arguments = ["bench", "eval", *TINY, "--method", "mean_teacher", "--size", "32", "40"]
    assert main([*arguments, "--count", "3", "--out", str(path)]) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert row["networks"] == 2 and row["images_per_second"] > 0
    path.rename(tmp_path / "bench-eval.json")
    text = tables.evaluations(tmp_path)
    assert f"| mean_teacher | tiny | 2 | whole | 32 x 40 | {row['images_per_second']:.1f} |" in text


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
