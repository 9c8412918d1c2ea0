"""The trainer: checkpoints, evaluation, precision, and whatever may interrupt a run."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import equal, tiny_config

from s4lib import progress, trainer
from s4lib.cli import main
from s4lib.data.images import Images
from s4lib.data.loader import Loader
from s4lib.data.views import Views
from s4lib.losses import IGNORE
from s4lib.method import trainable
from s4lib.methods.supervised import Supervised
from s4lib.run_folder import Busy, RunFolder
from s4lib.trained import load
from s4lib.trainer import Run, fit

TESTS = Path(__file__).parent
CPU = torch.device("cpu")


def lines(folder: Path, kind: str) -> list[dict]:
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if line["kind"] == kind]


def state_of(folder: Path) -> dict:
    """The checkpoint without what depends on the clock."""
    state = torch.load(folder / "last.pt", weights_only=True)
    return {k: v for k, v in state.items() if k != "seconds"}


def assert_equal(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    assert [key for key in a if not equal(a[key], b[key])] == []


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return state_of(folder)["method"]


# ---------------------------------------------------------------- checkpoints and evaluation


def test_every_network_is_evaluated_and_last_and_best_are_noted(tiny, tmp_path):
    config = tiny(method="mean_teacher", epochs=4, lr=0.02)
    record = fit(config, out=tmp_path)
    folder = tmp_path / config.run_id
    evaluations = lines(folder, "eval")
    assert [line["epoch"] for line in evaluations] == [1, 2, 3, 4]
    assert [line["step"] for line in evaluations] == [3, 6, 9, 12]
    for name in ("student", "teacher"):
        values = [line["miou"][name] for line in evaluations]
        network = record["networks"][name]
        assert network["last"]["miou"] == values[-1]
        assert network["best"]["miou"] == max(values)
        assert network["best"]["epoch"] == 1 + values.index(max(values))


def test_best_holds_the_weights_of_the_best_evaluation(tiny, tmp_path, monkeypatch):
    config = tiny(epochs=3)
    scripted = iter([10.0, 30.0, 20.0])

    def scores(counts: dict, absent: str) -> dict:
        return {"student": {"miou": next(scripted), "iou": [None] * 8}}

    monkeypatch.setattr(trainer, "scores", scores)
    seen = {}

    def keep(done: int, total: int, text: str) -> None:
        if done % 3 == 0:
            seen[done // 3] = weights_of(tmp_path / config.run_id)

    record = fit(config, out=tmp_path, progress=keep)
    assert record["networks"]["student"]["best"]["epoch"] == 2
    best = torch.load(tmp_path / config.run_id / "best.pt", weights_only=True)
    assert_equal(best, seen[2])
    assert not torch.equal(
        best["student.classifier.0.0.weight"], seen[3]["student.classifier.0.0.weight"]
    )


def test_evaluation_is_periodic_and_always_at_the_end(tiny, tmp_path):
    config = tiny(epochs=5, eval_every=2)
    fit(config, out=tmp_path)
    assert [line["epoch"] for line in lines(tmp_path / config.run_id, "eval")] == [2, 4, 5]


def test_training_lines_have_no_gaps_and_the_poly_rate(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "LOG_EVERY", 2)
    config = tiny(epochs=2, lr=0.01)
    fit(config, out=tmp_path)
    found = lines(tmp_path / config.run_id, "train")
    assert [line["step"] for line in found] == [2, 4, 6]
    rates = [0.01 * (1 - step / 6) ** 0.9 for step in (1, 3, 5)]
    assert [line["lr"] for line in found] == pytest.approx(rates)
    assert all(line["sup"] > 0 for line in found)


def test_the_last_checkpoint_is_the_deployed_method(tiny, tmp_path):
    config = tiny(method="mean_teacher")
    fit(config, out=tmp_path)
    run = load(tmp_path / config.run_id, device="cpu")
    assert_equal(dict(run.method.state_dict()), weights_of(tmp_path / config.run_id))
    assert not run.method.training
    image = torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8)
    probs = run.probs(image)
    assert probs.shape == (2, 8, 32, 32)
    torch.testing.assert_close(probs.sum(1), torch.ones(2, 32, 32))
    assert not torch.equal(probs, run.probs(image, "teacher"))


def test_a_trained_run_loads_where_its_weights_file_is_gone(tiny, tmp_path):
    import timm

    path = tmp_path / "encoder.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), path)
    config = tiny(weights=str(path), epochs=1)
    fit(config, out=tmp_path / "runs")
    path.unlink()
    load(tmp_path / "runs" / config.run_id, device="cpu")


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_teachers_keep_their_mode_while_training(tiny, tmp_path, mode):
    config = tiny(method="mean_teacher", method_args={"teacher_mode": mode}, epochs=1)
    run = Run(config, RunFolder(tmp_path, config), CPU)
    modes = []

    def note(*arguments: object) -> None:
        modes.append((run.method.student.training, run.method.teacher.training))

    run.train(False, note)
    assert set(modes) == {(True, mode == "train")}


def test_the_seed_decides_the_weights_and_the_global_generator_is_left_alone(tiny, tmp_path):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    fit(tiny(), out=tmp_path / "a")
    after = torch.get_rng_state()
    torch.manual_seed(123)
    fit(tiny(), out=tmp_path / "b")
    fit(tiny(seed=1), out=tmp_path / "a")
    a, b = (weights_of(tmp_path / side / tiny().run_id) for side in "ab")
    assert_equal(a, b)
    other = weights_of(tmp_path / "a" / tiny(seed=1).run_id)
    assert not torch.equal(
        a["student.classifier.0.0.weight"], other["student.classifier.0.0.weight"]
    )
    assert len(before) == len(after)


def test_restart_begins_again(tiny, tmp_path):
    config = tiny(epochs=1)
    fit(config, out=tmp_path)
    folder = tmp_path / config.run_id
    first = weights_of(folder)
    (folder / "leftover").mkdir()
    (folder / "leftover" / "file").write_text("x")
    fit(config, out=tmp_path, restart=True)
    assert not (folder / "leftover").exists()
    assert_equal(weights_of(folder), first)
    assert len(lines(folder, "eval")) == 1


# ---------------------------------------------------------------- optimization


PLAIN = {"optimizer": "sgd", "lr": 0.05, "net_args": {"norm": "group"}, "weight_decay": 0.0}


def test_two_accumulated_half_batches_are_one_whole_batch(tiny, tmp_path):
    common = {**PLAIN, "unlabeled": 16}
    whole = tiny(batch=8, unlabeled_batch=8, **common)
    halves = tiny(batch=4, unlabeled_batch=4, accumulate=2, **common)
    records = [fit(config, out=tmp_path) for config in (whole, halves)]
    assert records[0]["steps"] == records[1]["steps"] == 4
    assert records[0]["images_seen"] == records[1]["images_seen"] == 32
    a, b = (weights_of(tmp_path / config.run_id) for config in (whole, halves))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    start = Run(whole, RunFolder(tmp_path, whole), CPU).method.state_dict()
    assert (
        a["student.classifier.0.0.weight"] - start["student.classifier.0.0.weight"]
    ).abs().max() > 1e-3


def test_the_teacher_moves_once_per_update(tiny, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("s4lib.methods.mean_teacher.ema", lambda *a: calls.append(a))
    fit(tiny(method="mean_teacher", unlabeled=16, accumulate=2), out=tmp_path)
    assert len(calls) == 4


def test_clipping_bounds_the_update(tiny, tmp_path):
    moved = []
    for clip in (0.0, 1e-4):
        config = tiny(**PLAIN, clip=clip, epochs=1)
        run = Run(config, RunFolder(tmp_path, config), CPU)
        before = {k: p.clone() for k, p in run.method.named_parameters()}
        run.train(False, lambda *arguments: None)
        after = dict(run.method.named_parameters())
        moved.append(sum((after[k] - p).square().sum() for k, p in before.items()).sqrt().item())
    # Three steps with momentum 0.9: at most (1 + 1.9 + 2.71) lr clip.
    assert 0 < moved[1] <= 5.61 * 0.05 * 1e-4 * 1.001
    assert moved[0] > 100 * moved[1]


def test_the_encoder_has_its_own_rate(tiny, tmp_path):
    config = tiny(encoder_lr=0.0, weight_decay=0.0, epochs=1)
    run = Run(config, RunFolder(tmp_path, config), CPU)
    before = {k: p.clone() for k, p in run.method.named_parameters()}
    run.train(False, lambda *arguments: None)
    moved = {k for k, p in run.method.named_parameters() if not torch.equal(p, before[k])}
    assert moved and not any("encoder." in k for k in moved)
    assert any("encoder." in k for k in before)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_trains_on_a_cpu(tiny, tmp_path, amp):
    config = tiny(method="cutmix_seg", amp=amp)
    record = fit(config, out=tmp_path)
    assert record["networks"]["student"]["last"]["miou"] >= 0
    weights = weights_of(tmp_path / config.run_id)
    assert all(torch.isfinite(v).all() for v in weights.values())
    assert weights["student.classifier.0.0.weight"].dtype == torch.float32
    scale = state_of(tmp_path / config.run_id)["minimizer"]["scaler"]
    assert bool(scale) == (amp == "fp16")


def test_tensorboard_is_an_option(tiny, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(trainer, "LOG_EVERY", 2)
    config = tiny(tensorboard=True, epochs=1)
    fit(config, out=tmp_path)
    (events,) = (tmp_path / config.run_id / "tensorboard").iterdir()
    content = events.read_bytes()
    assert b"miou/student" in content and b"train/sup" in content
    fit(tiny(epochs=2), out=tmp_path)
    assert not (tmp_path / tiny(epochs=2).run_id / "tensorboard").exists()


# ---------------------------------------------------------------- progress


def test_progress_is_lines_where_there_is_no_terminal(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    bar = progress.Progress("training", 40)
    assert bar.kind == "lines"
    bar.update(10, "start")
    now[0] += 15
    bar.update(20, "too soon")
    assert capsys.readouterr().err == ""
    now[0] += 15
    bar.update(30, "student 41.5 mIoU")
    assert capsys.readouterr().err == "training: 30/40 (30 s, 15 s left) student 41.5 mIoU\n"
    now[0] += 3600
    bar.update(40)
    bar.close("done")
    assert capsys.readouterr().err.splitlines()[-1] == "training: 40/40 (1 h 0 min) done"


def test_training_reports_every_step(tiny, tmp_path):
    seen = []
    fit(tiny(), out=tmp_path, progress=lambda *report: seen.append(report))
    assert [(done, total) for done, total, _ in seen] == [(i, 6) for i in range(1, 7)]
    assert seen[0][2] == "" and "student" in seen[-1][2] and "mIoU" in seen[-1][2]


# ---------------------------------------------------------------- losses that are no numbers


@pytest.fixture
def spoilt_step(monkeypatch):
    """From a given step on, supervised losses are NaN."""
    step = Supervised.step

    def spoil(at: int) -> None:
        def spoilt(self, batch, clock, minimize):
            factor = float("nan") if clock.step >= at else 1.0
            return step(self, batch._replace(image=batch.image * factor), clock, minimize)

        monkeypatch.setattr(Supervised, "step", spoilt)

    yield spoil


def command(config, out: Path, *more: str) -> list[str]:
    """`s4 train` arguments of a config."""
    path = out.parent / f"{config.run_id}.yaml"
    path.write_text(json.dumps(config.to_dict()))  # JSON is YAML
    return ["train", "--config", str(path), "--out", str(out), *more]


def test_a_nan_loss_stops_names_the_step_and_keeps_the_last_good_checkpoint(
    tiny, tmp_path, spoilt_step, refused, monkeypatch
):
    config = tiny()
    fit(config, out=tmp_path / "whole")
    with monkeypatch.context() as spoilt:
        spoilt_step(4)
        error = refused(*command(config, tmp_path / "runs"), begun=True)
        assert "step 4" in error and "finite" in error
        folder = tmp_path / "runs" / config.run_id
        assert state_of(folder)["step"] == 3
        assert not (folder / "record.json").exists()
        assert all(torch.isfinite(v).all() for v in weights_of(folder).values())
        spoilt.undo()
    monkeypatch.undo()
    assert main(command(config, tmp_path / "runs", "--resume")) == 0
    assert_equal(state_of(folder), state_of(tmp_path / "whole" / config.run_id))


def test_nan_weights_after_a_finite_loss_are_not_kept(tiny, tmp_path, monkeypatch):
    step = Supervised.step

    def spoilt(self, batch, clock, minimize):
        if clock.step == 5:  # the last of the epoch
            self.student.classifier[0][0].weight.register_hook(lambda g: g * float("nan"))
        return step(self, batch, clock, minimize)

    monkeypatch.setattr(Supervised, "step", spoilt)
    config = tiny(epochs=3)
    with pytest.raises(FloatingPointError, match="step 5"):
        fit(config, out=tmp_path)
    assert state_of(tmp_path / config.run_id)["step"] == 3


def test_a_huge_learning_rate_is_caught(tiny, tmp_path, refused):
    config = tiny(lr=1e25, optimizer="sgd", net_args={"norm": "group"}, epochs=6)
    assert "finite" in refused(*command(config, tmp_path / "runs"), begun=True)


# ---------------------------------------------------------------- full and read-only disks


def fail_from(monkeypatch, call: int, error: int) -> None:
    """Let the `call`-th and later os.fsync fail."""
    sync, count = os.fsync, [0]

    def fsync(file) -> None:
        count[0] += 1
        if count[0] >= call:
            raise OSError(error, os.strerror(error))
        sync(file)

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_disk_that_is_full_from_the_start_leaves_nothing_half_written(
    tiny, tmp_path, refused, monkeypatch
):
    fail_from(monkeypatch, 1, errno.ENOSPC)
    error = refused(*command(tiny(), tmp_path / "runs"))
    assert "No space left on device" in error and "config.json" in error
    assert {p.name for p in (tmp_path / "runs" / tiny().run_id).iterdir()} <= {".lock"}


def test_a_disk_that_fills_up_keeps_the_last_checkpoint_and_the_run_can_go_on(
    tiny, tmp_path, refused, monkeypatch
):
    config = tiny(epochs=3)
    fit(config, out=tmp_path / "whole")
    # config.json, classes.json; best.pt, counts.pt, metrics, last.pt of epoch 1; then it is full.
    with monkeypatch.context() as full:
        fail_from(full, 7, errno.ENOSPC)
        error = refused(*command(config, tmp_path / "runs"), begun=True)
    assert "No space left on device" in error and str(tmp_path / "runs") in error
    folder = tmp_path / "runs" / config.run_id
    assert state_of(folder)["step"] == 3
    assert not list(folder.glob("*.tmp")) and not (folder / "record.json").exists()
    assert main(command(config, tmp_path / "runs", "--resume")) == 0
    assert_equal(state_of(folder), state_of(tmp_path / "whole" / config.run_id))
    whole = tmp_path / "whole" / config.run_id
    assert (folder / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_an_out_that_is_a_file_is_refused(tiny, tmp_path, refused):
    (tmp_path / "runs").write_text("kept")
    assert "runs" in refused(*command(tiny(), tmp_path / "runs"))
    assert (tmp_path / "runs").read_text() == "kept"


def test_a_read_only_disk_is_refused(tiny, tmp_path, refused, monkeypatch):
    def mkdir(path, *arguments) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    arguments = command(tiny(), tmp_path / "runs")
    monkeypatch.setattr(os, "mkdir", mkdir)
    assert "Read-only file system" in refused(*arguments)
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------- signals, kills, two at once


class Child:
    """One `s4` command in a process of its own."""

    def __init__(self, server: subprocess.Popen, log: Path, limit: int, arguments: list[str]):
        self.server, self.log = server, log
        server.stdin.write(json.dumps([str(log), limit, arguments]) + "\n")
        server.stdin.flush()
        self.pid = int(server.stdout.readline())
        self.code: int | None = None

    def kill(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self) -> int:
        """Exit code, negative for a signal."""
        if self.code is None:
            self.code = int(self.server.stdout.readline())
        return self.code

    def wait_for(self, condition) -> None:
        until = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < until, self.log.read_text()
            time.sleep(0.005)


@pytest.fixture(scope="module")
def server():
    process = subprocess.Popen(
        [sys.executable, str(TESTS / "child.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)},
    )
    assert process.stdout.readline() == "ready\n"
    yield process
    process.stdin.close()
    process.wait(60)
    process.stdout.close()


@pytest.fixture
def child(server, tmp_path):
    """Start a command; whatever is left at the end is killed."""
    started = []

    def start(arguments: list[str], limit: int = 0) -> Child:
        log = tmp_path / f"log{len(started)}.txt"
        started.append(Child(server, log, limit, arguments))
        return started[-1]

    yield start
    for one in started:
        if one.code is None:
            one.kill(signal.SIGKILL)
            one.wait()


EPOCHS = 10  # 30 steps: a second


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """(config, folder) of the run that the interrupted ones must equal."""
    config = tiny_config(method="mean_teacher", epochs=EPOCHS)
    out = tmp_path_factory.mktemp("uninterrupted")
    fit(config, out=out)
    return config, out / config.run_id


def assert_same_run(folder: Path, wanted: Path) -> None:
    assert_equal(state_of(folder), state_of(wanted))
    assert (folder / "metrics.jsonl").read_bytes() == (wanted / "metrics.jsonl").read_bytes()
    best = [torch.load(f / "best.pt", weights_only=True) for f in (folder, wanted)]
    assert_equal(*best)
    networks = [json.loads((f / "record.json").read_text())["networks"] for f in (folder, wanted)]
    assert networks[0] == networks[1]
    assert {p.name for p in folder.iterdir()} == {p.name for p in wanted.iterdir()}


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_a_signal_leaves_a_run_that_resumes_to_the_same_end(
    uninterrupted, tmp_path, child, number, code
):
    config, wanted = uninterrupted
    folder = tmp_path / "runs" / config.run_id
    run = child(command(config, tmp_path / "runs"))
    run.wait_for((folder / "last.pt").exists)
    run.kill(number)
    assert run.wait() == code, run.log.read_text()
    state = state_of(folder)
    assert 3 <= state["step"] < 3 * EPOCHS
    said = run.log.read_text().splitlines()
    assert said[-1].startswith(f"s4: stopped at step {state['step']};") and "resume" in said[-1]
    assert "Traceback" not in run.log.read_text()
    again = child(command(config, tmp_path / "runs", "--resume"))
    assert again.wait() == 0, again.log.read_text()
    assert_same_run(folder, wanted)


def kill_and_resume(uninterrupted, out: Path, child, kills: int) -> None:
    """SIGKILL `kills` times, at random moments, some before the first checkpoint; then finish."""
    config, wanted = uninterrupted
    folder = out / config.run_id
    rng = np.random.default_rng(0)
    steps, killed = [0], 0
    while killed < kills:
        run = child(command(config, out, "--resume"))
        if killed == 0:
            run.wait_for((folder / "config.json").exists)
        else:
            before = (folder / "last.pt").stat().st_mtime_ns if killed > 1 else 0
            run.wait_for(
                lambda before=before: (
                    (folder / "last.pt").exists()
                    and (folder / "last.pt").stat().st_mtime_ns > before
                )
            )
        time.sleep(rng.uniform(0, 0.08))
        run.kill(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL, "it ended before it could be killed: use more epochs"
        killed += 1
        if (folder / "last.pt").exists():
            steps.append(state_of(folder)["step"])  # always loadable
    assert steps == sorted(steps) and steps[-1] < config.epochs * 3
    run = child(command(config, out, "--resume"))
    assert run.wait() == 0, run.log.read_text()
    assert_same_run(folder, wanted)


def test_a_run_killed_twice_ends_bit_equal(uninterrupted, tmp_path, child):
    kill_and_resume(uninterrupted, tmp_path / "runs", child, 2)


@pytest.mark.slow
def test_a_run_killed_ten_times_ends_bit_equal(tmp_path, child, tiny):
    config = tiny(method="cutmix_seg", epochs=90)
    fit(config, out=tmp_path / "whole")
    whole = config, tmp_path / "whole" / config.run_id
    kill_and_resume(whole, tmp_path / "runs", child, 10)


def test_lines_of_an_attempt_without_a_checkpoint_are_not_repeated(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "LOG_EVERY", 2)
    config = tiny()

    def kill(done: int, total: int, text: str) -> None:
        if done == 2:
            raise RuntimeError("killed before the first checkpoint")

    with pytest.raises(RuntimeError, match="killed"):
        fit(config, out=tmp_path, progress=kill)
    folder = tmp_path / config.run_id
    assert len(lines(folder, "train")) == 1 and not (folder / "last.pt").exists()
    (folder / "last.pt.123.tmp").write_text("half a checkpoint")
    fit(config, out=tmp_path, resume=True)
    assert [line["step"] for line in lines(folder, "train")] == [2, 4, 6]
    assert not list(folder.glob("*.tmp"))


def test_two_processes_cannot_train_the_same_run(uninterrupted, tmp_path, child):
    config, _ = uninterrupted
    out = tmp_path / "runs"
    run = child(command(config, out))
    run.wait_for((out / config.run_id / "last.pt").exists)
    run.kill(signal.SIGSTOP)  # it holds the run and stands still
    try:
        files = {p.name: p.stat().st_mtime_ns for p in (out / config.run_id).iterdir()}
        for how in ({"resume": True}, {"restart": True}, {}):
            with pytest.raises(Busy, match="another process is training this run"):
                fit(config, out=out, **how)
        now = {p.name: p.stat().st_mtime_ns for p in (out / config.run_id).iterdir()}
        assert {k: v for k, v in now.items() if k != ".lock"} == {
            k: v for k, v in files.items() if k != ".lock"
        }
    finally:
        run.kill(signal.SIGCONT)
    run.kill(signal.SIGTERM)
    assert run.wait() == 143


def test_who_waits_for_a_run_gets_its_record(tiny, tmp_path):
    config = tiny(epochs=1)
    record = fit(config, out=tmp_path / "a")
    folder = RunFolder(tmp_path / "b", config)
    folder.path.mkdir(parents=True)
    # Another process ends its run between our first look and our getting the lock.
    lock = fcntl.flock

    def flock(file, how: int) -> None:
        lock(file, how)
        folder.write_record(record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", flock)
        assert fit(config, out=tmp_path / "b", wait=True) == record
    assert not folder.checkpoint.exists()


def test_who_waits_to_train_again_keeps_what_another_process_has_made(tiny, tmp_path):
    """Two readers ask for the same snapshots at once: the second does not throw them away."""
    plain, config = tiny(), tiny(snapshots=[1])
    old, folder = fit(plain, out=tmp_path), RunFolder(tmp_path, config)
    assert folder.missing() == [1] and folder.record() == old
    new, lock = {**old, "seconds": -1}, fcntl.flock

    def flock(file, how: int) -> None:
        lock(file, how)
        (folder.path / "epoch-0001.pt").touch()
        folder.write_record(new)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", flock)
        assert fit(config, out=tmp_path, wait=True) == new
    assert fit(config, out=tmp_path, restart=True)["seconds"] >= 0  # nobody else has: again


def test_a_file_size_limit_is_one_line(uninterrupted, tmp_path, child):
    """The operating system refuses to write more, as a full disk does."""
    config, _ = uninterrupted
    run = child(command(config, tmp_path / "runs"), limit=40_000)
    assert run.wait() == 2
    said = run.log.read_text().splitlines()
    assert [line.startswith("s4: ") for line in said[-2:]] == [False, True], said
    assert len(said) == 2 and "best.pt" in said[1]
    folder = tmp_path / "runs" / config.run_id
    assert not list(folder.glob("*.pt*")) and not (folder / "record.json").exists()


def test_trained_networks_hold_no_gradients_of_teachers(tiny, tmp_path):
    config = tiny(method="mean_teacher", epochs=1)
    run = Run(config, RunFolder(tmp_path, config), CPU)
    run.train(False, lambda *arguments: None)
    assert trainable(run.method.student) and not trainable(run.method.teacher)
    assert all(p.grad is None for p in run.method.teacher.parameters())


# ---------------------------------------------------------------- speed changes no number


def test_a_loss_of_some_steps_is_averaged_over_those_and_survives_a_resume(
    tiny, tmp_path, monkeypatch
):
    monkeypatch.setattr(trainer, "LOG_EVERY", 4)
    step = Supervised.step

    def rare(self, batch, clock, minimize):
        losses = step(self, batch, clock, minimize)
        return {**losses, "rare": torch.tensor(2.0)} if clock.step % 4 == 1 else losses

    monkeypatch.setattr(Supervised, "step", rare)
    config = tiny(epochs=4)  # 12 steps
    fit(config, out=tmp_path / "whole")
    found = lines(tmp_path / "whole" / config.run_id, "train")
    assert [line["rare"] for line in found] == [2.0, 2.0, 2.0]

    def kill(done: int, total: int, text: str) -> None:
        if done == 7:  # the checkpoint of step 6 holds one of the two steps since step 4
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        fit(config, out=tmp_path / "runs", progress=kill)
    fit(config, out=tmp_path / "runs", resume=True)
    both = [(tmp_path / side / config.run_id / "metrics.jsonl") for side in ("whole", "runs")]
    assert both[0].read_bytes() == both[1].read_bytes()


@pytest.mark.parametrize("method", ["supervised", "cutmix_seg"])
def test_prefetch_cache_and_kept_memory_leave_the_weights_bit_equal(
    tiny, tmp_path, monkeypatch, method
):
    config = tiny(method=method)
    fit(config, out=tmp_path / "fast")
    plain = tmp_path / "plain"
    with monkeypatch.context() as patch:
        patch.setattr(Images, "keep_bytes", 0)
        patch.setattr(trainer, "keep_freed_memory", lambda: None)
        fit(config, out=plain)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "Loader", functools.partial(Loader, prefetch=True))
        fit(config, out=tmp_path / "ahead")
    for side in ("plain", "ahead"):
        assert_equal(
            weights_of(tmp_path / side / config.run_id),
            weights_of(tmp_path / "fast" / config.run_id),
        )


@pytest.mark.parametrize("outside", ["reflect", "void"])
def test_bytes_sent_to_the_device_give_the_views_that_floats_give(outside):
    g = torch.Generator().manual_seed(0)
    images = list(torch.randint(0, 256, (2, 3, 20, 24), generator=g, dtype=torch.uint8))
    labels = list(torch.randint(0, 9, (2, 20, 24), generator=g, dtype=torch.uint8))
    labels[0][3:9] = IGNORE
    views = Views((16, 16), scale=(0.5, 2.0), outside=outside)
    rngs = [np.random.default_rng(i) for i in range(2)]
    crops = [views.draw_crop(rng, 20, 24) for rng in rngs]
    floats = views.crop_images([image.float() for image in images], crops)
    assert torch.equal(views.crop_images(images, crops), floats)
    wide = views.crop_labels([label.long() for label in labels], crops)
    assert torch.equal(views.crop_labels(labels, crops), wide)
    assert wide.unique().tolist() == [*range(9), IGNORE]


def test_compile_that_does_not_work_is_said_once_and_the_run_is_the_plain_one(
    tiny, tmp_path, monkeypatch
):
    def fails(*arguments: object, **options: object) -> None:
        raise RuntimeError("no C++ compiler\nand more lines")

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.warns(UserWarning, match="compile=true has no effect.*no C.. compiler$"):
        fit(tiny(compile=True), out=tmp_path)
    fit(tiny(), out=tmp_path)
    assert tiny(compile=True).run_id != tiny().run_id  # elsewhere it changes last bits
    a, b = (weights_of(tmp_path / c.run_id) for c in (tiny(compile=True), tiny()))
    assert_equal(a, b)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_compiled_networks_train_as_plain_ones_and_keep_their_names(tiny, tmp_path):
    configs = [tiny(method="cutmix_seg", epochs=1, compile=on) for on in (False, True)]
    for config in configs:
        fit(config, out=tmp_path)
    a, b = (weights_of(tmp_path / config.run_id) for config in configs)
    assert a.keys() == b.keys()
    torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)
    kept = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert kept >= 3  # encoder, decoder, classifier: else nothing was compiled


def test_a_checkpoint_made_before_an_option_existed_counts_as_its_default(tiny, tmp_path):
    config = tiny(epochs=1)
    fit(config, out=tmp_path)
    folder = RunFolder(tmp_path, config)
    state = torch.load(folder.checkpoint, weights_only=True)
    del state["config"]["compile"]
    torch.save(state, folder.checkpoint)
    assert folder.load()["step"] == state["step"]
    torch.save({**state, "config": {**state["config"], "compile": True}}, folder.checkpoint)
    with pytest.raises(ValueError, match="compile is True, not False"):
        folder.load()
