"""The records of measurements, `bench-*.json` in a folder, as Markdown for the book's page."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from .commands import SUITES


def steps(folder: str | Path) -> str:
    """Of `s4 bench step`; rows of the suite that no GPU has measured yet are blank."""
    header = "method | network | crop | precision | images/s | ms | GiB | TFLOP/s | of matmul"

    def cells(row: dict) -> str:
        kind = row["amp"] + (", compiled" if row["compile"] else "")
        if "failed" in row:
            numbers = f"{row['failed']} | | | |"
        elif "step_ms" not in row:
            numbers = "| | | |"
        else:
            numbers = f"{row['images_per_second']:.1f} | {row['step_ms']:.1f} | "
            numbers += f"{row['peak_memory_bytes'] / 2**30:.2f} | {row['tflops']:.3f} | "
            numbers += f"{100 * row['share_of_matmul']:.0f} %"
        return f"{row['method']} | {row['net']} | {_by(row['crop'])} | {kind} | {numbers}"

    found = list(_records(folder, "step"))
    lines = _table(header, found, cells)
    if not any(record["suite"] == "voc" for record in found):
        lines += [f"| {cells({'amp': 'off', 'compile': False, **row})} |" for row in SUITES["voc"]]
    return "\n".join(lines)


def loaders(folder: str | Path) -> str:
    """Of `s4 bench data`: milliseconds of CPU per image; `released` is UniMatch's pipeline."""
    header = "images | views | decode | resize, crop | colour | images/s | released: images/s"

    def cells(row: dict) -> str:
        each = {key: 1e3 * row[key] / row["images"] for key in ("decode", "weak", "strong")}
        rate = row["images"] / sum(row[key] for key in each)
        views = f"{row['augment']}, {_by(row['crop'])}, {row['strong_views']} strong"
        size = _by((row["height"], row["width"]))
        released = f"{row['images'] / row['released']:.1f}" if row["released"] else ""
        times = " | ".join(f"{ms:.2f}" for ms in each.values())
        return f"{row['dataset']}, {size} | {views} | {times} | {rate:.1f} | {released}"

    return "\n".join(_table(header, _records(folder, "data"), cells))


def evaluations(folder: str | Path) -> str:
    """Of `s4 bench eval`."""
    header = "method | network | networks evaluated | rule | image | images/s"

    def cells(row: dict) -> str:
        what = f"{row['method']} | {row['net']} | {row['networks']} | {row['evaluation']}"
        return f"{what} | {_by(row['size'])} | {row['images_per_second']:.1f}"

    return "\n".join(_table(header, _records(folder, "eval"), cells))


def _records(folder: str | Path, kind: str) -> Iterator[dict]:
    for path in sorted(Path(folder).glob("bench-*.json")):
        record = json.loads(path.read_text("utf8"))
        if record["kind"] == kind:
            yield record


def _table(header: str, found: list[dict] | Iterator[dict], cells: Callable) -> list[str]:
    width = header.count("|") + 1
    lines = [f"| {header} |", "|" + " --- |" * width]
    for record in found:
        lines += [f"| {cells(row)} |" for row in record["rows"]]
        lines.append(f"| *{record['device']}, torch {record['versions']['torch']}* " + "|" * width)
    return lines


def _by(size) -> str:
    return " x ".join(f"{round(side)}" for side in size)
