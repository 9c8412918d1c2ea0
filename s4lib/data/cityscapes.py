"""Cityscapes: 2975 / 500 / 1525 street scenes of 2048 x 1024 pixels, 19 classes and void.

Cordts et al., "The Cityscapes dataset for semantic urban scene understanding" (2016). Expected in
`root`, as the two archives unpack:

    leftImg8bit/{train,val,test}/CITY/ID_leftImg8bit.png         ID = CITY_000000_000019
    gtFine/{train,val}/CITY/ID_gtFine_labelTrainIds.png          19 classes, 255 is void; or else
    gtFine/{train,val}/CITY/ID_gtFine_labelIds.png               the 34 ids as published

An image without either file has no annotation; those of "test" are withheld.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .images import ImageFiles

# Published ids of the 19 classes that are trained and evaluated; the others of 0 to 33 are void.
IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
VOID = tuple(sorted(set(range(34)) - set(IDS)))


class Cityscapes(ImageFiles):
    """Cityscapes scenes; see the module's text for the folder layout."""

    classes = (
        "road",
        "sidewalk",
        "building",
        "wall",
        "fence",
        "pole",
        "traffic light",
        "traffic sign",
        "vegetation",
        "terrain",
        "sky",
        "person",
        "rider",
        "car",
        "truck",
        "bus",
        "train",
        "motorcycle",
        "bicycle",
    )
    colors = np.array(
        [
            (128, 64, 128),
            (244, 35, 232),
            (70, 70, 70),
            (102, 102, 156),
            (190, 153, 153),
            (153, 153, 153),
            (250, 170, 30),
            (220, 220, 0),
            (107, 142, 35),
            (152, 251, 152),
            (70, 130, 180),
            (220, 20, 60),
            (255, 0, 0),
            (0, 0, 142),
            (0, 0, 70),
            (0, 60, 100),
            (0, 80, 100),
            (0, 0, 230),
            (119, 11, 32),
        ],
        dtype=np.uint8,
    )

    def __init__(self, part: str, *, root: str = "", size: tuple[int, int] | None = None):
        super().__init__()
        self.size = size
        images = sorted(Path(root, "leftImg8bit", part).glob("*/*_leftImg8bit.png")) if root else []
        if not images:
            raise ValueError(
                f"data_root={root!r}: no leftImg8bit/{part}/CITY/*_leftImg8bit.png in it; "
                "cityscapes needs the folder that holds leftImg8bit and gtFine"
            )
        self.ids = [path.name.removesuffix("_leftImg8bit.png") for path in images]
        fine = Path(root, "gtFine", part)
        there = set() if part == "test" else set(fine.glob("*/*_gtFine_label*Ids.png"))
        self.pairs = []
        for path, name in zip(images, self.ids, strict=True):
            stem = fine / path.parent.name / f"{name}_gtFine_label"
            choices = [Path(f"{stem}{kind}.png") for kind in ("TrainIds", "Ids")]
            self.pairs.append((path, next((c for c in choices if c in there), None)))
        kinds = [label.stem.rsplit("_", 1)[1] for _, label in self.pairs if label]
        counts = [f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds))]
        self.note = f"{len(images)} images, annotated: {', '.join(counts) or 'none'}"

    def encoding(self, path: Path) -> tuple[Sequence[int], tuple[int, ...]]:
        if path.name.endswith("_labelTrainIds.png"):
            return range(len(self.classes)), ()
        return IDS, VOID
