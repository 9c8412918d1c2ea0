"""Many runs: a queue that trains what is not recorded, for notebooks and for `s4 grid`.

results = runs.run([protocol("mosaic-32", method=m, draw=d) for m in methods for d in range(3)])

Nothing about the queue is stored. What is to be done follows from the runs' folders alone: a record
is skipped, a checkpoint is resumed, a run whose lock is held is somebody else's and left alone. So
a queue may be killed, started again, and started twice.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from . import records
from .build import build_method, open_data
from .config import Config
from .progress import Progress
from .run_folder import Busy, RunFolder
from .trainer import fit

PATIENCE = 30.0  # seconds in which a stopped run must have written its checkpoint


def run(
    configs: Sequence[Config],
    *,
    gpus: int = 0,
    out: str | Path = "",
    title: str = "runs",
    weights: bool = True,
) -> list[dict]:
    """Records of `configs`, in their order.

    A run that is recorded is loaded, one that is half done is resumed, the others are trained. What
    older code has recorded is trained again.

    Args:
        gpus: processes of each run, each with a GPU where there are any; as many runs at a time as
            there are GPUs for. 0 trains in this process, one run after the other.
        out: folder of all runs; by default the checkout's `runs`.
        weights: whether the trained weights will be looked at. If not, a record in `book/records`
            will do, as long as it is not stale.

    Raises:
        ValueError: bad config, named before anything is trained.
        RuntimeError: a run in a process of its own failed; the end of its log is in the message.
    """
    out = Path(out or records.RUNS)
    check(configs)
    known = {} if weights else {r["run_id"]: r for r in records.load(records.COMMITTED)}
    show = Overview(title, len({config.run_id for config in configs}))
    engine = Local(out, gpus) if gpus else Here(out, show)
    found, failed = work(configs, out, engine, known=known, retrain=True, show=show)
    for config in failed:
        log = RunFolder(out, config).output
        tail = "\n".join(log.read_text().splitlines()[-15:])
        raise RuntimeError(f"{config.run_id} failed; its log {log} ends:\n{tail}")
    results = [found[config.run_id] for config in configs]
    described = [
        {
            "run_id": r["run_id"],
            "method": r["config"]["method"],
            "seed": r["config"]["seed"],
            "draw": r["config"]["draw"],
            "device": r["device"],
            "seconds": r["seconds"],
        }
        for r in results
    ]
    show.close("done", {"s4": {"runs": described}})
    return results


def metrics(config: Config, out: str | Path = "") -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    path = RunFolder(out or records.RUNS, config).metrics
    return [json.loads(line) for line in path.read_text().splitlines()]


def check(configs: Sequence[Config]) -> None:
    """Raises ValueError for a config that could not be trained, before any is."""
    built = set()
    for config in configs:
        classes = len(open_data(config)[0].classes)
        setting = records.setting(config)
        if setting not in built:
            build_method(config, classes)
        built.add(setting)


class Overview:
    """One bar for many runs, called with the steps that one of them has done, and will have."""

    def __init__(self, title: str, count: int):
        self.bar = Progress(title, 100 * count)
        self.shares: dict[str, float] = {}
        self.live: dict[str, str] = {}

    def __call__(self, config: Config, done: int, total: int, text: str = "") -> None:
        was_there = config.run_id not in self.live and done == total
        self.shares[config.run_id] = done / total
        self.live[config.run_id] = (
            f"{config.method}, draw {config.draw}: {done}/{total} {text}".rstrip()
        )
        if done in (0, total):  # queued, or ended
            del self.live[config.run_id]
        if not was_there:  # else the bar would take it for work of this very second
            some, more = list(self.live.values())[:3], len(self.live) - 3
            self.bar.update(self.done, "; ".join(some) + (f"; {more} more" if more > 0 else ""))

    @property
    def done(self) -> int:
        return round(100 * sum(self.shares.values()))

    def close(self, text: str, metadata: dict | None = None) -> None:
        self.bar.update(self.done)
        self.bar.close(text, metadata)


Show = Callable[[Config, int, int, str], None]


class Worker(Protocol):
    """What trains one run."""

    config: Config

    def ended(self) -> bool: ...


class Engine(Protocol):
    """Where runs are trained.

    Attributes:
        pause: seconds between two looks at it.
        detached: whether its workers live on without the queue.
    """

    pause: float
    detached: bool

    def start(self, configs: list[Config], running: list[Worker]) -> list[Worker]:
        """Start as many of `configs` as there is room for beside `running`."""

    def stop(self, workers: list[Worker], patience: float) -> None:
        """Have them write their checkpoints and end, within `patience` seconds."""


def work(
    configs: Sequence[Config],
    out: Path,
    engine: Engine,
    *,
    known: dict[str, dict] | None = None,
    retrain: bool = False,
    retries: int = 0,
    deadline: float = math.inf,
    show: Show = lambda config, done, total, text="": None,
) -> tuple[dict[str, dict], list[Config]]:
    """Have everything trained; returns the records by run id, and what failed.

    Args:
        known: records by run id that will do instead of one in `out`, unless stale.
        retrain: train again what other code than the present one has recorded.
        retries: how often a run that failed is started again, from its checkpoint.
        deadline: on time.monotonic's clock; by then all workers have written their checkpoints and
            ended, and what is in neither result was not finished.
    """
    found: dict[str, dict] = {}
    failed: list[Config] = []
    waiting = {config.run_id: config for config in configs}
    running: dict[str, Worker] = {}
    tries: Counter[str] = Counter()
    patience = min(PATIENCE, (deadline - time.monotonic()) / 4)
    try:
        while True:
            for name, worker in list(running.items()):
                if worker.ended():
                    del running[name]
                    tries[name] += 1
                    waiting[name] = waiting.pop(name)  # others first
            for name, config in list(waiting.items()):
                record = None if name in running else recorded(config, out, known, retrain)
                if record is not None:
                    found[name] = record
                    show(config, 1, 1, "")
                elif tries[name] > retries:
                    failed.append(config)
                else:
                    continue
                del waiting[name]
            if not waiting or time.monotonic() > deadline - patience:
                break
            idle = [c for name, c in waiting.items() if name not in running]
            free = [c for c in idle if not RunFolder(out, c).busy()]
            started = engine.start(free, list(running.values()))
            running |= {worker.config.run_id: worker for worker in started}
            for worker in running.values():
                show(worker.config, *RunFolder(out, worker.config).steps(), "")
            if not any(worker.ended() for worker in running.values()):
                time.sleep(engine.pause)
    finally:
        if not engine.detached or time.monotonic() > deadline - patience:
            engine.stop(list(running.values()), patience)
    return found, failed


def recorded(
    config: Config, out: Path, known: dict[str, dict] | None = None, retrain: bool = False
) -> dict | None:
    """A run's record that needs no training."""
    folder = RunFolder(out, config)
    record = None if folder.missing() else folder.record()
    if record is not None and not (retrain and records.stale(record)):
        return record
    record = (known or {}).get(config.run_id)
    return None if record is None or records.stale(record) else record


def forget_stale(config: Config, out: Path) -> None:
    """Throw away what other code than the present one has recorded. Raises Busy if it is held."""
    folder = RunFolder(out, config)
    if folder.record() is not None:
        with folder.locked(wait=False):
            record = folder.record()
            if record is not None and (folder.missing() or records.stale(record)):
                folder.clear()


@dataclass
class Done:
    """A worker that ended before its start returned."""

    config: Config

    def ended(self) -> bool:
        return True


@dataclass
class Here:
    """Trains in this process, one run after the other."""

    out: Path
    show: Show
    pause: float = 0.3
    detached: bool = False

    def start(self, configs: list[Config], running: list[Worker]) -> list[Worker]:
        for config in configs[:1]:

            def show(done: int, total: int, text: str, config: Config = config) -> None:
                self.show(config, done, total, text)

            with contextlib.suppress(Busy):
                forget_stale(config, self.out)
            fit(config, out=self.out, resume=True, wait=True, progress=show)
        return [Done(config) for config in configs[:1]]

    def stop(self, workers: list[Worker], patience: float) -> None:
        pass


@dataclass
class Child:
    """A run in a process of its own, or in several under torchrun."""

    config: Config
    slot: int
    process: subprocess.Popen

    def ended(self) -> bool:
        over = self.process.poll() is not None
        if over:
            self.process.stdin.close()
        return over


class Local:
    """Trains in child processes of this machine, each in a slot: some GPUs, or a CPU core.

    Args:
        gpus: processes of a run, each with a GPU where there are any; 0 is one process without.
        slots: runs at a time; by default as many as there are GPUs or cores for. If there are more,
            slots share GPUs.
    """

    pause = 0.3
    detached = False

    def __init__(self, out: Path, gpus: int, slots: int = 0, retrain: bool = True):
        self.out, self.gpus, self.retrain = out, gpus, retrain
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(
            map(str, range(torch.cuda.device_count()))
        )
        self.devices = visible.split(",") if gpus and torch.cuda.is_available() else []
        if self.devices and gpus > len(self.devices):
            raise ValueError(f"gpus_per_node={gpus}: there are {len(self.devices)} here")
        self.slots = slots or (len(self.devices) or cores()) // max(gpus, 1) or 1

    def start(self, configs: list[Config], running: list[Worker]) -> list[Worker]:
        free = [s for s in range(self.slots) if s not in {child.slot for child in running}]
        started = []
        for config, slot in zip(configs, free, strict=False):
            n = len(self.devices)
            mine = [self.devices[(slot * self.gpus + i) % n] for i in range(self.gpus) if n]
            with contextlib.suppress(Busy):  # another queue was faster
                if self.retrain:
                    forget_stale(config, self.out)
                environment = {"CUDA_VISIBLE_DEVICES": ",".join(mine)}
                process = launch(config, self.out, self.gpus, environment)
                started.append(Child(config, slot, process))
        return started

    def stop(self, workers: list[Worker], patience: float) -> None:
        for child in workers:
            child.process.stdin.close()
        until = time.monotonic() + patience
        while not all(child.ended() for child in workers) and time.monotonic() < until:
            time.sleep(0.05)
        for child in workers:
            if not child.ended():
                os.killpg(child.process.pid, signal.SIGKILL)
                child.process.wait()


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def torchrun(
    processes: int, module: str, *arguments: str, nodes: Sequence[str] = ("--standalone",)
) -> list[str]:
    """The command that runs a module in several processes here; `nodes` as of `launch`."""
    ranks = [*nodes, f"--nproc_per_node={max(processes, 1)}", "-m", module, *arguments]
    return [sys.executable, "-m", "torch.distributed.run", *ranks]


def launch(
    config: Config,
    out: Path,
    processes: int,
    environment: dict[str, str],
    nodes: Sequence[str] = ("--standalone",),
) -> subprocess.Popen:
    """Start the worker of one run, or several under torchrun; its output goes to the run's log.

    It ends with a checkpoint when the `stdin` of the result is closed, if only by our death.

    Args:
        nodes: torchrun's options about other nodes.
    """
    folder = RunFolder(out, config)
    folder.path.mkdir(parents=True, exist_ok=True)
    worker = ["s4lib.worker", json.dumps(config.to_dict()), str(out)]
    alone = processes <= 1 and "--standalone" in nodes
    with open(folder.output, "a") as output:
        return subprocess.Popen(
            [sys.executable, "-m", *worker] if alone else torchrun(processes, *worker, nodes=nodes),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={
                "OMP_NUM_THREADS": "1",
                **os.environ,
                **environment,
                "PYTHONPATH": os.pathsep.join([str(records.HERE), *filter(None, sys.path)]),
            },
        )
