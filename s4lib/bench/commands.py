"""`s4 bench step` and `s4 bench eval`: a table on the screen, a record in a file.

s4 bench step --suite voc --out book/records/bench-voc.json      # everything, on a GPU
s4 bench step --method cutmix_seg --net light --crop 96 96 --amp bf16 --compile
"""

from __future__ import annotations

import json
import multiprocessing
import types
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import jsonargparse
import torch

from .. import distributed, records
from ..build import build_method, network_of
from ..config import Config
from ..evaluate import count, evaluated, evaluation, normaliser
from ..run_folder import write_atomically
from .parts import Clocks
from .step import CLASSES, Noise, bench_step

_VOC = {"net": "unimatch-resnet101", "augment": "unimatch", "optimizer": "sgd", "lr": 1e-3}
_FAST = {"amp": "bf16", "compile": True}
_CPU = {"net": "light", "crop": [96, 96]}
# Changes to a Config. On a GPU, those without `amp` and `compile` run as a plain program would.
SUITES: types.MappingProxyType[str, list[dict]] = types.MappingProxyType(
    {
        "voc": [
            {**_VOC, "method": name, "crop": [side, side], **fast}
            for name in (
                "supervised",
                "mean_teacher",
                "cutmix_seg",
                "unimatch",
                "gta_seg",
                "ps_mt",
                "gps",
            )
            for side in (321, 513)
            for fast in ({}, _FAST)
        ],
        "cpu": [
            {**_CPU, "method": name}
            for name in ("supervised", "mean_teacher", "cutmix_seg", "gta_seg", "ps_mt", "gps")
        ],
    }
)


def bench_eval(config: Config, count_images: int = 32) -> dict:
    """Images a second of an evaluation of every network by `config.evaluation`, on noise."""
    device, images = distributed.start(config.device), Noise(config.size or (360, 480))
    built = build_method(config, CLASSES).to(device)
    net, clocks, rule = network_of(built), Clocks(device), config.evaluation
    arguments = normaliser(net.mean, net.std, device), device, evaluation(rule, config.eval_args)
    for number in (2, count_images):  # the first one allocates
        began = clocks.now()
        count(evaluated(built), images, [i % len(images) for i in range(number)], *arguments)
        spent = clocks.now() - began
    return {
        "method": config.method, "net": config.net, "size": list(images.size), "evaluation": rule,
        "networks": len(evaluated(built)), "images_per_second": count_images / spent,
    }  # fmt: skip


def main(parser: jsonargparse.ArgumentParser, arguments: list[str]) -> int:
    """The two commands. Raises ValueError for bad input."""
    parser.add_argument("--suite", choices=list(SUITES), help="measure all of these instead")
    for name in ("method", "net", "amp", "evaluation", "augment", "device"):
        parser.add_argument(f"--{name}", default=getattr(Config, name))
    for name in ("batch", "unlabeled_batch"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Config, name))
    for name, default in (("crop", [96, 96]), ("size", [360, 480])):
        parser.add_argument(f"--{name}", type=int, nargs=2, default=default)
    parser.add_argument("--compile", action="store_true", help="through torch.compile")
    parser.add_argument("--count", type=int, default=10, help="steps, or images to evaluate")
    parser.add_argument("--out", default="", help="JSON file to write")
    given = parser.parse_args(arguments).as_dict()
    what, suite, number, out = (given.pop(key) for key in ("what", "suite", "count", "out"))
    measure, chosen = (bench_step if what == "step" else bench_eval), SUITES.get(suite, [{}])
    configs = [Config.from_dict({**given, **changes}) for changes in chosen]
    frame = {
        "kind": what,
        "suite": suite,
        **records.surroundings(distributed.start(configs[0].device)),
    }
    rows = _begun(Path(out), frame, len(configs)) if suite and out else []
    if rows:
        print(f"{out}: goes on after {len(rows)} of {len(configs)} rows", flush=True)
    for config in configs[len(rows) :]:
        rows.append(_alone(measure, config, number) if suite else measure(config, number))
        print(_line(rows[-1]), flush=True)
        if out:
            write(Path(out), {**frame, "rows": rows})
    return 0


def write(path: Path, record: dict) -> None:
    """Write a record of measurements, whole or not at all. Raises OSError."""
    text = json.dumps(record, indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def _begun(path: Path, frame: dict, wanted: int) -> list[dict]:
    """Rows of a suite that was stopped: same device and versions, and not all there."""
    old = json.loads(path.read_text("utf8")) if path.is_file() else {}
    same = all(old.get(key) == frame[key] for key in ("kind", "suite", "device", "versions"))
    return old["rows"] if same and len(old["rows"]) < wanted else []


def _alone(measure: Callable[[Config, int], dict], config: Config, number: int) -> dict:
    """Measure in a fresh process, whose memory is this row's alone; too little of it is a row."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(measure, config, number).result()
        except torch.OutOfMemoryError:
            what = {key: getattr(config, key) for key in ("method", "net", "amp", "compile")}
            return {**what, "crop": list(config.crop), "failed": "out of memory"}


def _line(row: dict) -> str:
    if "evaluation" in row:
        return (
            f"{row['method']} {row['net']} {row['size']} {row['evaluation']}: "
            f"{row['images_per_second']:.1f} images/s, {row['networks']} networks"
        )
    kind = f"{row['amp']}{', compiled' if row['compile'] else ''}"
    if "failed" in row:
        return f"{row['method']} {row['net']} {row['crop']}, {kind}: {row['failed']}"
    parts = ", ".join(f"{name} {ms:.1f}" for name, ms in row["parts_ms"].items())
    return (
        f"{row['method']} {row['net']} {row['crop']} x {row['batch']}, {kind}: "
        f"{row['images_per_second']:.1f} images/s, {row['step_ms']:.1f} ms ({parts}), "
        f"{row['peak_memory_bytes'] / 2**30:.2f} GiB, {row['tflops']:.3f} TFLOP/s, "
        f"{100 * row['share_of_matmul']:.0f} % of a matrix product's"
    )
