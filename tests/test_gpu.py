"""On a CUDA device: precision, NCCL, agreement with the CPU. Skipped where there is none."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from s4lib.bench.commands import SUITES
from s4lib.bench.step import bench_step
from s4lib.build import build_method
from s4lib.config import Config
from s4lib.method import Batch, Clock, Crop
from s4lib.methods import METHODS
from s4lib.minimizer import Minimizer
from s4lib.run_folder import RunFolder
from s4lib.trainer import Run, fit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("method", METHODS)
def test_an_epoch_trains_in_every_precision(tiny, tmp_path, method, amp):
    config = tiny(method=method, amp=amp, device="cuda", net="light", epochs=1)
    record = fit(config, out=tmp_path)
    state = torch.load(tmp_path / config.run_id / "last.pt", weights_only=True)
    assert all(torch.isfinite(v).all() for v in state["method"].values())
    assert record["peak_memory_bytes"] > 0 and "CPU" not in record["device"]
    assert state["minimizer"]["scaler"].get("scale", 1.0) >= 1.0


@pytest.mark.parametrize("method", METHODS)
def test_losses_agree_with_the_cpu(tiny, method):
    losses = []
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        for device in ("cpu", "cuda"):
            config = tiny(method=method, device=device)
            built = build_method(config, 8).to(device)
            minimizer = Minimizer(built, config, torch.device(device))
            g = torch.Generator().manual_seed(0)
            image, weak, strong = (torch.randn(4, 3, 32, 32, generator=g) for _ in range(3))
            label = torch.randint(0, 8, (4, 32, 32), generator=g)
            valid = torch.ones(4, 32, 32, dtype=torch.bool)
            move = lambda x, device=device: x.to(device)  # noqa: E731
            views = (move(strong),) * built.strong_views
            batch = Batch(move(image), move(label), move(weak), views, move(valid), move(strong))
            second = Crop(batch.weak.flip(-1), batch.strong, batch.valid)
            batch = batch._replace(weak_label=batch.label, second=second)
            torch.manual_seed(0)
            minimizer.begin(Clock(0, 1, 1))
            step = built.step(batch, Clock(0, 1, 1), minimizer)
            losses.append({k: v.cpu() for k, v in step.items()})
    finally:
        torch.backends.cudnn.allow_tf32 = allowed
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-4)


def test_a_resumed_run_goes_on(tiny, tmp_path):
    class Killed(Exception):
        pass

    def kill(done: int, total: int, text: str) -> None:
        if done == 4:
            raise Killed

    config = tiny(method="cutmix_seg", amp="fp16", device="cuda")
    with pytest.raises(Killed):
        fit(config, out=tmp_path, progress=kill)
    record = fit(config, out=tmp_path, resume=True)
    lines = (tmp_path / config.run_id / "metrics.jsonl").read_text().splitlines()
    assert record["steps"] == 6 and len(lines) == 2


def test_one_process_under_nccl_trains(tiny, tmp_path):
    config = tiny(method="mean_teacher", device="cuda", net="light", epochs=1)
    arguments = ["--net", "light", "--method", "mean_teacher", "--device", "cuda"]
    for name in ("labeled", "unlabeled", "eval_images", "epochs", "batch", "unlabeled_batch"):
        arguments += [f"--{name}", str(getattr(config, name))]
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node=1", "-m", "s4lib"]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "train", *arguments, "--size", "[32,32]"]
        + ["--out", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "mIoU" in done.stdout
    assert (tmp_path / config.run_id / "record.json").exists()


@pytest.mark.parametrize("amp", ["off", "fp16"])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_never_waits_for_the_device(tiny, tmp_path, method, amp):
    config = tiny(method=method, amp=amp, device="cuda")
    run = Run(config, RunFolder(tmp_path, config), torch.device("cuda"))
    for step in range(2):  # kernels are chosen, caches filled
        run._step(Clock(step, run.steps_per_epoch, config.epochs))
    torch.cuda.set_sync_debug_mode("error")
    try:
        run._step(Clock(2, run.steps_per_epoch, config.epochs))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
def test_bf16_compiled_is_twice_as_fast_in_three_fifths_of_the_memory():
    plain, fast = (
        bench_step(
            Config.from_dict({**SUITES["voc"][0], "crop": [513, 513], "device": "cuda", **changes})
        )
        for changes in ({}, {"amp": "bf16", "compile": True})
    )
    assert fast["compile"] and fast["images_per_second"] >= 2 * plain["images_per_second"]
    assert fast["peak_memory_bytes"] <= 0.6 * plain["peak_memory_bytes"]
    assert fast["share_of_matmul"] >= 0.35
