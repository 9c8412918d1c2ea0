"""`s4 bench ranks`: a training step in several processes, with and without their exchange.

s4 bench ranks --ranks 1 2 4 8 --method gta_seg --net unimatch-resnet101 --crop 321 321 --amp bf16
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import jsonargparse
import torch
import torch.distributed as dist

from .. import distributed, records
from ..build import build_method
from ..config import Config
from ..runs import cores, torchrun
from .commands import write
from .step import CLASSES, prepare

COLLECTIVES = ("all_reduce", "all_gather", "all_gather_single")  # the last: torch's SyncBatchNorm


def seconds(call: Callable[[], object], times: int, device: torch.device) -> float:
    """Median on the wall's clock: a process that waits for others uses no time of its own."""
    found = []
    for _ in range(times):
        distributed.barrier()
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def link(device: torch.device, times: int) -> dict:
    """Seconds of an all-reduce of one number, and bytes a second of one of 64 MiB."""
    one, many = (torch.ones(n, device=device) for n in (1, 2**24))
    latency = seconds(lambda: dist.all_reduce(one), 20 * times, device)
    share = 2 * (distributed.world() - 1) / distributed.world()
    rest = seconds(lambda: dist.all_reduce(many), times, device) - latency
    return {"latency": latency, "bandwidth": share * many.nbytes / rest}


def exchanged(step: Callable[[], object]) -> tuple[list[float], list[list[torch.nn.Parameter]]]:
    """Bytes of each call in one step, and the parameters of each update.

    A gather on a ring moves what an all-reduce of N / 2 times its input does, and counts as that.
    """
    sizes, updates, average = [], [], distributed.average_gradients

    def watched(call: Callable, *tensors, gathers: bool, **options):
        sizes.append(tensors[gathers].nbytes * (distributed.world() / 2 if gathers else 1))
        return call(*tensors, **options)

    watch = {c: functools.partial(watched, getattr(dist, c), gathers="g" in c) for c in COLLECTIVES}
    noted = lambda parameters: (updates.append(parameters), average(parameters))  # noqa: E731
    with patch.multiple(dist, **watch), patch.object(distributed, "average_gradients", noted):
        step()
    return sizes, updates


def measured(config: Config, batch: int, device: torch.device, steps: int) -> dict:
    """A row: a step as a whole, what it exchanges, and the averages of its gradients alone."""
    world = distributed.world()
    config = replace(config, batch=batch * world, unlabeled_batch=batch * world)
    built, _, loader, step = prepare(config, device)
    run = functools.partial(step, 0, loader[0])
    run()  # the first one allocates
    sizes, updates = exchanged(run)
    whole = seconds(run, steps, device)
    average = seconds(lambda: [*map(distributed.average_gradients, updates)], steps, device)
    return {
        "together": world > 1, "sync_bn": world > 1 and config.sync_bn, "batch": batch,
        "images": batch * (1 + built.uses_unlabeled), "step_ms": 1e3 * whole,
        "average_ms": 1e3 * average * (world > 1), "calls": len(sizes), "bytes": sum(sizes),
        "gradient_bytes": sum(4 * p.numel() for parameters in updates for p in parameters),
    }  # fmt: skip


def worker(config: str, batches: str, steps: str, out: str) -> None:
    """A process of torchrun's: first it trains beside the others, then together with them.

    `each_ms` has all processes' times; `step_ms` is the slowest's, for which the others wait.
    """
    asked, ranks = Config.from_dict(json.loads(config)), int(os.environ["WORLD_SIZE"])
    with patch.object(distributed, "launched", lambda: False):
        cuda = asked.device != "cpu" and torch.cuda.is_available()
        device = distributed.start(f"cuda:{os.environ['LOCAL_RANK']}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    rows = []
    for sync_bn in (None, True, False)[: 1 if ranks == 1 else 3]:
        if sync_bn is not None:
            distributed.start(asked.device)
        each = replace(asked, sync_bn=bool(sync_bn))
        rows += [measured(each, batch, device, int(steps)) for batch in json.loads(batches)]
    times = distributed.gather(torch.tensor([[row["step_ms"] for row in rows]], device=device))
    for row, column in zip(rows, times.T.tolist(), strict=True):
        row |= {"ranks": ranks, "each_ms": column, "step_ms": max(column)}
    found = {"rows": rows, **records.surroundings(device)}
    if ranks > 1:
        found["link"] = link(device, int(steps))
    if distributed.rank() == 0:
        Path(out).write_text(json.dumps(found))
    distributed.stop()


def mode(row: dict) -> str:
    """How the processes of a measured row trained."""
    return ("SyncBN" if row["sync_bn"] else "own BN") if row["together"] else "apart"


def launch(config: Config, ranks: int, batches: list[int], steps: int) -> dict:
    """What `ranks` workers found. Raises ValueError if one failed."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "found.json")
        given = [json.dumps(config.to_dict()), json.dumps(batches), str(steps), str(file)]
        command = torchrun(ranks, "s4lib.bench.ranks", *given)
        if subprocess.call(command, env={"OMP_NUM_THREADS": "1", **os.environ}):
            raise ValueError(f"ranks={ranks}: a process failed, see above")
        return json.loads(file.read_text())


def main(parser: jsonargparse.ArgumentParser, arguments: list[str]) -> int:
    """`s4 bench ranks`. Raises ValueError for bad input, or if a process fails."""
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="processes")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8], help="of a process")
    for name in ("method", "net", "amp", "augment", "device"):
        parser.add_argument(f"--{name}", default=getattr(Config, name))
    parser.add_argument("--crop", type=int, nargs=2, default=[96, 96])
    parser.add_argument("--count", type=int, default=10, help="steps of each measurement")
    parser.add_argument("--out", default="", help="JSON file to write")
    given = parser.parse_args(arguments).as_dict()
    _, ranks, batches, count, out = (given.pop(k) for k in "what ranks batches count out".split())
    config = Config.from_dict(given)
    build_method(config, CLASSES)  # complain before processes start
    cuda = distributed.start(config.device).type == "cuda"
    room = {
        "ranks": torch.cuda.device_count() if cuda else cores(),
        "batches": 64,
        "count": 1000,
    }
    for name, values in (("ranks", ranks), ("batches", batches), ("count", [count])):
        for value in values:
            if not 1 <= value <= room[name]:
                raise ValueError(f"{name}={value}: choose from 1 to {room[name]}")
    record = {"kind": "ranks", "config": given, "links": {}, "rows": []}
    for n in ranks:
        found = launch(config, n, batches, count)
        for row in found["rows"]:
            shown = f"{n} x {row['images']} images, {mode(row)}: {row['step_ms']:.1f} ms, of which "
            shown += f"{row['average_ms']:.1f} averages; {row['calls']} calls"
            print(f"{shown}, {row['bytes'] / 1e6:.2f} MB", flush=True)
        record["rows"] += found.pop("rows")
        record["links"] |= {str(n): found.pop("link")} if n > 1 else {}
        record |= found
    if out:
        write(Path(out), record)
    return 0


if __name__ == "__main__":
    worker(*sys.argv[1:])
