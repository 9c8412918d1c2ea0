"""Runs from a notebook: train what is not recorded, here or under torchrun, with a live bar.

results = runs.run([protocol("mosaic-32", method=m, draw=d) for m in methods for d in range(3)])
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from . import records
from .build import build_method, open_data
from .config import Config
from .progress import Progress
from .run_folder import Busy, RunFolder
from .trainer import fit


def run(
    configs: Sequence[Config],
    *,
    gpus: int = 0,
    out: str | Path = "",
    title: str = "runs",
    weights: bool = True,
) -> list[dict]:
    """Records of `configs`, in their order.

    A run that is recorded is loaded, one that is half done is resumed, the others are trained, one
    after the other. A record made by another version of the method's file is trained again.

    Args:
        gpus: processes that torchrun starts for each run; 0 trains in this process.
        out: folder of all runs; by default the checkout's `runs`.
        weights: whether the trained weights will be looked at. If not, a record in `book/records`
            will do, as long as it is not stale.

    Raises:
        ValueError: bad config, named before anything is trained.
        RuntimeError: a run under torchrun failed; the end of its log is in the message.
    """
    out = Path(out or records.RUNS)
    for config in configs:
        build_method(config, len(open_data(config)[0].classes))
    bar = Progress(title, 100 * len(configs))
    known = {} if weights else {r["run_id"]: r for r in records.load(records.COMMITTED)}
    found: dict[int, dict] = {}
    queue = list(enumerate(configs))
    busy = 0  # runs in a row that another process, perhaps another notebook, was training
    while queue:
        number, config = queue.pop(0)

        def show(done: int, total: int, text: str, config: Config = config) -> None:
            name = f"{config.method}, draw {config.draw}: step {done}/{total} {text}"
            bar.update(100 * len(found) + round(100 * done / total), name)

        try:
            wait = busy > len(queue)
            committed = known.get(config.run_id)
            found[number] = _finish(config, out, gpus, wait, committed, show)
            busy = 0
        except Busy:
            queue.append((number, config))  # take another one meanwhile
            busy += 1
        bar.update(100 * len(found))
    results = [found[number] for number in range(len(configs))]
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
    bar.close("done", {"s4": {"runs": described}})
    return results


def _finish(
    config: Config,
    out: Path,
    gpus: int,
    wait: bool,
    committed: dict | None,
    show: Callable[[int, int, str], None],
) -> dict:
    """The record of one run, trained if there is none that the present code has made."""
    folder = RunFolder(out, config)
    record = folder.record()
    for known in (None if folder.missing() else record, committed):
        if known is not None and not records.stale(known):
            return known
    outdated = record is not None
    if gpus:
        _launch(config, out, gpus, outdated, show)
        return folder.record()
    return fit(config, out=out, resume=not outdated, restart=outdated, wait=wait, progress=show)


def metrics(config: Config, out: str | Path = "") -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    path = RunFolder(out or records.RUNS, config).metrics
    return [json.loads(line) for line in path.read_text().splitlines()]


def _launch(
    config: Config, out: Path, gpus: int, restart: bool, show: Callable[[int, int, str], None]
) -> None:
    """Train one run under torchrun in a process group of its own, following its metrics file."""
    folder = RunFolder(out, config)
    folder.path.mkdir(parents=True, exist_ok=True)
    log = folder.path / "log.txt"
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file, open(log, "a") as output:
        json.dump(config.to_dict(), file)  # JSON is YAML
        file.flush()
        command = [
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={gpus}",
            "-m",
            "s4lib",
            "train",
        ]
        options = ["--config", file.name, "--out", str(out), "--restart" if restart else "--resume"]
        child = subprocess.Popen(
            [sys.executable, "-m", *command, *options],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={
                "OMP_NUM_THREADS": "1",
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(records.HERE), *sys.path]),
            },
        )
        try:
            while child.poll() is None:
                time.sleep(0.3)
                lines = metrics(config, out) if folder.metrics.exists() else []
                if lines:
                    show(lines[-1]["step"], lines[-1]["of"], "")
        except BaseException:
            os.killpg(child.pid, signal.SIGTERM)  # the ranks write their checkpoint and end
            child.wait()
            raise
    if child.returncode:
        tail = "\n".join(log.read_text().splitlines()[-15:])
        raise RuntimeError(
            f"{config.run_id} failed with exit code {child.returncode}; its log {log} ends:\n{tail}"
        )
