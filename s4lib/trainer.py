"""`fit(config)` trains one run, in this process or as one of torchrun's, and returns its record.

    s4 train --protocol mosaic-32 --method mean_teacher
    torchrun --nproc_per_node=2 -m s4lib train --protocol mosaic-32 --method mean_teacher --device
    cpu

What a step does depends only on (config, step, rank), so a checkpoint is state dicts plus the step,
and a run that was killed and resumed ends bit-equal to one that was not (on a CPU; GPU kernels may
differ in the last bit).
"""

from __future__ import annotations

import contextlib
import functools
import math
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from . import distributed, records, trained
from .build import build_method, method_source, network_of, open_data
from .config import Config
from .data.families import build_views
from .data.loader import Loader
from .data.pseudo_labels import PseudoLabels
from .evaluate import count, evaluated, evaluation, normaliser, scores
from .interrupts import Interrupted, stop_requests
from .method import Clock, Method, train_step
from .minimizer import Minimizer
from .run_folder import RunFolder
from .speed import compile_networks, keep_freed_memory

LOG_EVERY = 10  # steps
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


def fit(
    config: Config,
    *,
    out: str | Path = "runs",
    resume: bool = False,
    restart: bool = False,
    wait: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
    labels: PseudoLabels | None = None,
) -> dict:
    """Train one run and return its record; a run already recorded is returned as it is.

    If it lacks one of `config.snapshots` it is trained again, from the start: ask for all at once.

    Args:
        out: folder of all runs; this one's is `out/config.run_id`.
        resume: continue from the run's checkpoint if there is one.
        restart: throw away what there is and begin again.
        wait: if another process is training this very run, wait for it instead of failing.
        progress: called with (steps done, steps in all, text).
        labels: of a training that is a stage of another: the unlabeled images are these alone.

    Raises:
        ValueError: bad config, data or checkpoint, or an unfinished run without `resume` or
            `restart`.
        FloatingPointError: the loss became infinite or NaN; the last good checkpoint is kept.
        Interrupted: SIGINT or SIGTERM; the checkpoint is written.
        OSError: the disk is full or read-only.
    """
    device = distributed.start(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    folder = RunFolder(out, config)
    record = folder.record()
    restart = restart or (record is not None and bool(folder.missing()))
    if record and not restart:
        return record
    run = Run(config, folder, device, labels)  # bad input is found here, before anything is written
    with folder.locked(wait) if run.main else contextlib.nullcontext():
        # Unless another process has done it while this one waited.
        if run.main and restart and (folder.missing() or folder.record() == record):
            folder.clear()
        distributed.barrier()
        if record := folder.record():  # another process has trained it while this one waited
            return record
        if folder.checkpoint.exists() and not resume:
            raise ValueError(
                f"{folder.path}: an unfinished run; resume continues it, restart begins again"
            )
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            record = run.train(resume, progress or (lambda done, total, text: None))
        distributed.barrier()
    return record


def seed_noise(config: Config, step: int) -> None:
    """Noise of a step (CutMix boxes, dropout) is a function of seed, step and rank."""
    torch.manual_seed(hash((config.seed, step, distributed.rank())) % 2**63)


class Run:
    """One training run: everything built from a config, and the loop."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        device: torch.device,
        labels: PseudoLabels | None = None,
    ):
        self.config, self.folder, self.device = config, folder, device
        self.main = distributed.rank() == 0
        self.evaluation = evaluation(config.evaluation, config.eval_args)
        self.images, self.split, self.held_out, self.held_out_indices = open_data(config)
        self.method = build_method(config, len(self.images.classes)).to(device)
        self.whole = labels is None  # not a stage of another run
        self.labels = labels or PseudoLabels(
            folder.path / "labels", self.split.unlabeled, self.images.colors
        )
        self.split = replace(self.split, unlabeled=self.labels.indices)
        if config.sync_bn:
            distributed.synchronise_batch_norm(self.method, device)
        distributed.broadcast(self.method)
        net = network_of(self.method)
        self.normalise = normaliser(net.mean, net.std, device)
        self.compiled = config.compile and compile_networks(self.method, device)
        self.minimizer = Minimizer(self.method, config, device)
        self.loader = Loader(
            self.images,
            self.split,
            build_views(config, self.images[0][0].shape[1:], net.mean),
            self.method,
            batch=config.batch,
            unlabeled_batch=config.unlabeled_batch,
            seed=config.seed,
            mean=net.mean,
            std=net.std,
            device=device,
            pseudo_labels=self.labels,
        )
        self.steps_per_epoch = math.ceil(self.loader.steps_per_epoch / config.accumulate)
        self.steps = self.steps_per_epoch * config.epochs
        self.sums: dict[str, float] = {}  # of logged losses since the last line
        self.logged: dict[str, int] = {}  # batches that had them
        self.best: dict[str, dict] = {}
        self.last: dict[str, dict] = {}
        self.seconds = 0.0
        self.stages: list[dict] = []  # what came before, in short

    def train(self, resume: bool, progress: Callable[[int, int, str], None]) -> dict:
        config, first, began = self.config, 0, time.monotonic()
        if self.whole:
            self.method.recipe(self, functools.partial(self.stage, resume, progress))
        self.seconds += time.monotonic() - began
        if resume and self.folder.checkpoint.exists():
            first = self._restore()
        elif self.main:
            self.folder.create(self.held_out)
            self.folder.cut_metrics(0)  # lines of an attempt that died before its first checkpoint
        distributed.barrier()
        total, before = self.steps, len(self.stages) * self.steps
        text, began = "", time.monotonic() - self.seconds
        board = self._tensorboard(first)
        with stop_requests() as stop:
            for step in range(first, total):
                clock = Clock(step, self.steps_per_epoch, config.epochs)
                lr = self._step(clock)
                self.seconds = time.monotonic() - began
                done = step + 1
                epoch_ends = done % self.steps_per_epoch == 0
                if done % LOG_EVERY == 0 or epoch_ends or done == total:
                    self.minimizer.check()
                    if done % LOG_EVERY == 0:
                        self._log(done, lr, board)
                # Processes must stop at the same step; to agree costs them a wait, so not at each.
                agree = distributed.world() == 1 or epoch_ends or done % LOG_EVERY == 0
                asked = stop.number is not None
                stopping = agree and distributed.any_process(asked, self.device)
                if epoch_ends and ((clock.epoch + 1) % config.eval_every == 0 or done == total):
                    text = self._evaluate(done, clock.epoch + 1, board)
                if epoch_ends or stopping:
                    self.minimizer.check()
                    self._save(done, clock.epoch + 1 if epoch_ends else 0)
                progress(before + done, before + total, text)
                if stopping:
                    raise Interrupted(stop.number or signal.SIGTERM, done)
        record = self._record()
        if self.main:
            self.folder.write_record(record)
        return record

    def stage(
        self,
        resume: bool,
        progress: Callable[[int, int, str], None],
        name: str,
        config: Config,
        labels: PseudoLabels | None = None,
    ) -> Callable[[str | int], Method]:
        """Train a stage that comes before, in a folder `name` in this run's, unless it is done.

        Returns a function that loads its method, as at a checkpoint (see `trained.load`).
        """
        out, done, began = self.folder.path / name, len(self.stages), time.monotonic()

        def show(step: int, steps: int, text: str) -> None:  # all stages get equal parts of the bar
            now, total = round((done + step / steps) * self.steps), self.method.stages * self.steps
            progress(now, total, f"{name} {text}")

        record = fit(config, out=out, resume=resume, progress=show, labels=labels)
        self.seconds += record["seconds"] - (time.monotonic() - began)  # also if trained before
        kept = ("labeled", "unlabeled", "steps", "images_seen", "seconds")
        mious = {when: records.score(record, when=when) for when in ("last", "best")}
        self.stages.append({"stage": name, **{key: record[key] for key in kept}, **mious})
        path = RunFolder(out, config).path
        return lambda checkpoint: trained.load(path, checkpoint, config.device).method

    def _step(self, clock: Clock) -> float:
        """One update, from `accumulate` batches. Returns the learning rate."""
        seed_noise(self.config, clock.step)
        parts, batches = self.config.accumulate, self.loader.steps_per_epoch
        first = clock.step % self.steps_per_epoch * parts  # a last update is filled from the start
        for part in range(parts):
            lr = self.minimizer.begin(clock, last=part == parts - 1)
            batch = self.loader[clock.epoch * batches + (first + part) % batches]
            amp = self.config.amp
            with torch.autocast(self.device.type, AMP.get(amp), enabled=amp != "off"):
                losses = train_step(self.method, batch, clock, self.minimizer, self.config.warmup)
            for name, value in losses.items():
                self.sums[name] = self.sums.get(name, 0) + value.detach() / parts
                self.logged[name] = self.logged.get(name, 0) + 1
        return lr

    def _log(self, step: int, lr: float, board) -> None:
        means = {
            name: float(distributed.mean(value)) / (self.logged[name] / self.config.accumulate)
            for name, value in self.sums.items()
        }
        self.sums, self.logged = {}, {}
        if self.main:
            self.folder.log({"kind": "train", "step": step, "of": self.steps, "lr": lr, **means})
            for name, value in means.items():
                if board:
                    board.add_scalar(f"train/{name}", value, step)

    def _evaluate(self, step: int, epoch: int, board) -> str:
        """Evaluate every network, keep the best deployed weights; returns a line of text."""
        # Images of many sizes would each be compiled.
        eager = torch.compiler.set_stance("force_eager") if self.compiled else None
        with eager or contextlib.nullcontext():
            counts = count(
                evaluated(self.method),
                self.held_out,
                self.held_out_indices,
                self.normalise,
                self.device,
                self.evaluation,
            )
        found = scores(counts, self.evaluation.absent)
        self.last = {name: {**score, "epoch": epoch} for name, score in found.items()}
        for name, score in self.last.items():
            if name not in self.best or score["miou"] > self.best[name]["miou"]:
                self.best[name] = score
                if name == self.method.deployed and self.main:
                    self.folder.save_best(self.method.state_dict())
        if self.main:
            per_image = {name: counts[name].confusion.int().cpu() for name in counts}
            ids = [self.held_out.ids[i] for i in self.held_out_indices]
            self.folder.save_counts({"ids": ids, "epoch": epoch, "confusion": per_image})
        mious = {name: score["miou"] for name, score in self.last.items()}
        if self.main:
            self.folder.log(
                {"kind": "eval", "step": step, "of": self.steps, "epoch": epoch, "miou": mious}
            )
            for name, value in mious.items():
                if board:
                    board.add_scalar(f"miou/{name}", value, step)
        return " ".join(f"{name} {value:.1f}" for name, value in mious.items()) + " mIoU"

    def _save(self, step: int, epoch: int) -> None:
        self.sums = {name: distributed.mean(value) for name, value in self.sums.items()}
        if self.main:
            state = {
                "step": step,
                "of": self.steps,
                "method": self.method.state_dict(),
                "minimizer": self.minimizer.state_dict(),
                "sums": {name: float(value) for name, value in self.sums.items()},
                "logged": self.logged,
                "best": self.best,
                "last": self.last,
                "seconds": self.seconds,
            }
            self.folder.save(state, epoch)

    def _restore(self) -> int:
        """Take over the checkpoint's state; returns the number of steps done."""
        state = self.folder.load()
        late = [e for e in self.folder.missing() if e * self.steps_per_epoch <= state["step"]]
        if late:
            raise ValueError(
                f"{self.folder.path}: is past epoch {late[0]} and kept no snapshot of it: restart "
                f"begins again"
            )
        try:
            self.method.load_state_dict(state["method"])
            self.minimizer.load_state_dict(state["minimizer"])
        except (RuntimeError, KeyError, ValueError) as error:
            raise ValueError(
                f"{self.folder.checkpoint}: does not fit this method ({error})"
            ) from error
        self.sums = {
            name: torch.tensor(value, device=self.device) for name, value in state["sums"].items()
        }
        self.logged, self.best, self.last = state["logged"], state["best"], state["last"]
        self.seconds = state["seconds"]
        if self.main:
            self.folder.cut_metrics(state["metrics_bytes"])
        return state["step"]

    def _tensorboard(self, step: int):
        if not (self.config.tensorboard and self.main):
            return None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError(
                "tensorboard=true, but the package is not installed: pip install tensorboard"
            ) from None
        return SummaryWriter(self.folder.path / "tensorboard", purge_step=step)

    def _record(self) -> dict:
        config = self.config
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
        unlabeled = config.unlabeled_batch if self.method.uses_unlabeled else 0
        return {
            "run_id": config.run_id,
            "config": config.to_dict(),
            "method_source": method_source(config.method, config.dataset),
            "split_sha256": self.split.sha256,
            "labeled": len(self.split.labeled),
            "unlabeled": len(self.loader.unlabeled) if self.method.uses_unlabeled else 0,
            "classes": list(self.held_out.classes),
            "steps": self.steps,
            "images_seen": self.steps * config.accumulate * (config.batch + unlabeled)
            + sum(stage["images_seen"] for stage in self.stages),
            "seconds": round(self.seconds, 1),
            "peak_memory_bytes": peak,
            "evaluation": {
                "part": config.eval_part,
                "images": len(self.held_out_indices),
                "rule": config.evaluation,
                **self.evaluation.to_dict(),
            },
            "deployed": self.method.deployed,
            "networks": {
                name: {"last": self.last[name], "best": self.best[name]} for name in self.last
            },
            **({"stages": self.stages} if self.stages else {}),
            "world_size": distributed.world(),
            **records.surroundings(self.device),
        }
