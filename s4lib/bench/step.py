"""Speed and memory of a training step by its parts, on images of noise."""

from __future__ import annotations

import resource

import numpy as np
import torch
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from .. import distributed, method, minimizer
from ..build import build_method, network_of
from ..config import Config
from ..data.families import build_views
from ..data.images import Images
from ..data.loader import Loader
from ..data.splits import Split
from ..method import Clock
from ..speed import compile_networks, keep_freed_memory
from ..trainer import AMP, seed_noise
from .parts import Clocks, parts_timed

CLASSES = 21


class Noise(Images):
    """Images and labels of noise, in memory."""

    def __init__(self, size: tuple[int, int], number: int = 64):
        super().__init__()
        self.classes = tuple(map(str, range(CLASSES)))
        self.ids, self.size = list(map(str, range(number))), size

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(index)
        image = rng.integers(0, 256, (*self.size, 3), dtype=np.uint8)
        return image, rng.integers(0, CLASSES, self.size, dtype=np.uint8)


def matmul_rate(device: torch.device, amp: str) -> float:
    """FLOP/s of a large matrix product in the precision of `amp`, the best of ten."""
    side, kind = (8192 if device.type == "cuda" else 1024), AMP.get(amp, torch.float32)
    a, clocks, best = torch.randn(side, side, device=device, dtype=kind), Clocks(device), []
    for _ in range(10):
        began = clocks.now()
        a @ a
        best.append(clocks.now() - began)
    return 2 * side**3 / min(best)


def prepare(config: Config, device: torch.device) -> tuple:
    """What a measurement repeats: (method, minimizer, loader of noise, step(number, batch))."""
    keep_freed_memory()
    size = config.crop or (96, 96)
    images, clock = Noise(size), Clock(5000, 100, 100)  # warm-ups are over
    built = build_method(config, CLASSES).to(device)
    if config.sync_bn:
        distributed.synchronise_batch_norm(built, device)
    net = network_of(built)
    minimize = minimizer.Minimizer(built, config, device)
    split = Split(tuple(range(32)), tuple(range(32, 64)), "")
    loader = Loader(
        images, split, build_views(config, size, net.mean), built, batch=config.batch,
        unlabeled_batch=config.unlabeled_batch, seed=0, mean=net.mean, std=net.std, device=device,
        prefetch=False,
    )  # fmt: skip

    def step(number: int, batch: method.Batch) -> None:
        seed_noise(config, number)
        minimize.begin(clock)
        with torch.autocast(device.type, AMP.get(config.amp), enabled=config.amp != "off"):
            built.step(batch, clock, minimize)

    return built, minimize, loader, step


def bench_step(config: Config, steps: int = 10) -> dict:
    """Figures of `steps` training steps of a config, after three that warm up.

    Without `compile` and `amp` the layout is plain too, as a program's that knows of no tuning.

    Raises:
        ValueError: bad config, or fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: choose 1 or more")
    device = distributed.start(config.device)
    size = config.crop or (96, 96)
    built, minimize, loader, step = prepare(config, device)
    clocks = Clocks(device)
    make = clocks.timed("data", loader._make)
    plain = config.amp == "off" and not config.compile and device.type == "cuda"
    if plain:
        built.to(memory_format=torch.contiguous_format)

    def batch_of(number: int) -> method.Batch:
        batch = make(number)
        if not plain:
            return batch
        return tree_map_only(torch.Tensor, torch.Tensor.contiguous, batch)

    batch = batch_of(0)
    with FlopCounterMode(display=False) as flops:
        step(0, batch)
    compiled = config.compile and compile_networks(built, device)
    for number in range(3):
        step(number, batch)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for number in range(steps):
        began = clocks.now()
        step(number, batch)
        seconds.append(clocks.now() - began)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # of the whole process
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device)
    clocks.spent.clear()
    with parts_timed(built, minimize, clocks):
        whole = clocks.timed("rest", step)
        for number in range(steps):
            whole(number, batch_of(number))
    seen = config.batch + config.unlabeled_batch * built.uses_unlabeled
    each = float(np.median(seconds))
    found, rate = flops.get_total_flops() / each, matmul_rate(device, config.amp)
    return {
        "method": config.method, "net": config.net, "crop": list(size), "batch": seen,
        "amp": config.amp, "compile": compiled, "images_per_second": seen / each,
        "step_ms": 1e3 * each, "parts_ms": {k: 1e3 * v / steps for k, v in clocks.spent.items()},
        "peak_memory_bytes": memory, "tflops": found / 1e12, "matmul_tflops": rate / 1e12,
        "share_of_matmul": found / rate,
    }  # fmt: skip
