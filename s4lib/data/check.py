"""Is a folder fit to train on? Every file is opened, and one report says what was found."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..losses import IGNORE
from ..progress import Progress
from . import DATASETS
from .images import Images

SHOWN = 20  # problems that are printed


@dataclass
class Part:
    """What was found in one part of a dataset."""

    images: Images
    sizes: Counter = field(default_factory=Counter)
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(IGNORE + 1, dtype=np.int64))
    present: np.ndarray = field(default_factory=lambda: np.zeros(IGNORE + 1, dtype=np.int64))


def detect(root: Path) -> str:
    """The dataset whose layout a folder has. Raises ValueError if it has none."""
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    signs = {
        "folder": ["dataset.yaml"],
        "cityscapes": ["leftImg8bit"],
        "voc": ["JPEGImages", "VOC2012/JPEGImages", "VOCdevkit/VOC2012/JPEGImages"],
        "camvid": ["trainannot"],
    }
    for name, paths in signs.items():
        if any((root / path).exists() for path in paths):
            return name
    expected = "; ".join(f"{name}: {' or '.join(paths)}" for name, paths in signs.items())
    raise ValueError(f"{root}: the layout of no dataset ({expected})")


def check(root: Path, dataset: str = "") -> tuple[str, list[str]]:
    """(report, problems) of the dataset in a folder; without problems, training would work.

    Raises:
        ValueError: no folder, unknown dataset, or not its layout.
    """
    dataset = dataset or detect(root)
    valid = [name for name in DATASETS if name != "mosaic"]
    if dataset not in valid:
        raise ValueError(f"dataset={dataset!r}: choose one of {', '.join(valid)}")
    parts: dict[str, Part] = {}
    problems: list[str] = []
    notes: list[str] = []  # what is missing, but not needed
    for name in ("train", "val", "test"):
        try:
            parts[name] = Part(DATASETS[dataset](name, root=str(root)))
        except ValueError as error:
            (notes if name == "test" else problems).append(f"{name}: {error}")
    if not parts:
        raise ValueError(problems[0].split(": ", 1)[1])
    bar = Progress("check", sum(len(part.images) for part in parts.values()))
    done = 0
    for name, part in parts.items():
        pool = ThreadPoolExecutor(4)
        annotated = set(part.images.annotated())
        look = functools.partial(_look, part.images, annotated)
        try:
            for found in pool.map(look, range(len(part.images))):
                done += 1
                bar.update(done, name)
                if isinstance(found, str):
                    problems.append(found)
                    continue
                size, pixels = found
                part.sizes[size] += 1
                part.pixels += pixels
                part.present += pixels > 0
        finally:
            pool.shutdown(cancel_futures=True)
    bar.close()
    problems += _across(parts)
    return _report(root, dataset, parts, problems, notes), problems


def _look(
    images: Images, annotated: set[int], index: int
) -> tuple[tuple[int, int], np.ndarray] | str:
    """((height, width), pixels of each label value; none if not annotated), or what is wrong."""
    try:
        image, label = images.read(index)
    except ValueError as error:
        return str(error)
    seen = label.ravel() if index in annotated else label[:0].ravel()
    return image.shape[:2], np.bincount(seen, minlength=IGNORE + 1)


def _across(parts: dict[str, Part]) -> list[str]:
    """Problems of whole parts."""
    problems = []
    files = {name: {image for image, _ in part.images.pairs} for name, part in parts.items()}
    for name, part in parts.items():
        count, needed = len(part.images.annotated()), 1 if name == "train" else len(part.images)
        if name != "test" and count < needed:
            problems.append(f"{name}: {count} of {len(part.images)} images are annotated")
    for one, other in itertools.combinations(files, 2):
        if both := files[one] & files[other]:
            what = f"{len(both)} images are in {one} and in {other}"
            problems.append(f"{what}, for instance {min(both)}")
    return problems


def _report(
    root: Path, dataset: str, parts: dict[str, Part], problems: list[str], notes: list[str]
) -> str:
    lines = [f"{dataset} in {root}"]
    for name, part in parts.items():
        images, total = part.images, max(int(part.pixels.sum()), 1)
        line = f"{name}: {images.note or f'{len(images)} images'}; "
        line += f"{len(images.annotated())} annotated, void {part.pixels[IGNORE] / total:.1%}"
        lines.append(f"{line}; {_sizes(part.sizes)}")
    lines += notes
    classes = next((part.images.classes for part in parts.values()), ())
    if classes:
        width = max(map(len, classes))
        heads = "".join(f"{name:>9} {'images':>7}" for name in parts)
        lines += ["", f"{'share of pixels':{width}}{heads}"]
    for k, label in enumerate(classes):
        cells = ""
        for part in parts.values():
            valid = max(int(part.pixels[: len(classes)].sum()), 1)
            cells += f"{part.pixels[k] / valid:9.2%} {part.present[k]:7d}"
        lines.append(f"{label:{max(width, 15)}}{cells}")
    lines.append("")
    lines += problems[:SHOWN]
    if len(problems) > SHOWN:
        lines.append(f"... and {len(problems) - SHOWN} more problems")
    verdict = f"{len(problems)} problems: training would fail" if problems else "fit to train on"
    return "\n".join([*lines, verdict])


def _sizes(sizes: Counter) -> str:
    if not sizes:
        return "no readable image"
    (height, width), count = sizes.most_common(1)[0]
    if len(sizes) == 1:
        return f"all {height} x {width} pixels"
    low, high = (tuple(f(s[i] for s in sizes) for i in (0, 1)) for f in (min, max))
    return (
        f"{low[0]} x {low[1]} to {high[0]} x {high[1]} pixels (height x width), "
        f"{count} are {height} x {width}"
    )
