"""A run's folder: config, metrics, checkpoints, record; every file is whole or absent.

<out>/<run_id>/config.json     what is run; classes.json the names and colours of the classes
               metrics.jsonl   one line per evaluation and every few steps
               last.pt         everything needed to go on exactly; best.pt the weights with the best
               mIoU record.json     the result, written when the run has ended
               epoch-0002.pt   last.pt as it was after an epoch of config.snapshots
               log.txt         what a run said that was trained in a process of its own
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from .config import NO_NUMBER, Config
from .data.images import Images
from .weights import read_tensors

LOCK = ".lock"  # held by the process that trains the run


@contextlib.contextmanager
def naming(path: Path):
    """Put `path` into an OSError that names no file."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_atomically(path: Path, write: Callable) -> None:
    """Call `write(file)` on a temporary neighbour, flush it to disk, then move it into place.

    Raises:
        OSError: the disk is full or read-only; `path` is as it was and the temporary file is gone.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path), open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, RuntimeError):  # torch.save's word for a write that failed
            raise OSError(f"{path}: could not be written ({str(error).splitlines()[0]})") from error
        raise


def snapshot(folder: Path, epoch: int) -> Path:
    return folder / f"epoch-{epoch:04d}.pt"


def snapshots(folder: str | Path) -> list[int]:
    """The epochs of which a run's folder has a snapshot. Raises ValueError if there is none."""
    paths = Path(folder).glob("epoch-*.pt")
    found = sorted(int(path.stem.removeprefix("epoch-")) for path in paths)
    if not found:
        raise ValueError(f"{folder}: no snapshot; train with snapshots, a list of epochs")
    return found


class Busy(ValueError):
    """Another process is training the run."""


class RunFolder:
    """The files of one run, in `out/config.run_id`."""

    def __init__(self, out: str | Path, config: Config):
        self.path = Path(out) / config.run_id
        self.config = config

    @property
    def checkpoint(self) -> Path:
        return self.path / "last.pt"

    @property
    def best(self) -> Path:
        return self.path / "best.pt"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def output(self) -> Path:
        return self.path / "log.txt"

    def create(self, images: Images) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.config.to_dict(), indent=1)
        write_atomically(self.path / "config.json", lambda f: f.write(text.encode()))
        text = json.dumps({"classes": list(images.classes), "colors": images.colors.tolist()})
        write_atomically(self.path / "classes.json", lambda f: f.write(text.encode()))

    def clear(self) -> None:
        """Throw away what there is of the run."""
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in (LOCK, self.output.name):
                path.unlink()

    @contextlib.contextmanager
    def locked(self, wait: bool):
        """Hold the run against other processes. Raises Busy if it is taken and `wait` is False."""
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / LOCK, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise Busy(f"{self.path}: another process is training this run") from None
            for left in self.path.glob("*.tmp"):  # by a process killed while it wrote
                left.unlink()
            yield

    def busy(self) -> bool:
        """Whether a process is training the run now."""
        if not (self.path / LOCK).exists():
            return False
        try:
            with self.locked(wait=False):
                return False
        except Busy:
            return True

    def steps(self) -> tuple[int, int]:
        """Steps that metrics.jsonl speaks of, and steps in all; (0, 1) before its first line."""
        try:
            with open(self.metrics, "rb") as file:
                file.seek(-min(4096, file.seek(0, os.SEEK_END)), os.SEEK_END)
                line = json.loads(file.read().splitlines()[-1])
        except (FileNotFoundError, IndexError, json.JSONDecodeError):
            return 0, 1
        return line["step"], line["of"]

    def record(self) -> dict | None:
        path = self.path / "record.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def write_record(self, record: dict) -> None:
        write_atomically(self.path / "record.json", lambda f: f.write(json.dumps(record).encode()))

    def missing(self) -> list[int]:
        """The epochs of which a snapshot is wanted and not there."""
        return [e for e in self.config.snapshots if not snapshot(self.path, e).is_file()]

    def log(self, line: dict) -> None:
        with naming(self.metrics), open(self.metrics, "a") as file:
            file.write(json.dumps(line) + "\n")

    def save(self, state: dict, epoch: int = 0) -> None:
        """Write last.pt, noting how much of metrics.jsonl belongs to it; `epoch` has just ended.

        A snapshot comes first, so that whoever goes on from last.pt has all earlier ones.
        """
        if self.metrics.exists():
            with naming(self.metrics), open(self.metrics, "rb") as file:
                os.fsync(file.fileno())
        size = self.metrics.stat().st_size if self.metrics.exists() else 0
        state = {**state, "metrics_bytes": size, "config": self.config.to_dict()}
        wanted = [snapshot(self.path, epoch)] if epoch in self.config.snapshots else []
        for path in (*wanted, self.checkpoint):
            write_atomically(path, lambda f: torch.save(state, f))

    def save_best(self, weights: dict) -> None:
        write_atomically(self.best, lambda f: torch.save(weights, f))

    def save_counts(self, counts: dict) -> None:
        """Confusion matrices per image of the last evaluation, for bootstraps and paired tests."""
        write_atomically(self.path / "counts.pt", lambda f: torch.save(counts, f))

    def load(self) -> dict:
        """State of last.pt; metrics.jsonl is cut back to where that checkpoint was written.

        Raises:
            ValueError: corrupt, refused, or of another config.
        """
        state = read_tensors(self.checkpoint)
        wanted = {"config", "metrics_bytes", "method", "minimizer", "step"}
        if not isinstance(state, dict) or not wanted <= state.keys():
            raise ValueError(f"{self.checkpoint}: not a checkpoint of s4lib")
        kept, ours = state["config"], self.config.to_dict()
        kept = {**Config().to_dict(), **kept}  # an older one lacks options that are new
        differ = [k for k in ours if kept.get(k) != ours[k] and k not in NO_NUMBER]
        if differ:
            there, here = (f"{c.get(differ[0])!r}" for c in (kept, ours))
            what = f"checkpoint of another config: {differ[0]} is {there}, not {here}"
            raise ValueError(f"{self.checkpoint}: {what}")
        return state

    def cut_metrics(self, size: int) -> None:
        if self.metrics.exists() and self.metrics.stat().st_size > size:
            os.truncate(self.metrics, size)
