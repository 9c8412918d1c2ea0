"""What a step costs in several processes: measured (`s4 bench ranks`), modelled, and compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..bench.ranks import mode
from .tables import Table


def predicted(
    compute: float, calls: float, sent: float, ranks: int, latency: float, bandwidth: float
) -> float:
    """Seconds of a step: compute, then all-reduces of `sent` bytes in `calls` pieces on a ring.

    Nothing overlaps, as in `Minimizer`. 2 (N - 1) / N of the bytes leave each process.
    """
    if ranks == 1:
        return compute
    return compute + calls * latency + 2 * (ranks - 1) / ranks * sent / bandwidth


def rate(row: dict) -> float:
    """Images a second of all processes; those of one run are as fast as the slowest."""
    each = [row["step_ms"]] * row["ranks"] if row["together"] else row["each_ms"]
    return sum(1e3 * row["images"] / ms for ms in each)


def measured(folder: str | Path) -> Table:
    """All rows of `bench-ranks-*.json`, and one that says so where no GPU has measured."""
    header = "measured on|processes|images of each|mode|ms a step|averages|calls|MB"
    rows, devices = [], []
    for path in sorted(Path(folder).glob("bench-ranks-*.json")):
        record = json.loads(path.read_text("utf8"))
        devices.append(record["device"])
        device = "CPU" if record["device"].startswith("CPU") else record["device"]
        about = "{}, {method}, {net}".format(device, **record["config"])
        for r in record["rows"]:
            share = f"{r['average_ms'] / r['step_ms']:.0%}" if r["together"] else ""
            numbers = [f"{r['step_ms']:.1f}", share, r["calls"], f"{r['bytes'] / 1e6:.2f}"]
            rows.append([about, r["ranks"], r["images"], mode(r), *numbers, f"{rate(r):.0f}"])
    if all(device.startswith("CPU") for device in devices):
        rows.append(["GPU: not measured", *[""] * 8])
    return Table(
        [*header.split("|"), "images/s"], rows, "Measured; averages: their share of the step."
    )


def checked(record: dict) -> tuple[Table, dict]:
    """The model against a record's steps, with the idle link's latency and with a calibrated one.

    That is calibrated on one point: SyncBN, fewest processes, smallest batch. The dictionary has
    the `point`, its seconds a call (`waiting`), those of an `idle` link, and the largest errors in
    percent, `worst`, by mode: {mode: (idle, calibrated)}.
    """
    apart = {(r["ranks"], r["batch"]): r["step_ms"] for r in record["rows"] if not r["together"]}
    together = [r for r in record["rows"] if r["together"]]
    point = min((r for r in together if r["sync_bn"]), key=lambda r: (r["ranks"], r["batch"]))

    def model(r: dict, **changes: float) -> float:
        link = {**record["links"][str(r["ranks"])], **changes}
        alone = apart[r["ranks"], r["batch"]] / 1e3
        return 1e3 * predicted(alone, r["calls"], r["bytes"], r["ranks"], **link)

    waiting = (point["step_ms"] - model(point, latency=0.0)) / 1e3 / point["calls"]
    rows, worst = [], {}
    for r in together:
        values = model(r), model(r, latency=waiting)
        errors = [100 * (value / r["step_ms"] - 1) for value in values]
        cells = [f"{v:.1f} ({e:+.0f} %)" for v, e in zip(values, errors, strict=True)]
        if r is point:
            errors[1], cells[1] = 0.0, "the point"
        before = worst.get(mode(r), (0.0, 0.0))
        worst[mode(r)] = tuple(max(a, abs(e)) for a, e in zip(before, errors, strict=True))
        rows.append([r["ranks"], r["images"], mode(r), f"{r['step_ms']:.1f}", *cells])
    header = ["processes", "images of each", "mode", "measured ms", "idle link", "calibrated"]
    table = Table(header, rows, "Steps: measured, and predicted (error in percent).")
    idle = record["links"][str(point["ranks"])]["latency"]
    return table, {"point": point, "waiting": waiting, "idle": idle, "worst": worst}


def batch_statistics(features: Tensor, sizes: Sequence[int], draws: int = 500) -> dict:
    """How much batch normalisation's mean and variance vary with the images that it sees.

    Args:
        features: (M, C, h, w) of M images; batches of `sizes` are drawn from them, with
            replacement.

    Returns:
        {"mean": one number per size, "variance": ...}: standard deviation over batches, the mean's
        in units of a channel's own, the variance's of the variance; median over channels.
    """
    values, generator = features.double().cpu().flatten(2), torch.Generator().manual_seed(0)
    first, second = values.mean(2), values.square().mean(2)
    whole = (second.mean(0) - first.mean(0).square()).clamp(min=0)
    found = {"mean": [], "variance": []}
    for size in sizes:
        drawn = torch.randint(len(values), (draws, size), generator=generator)
        mean, square = first[drawn].mean(1), second[drawn].mean(1)
        found["mean"].append((mean.std(0) / whole.sqrt())[whole > 0].median().item())
        spread = (square - mean.square()).std(0)
        found["variance"].append((spread / whole)[whole > 0].median().item())
    return found
