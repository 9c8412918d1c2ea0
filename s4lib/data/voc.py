"""PASCAL VOC 2012 with SBD's annotations: 21 classes, photographs of up to 500 pixels a side.

Everingham et al. (2010); Hariharan et al., "Semantic contours from inverse detectors" (2011).
`root` is VOCdevkit/VOC2012 or one of the two folders above it:

    JPEGImages/ID.jpg                   ImageSets/Segmentation/train.txt val.txt
    SegmentationClass/ID.png            palette, 255 at borders (2913 files, train and val)
    SegmentationClassAug/ID.png         indices; the augmented set that the literature trains on

"train" is every annotation of SegmentationClassAug whose id is not in val.txt (10582 images), or,
where that folder is not there, train.txt (1464); "val" is val.txt (1449).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .images import ImageFiles

COUNTS = {"train": 10582, "val": 1449}


def palette(count: int) -> np.ndarray:
    """(count, 3) uint8: VOC's colours, where bit i of a channel comes from bits of the index."""
    index = np.arange(count)
    channels = [
        sum(((index >> (3 * i + channel)) & 1) << (7 - i) for i in range(3)) for channel in range(3)
    ]
    return np.stack(channels, 1).astype(np.uint8)


class VOC(ImageFiles):
    """VOC images; see the module's text for the folder layout."""

    classes = (
        "background",
        "aeroplane",
        "bicycle",
        "bird",
        "boat",
        "bottle",
        "bus",
        "car",
        "cat",
        "chair",
        "cow",
        "dining table",
        "dog",
        "horse",
        "motorbike",
        "person",
        "potted plant",
        "sheep",
        "sofa",
        "train",
        "tv monitor",
    )
    colors = palette(21)

    def __init__(self, part: str, *, root: str = "", size: tuple[int, int] | None = None):
        super().__init__()
        self.size = size
        if part == "test":
            raise ValueError("part='test': VOC's test annotations are not public; choose val")
        places = [Path(root, below) for below in ("", "VOC2012", "VOCdevkit/VOC2012")]
        folder = next((place for place in places if root and (place / "JPEGImages").is_dir()), None)
        if folder is None:
            raise ValueError(
                f"data_root={root!r}: no folder JPEGImages in it or its VOC2012; voc needs "
                "VOCdevkit/VOC2012 or its parent"
            )
        augmented = folder / "SegmentationClassAug"
        plain = folder / "SegmentationClass"
        held_out = _ids(folder / "ImageSets" / "Segmentation" / "val.txt")
        if part == "val":
            masks, self.ids, source = plain if plain.is_dir() else augmented, held_out, "val.txt"
        elif augmented.is_dir():
            stems = {path.stem for path in augmented.glob("*.png")}
            masks, self.ids, source = augmented, sorted(stems - set(held_out)), augmented.name
        else:
            listing = folder / "ImageSets" / "Segmentation" / "train.txt"
            masks, self.ids, source = plain, _ids(listing), "train.txt, without SBD"
        if not self.ids:
            raise ValueError(f"{masks}: no annotation in it that is not listed in val.txt")
        self.note = f"{len(self.ids)} images of {source}"
        if len(self.ids) != COUNTS[part]:
            self.note += f" (the literature has {COUNTS[part]})"
        self.pairs = [(folder / "JPEGImages" / f"{i}.jpg", masks / f"{i}.png") for i in self.ids]


def _ids(listing: Path) -> list[str]:
    if not listing.is_file():
        raise ValueError(f"{listing}: no such file; voc needs its lists of image ids")
    ids = listing.read_text().split()
    if not ids:
        raise ValueError(f"{listing}: empty")
    return ids
