"""Small datasets in the layouts that people have: VOC with SBD, Cityscapes, one's own folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from s4lib.data.cityscapes import IDS
from s4lib.data.voc import palette

VOC_TRAIN = [f"2007_{i:06d}" for i in range(32, 35)]  # train.txt
VOC_SBD = [f"2008_{i:06d}" for i in range(5)]  # annotated by SBD only
VOC_VAL = [f"2009_{i:06d}" for i in range(3)]
CITY_TRAIN = [f"aachen_000000_{i:06d}" for i in range(3)] + ["bochum_000001_000019"]
CITY_VAL = ["frankfurt_000000_000294", "lindau_000003_000019"]


def blocks(seed: int, classes: int, height: int, width: int) -> np.ndarray:
    """(height, width) uint8: random classes in blocks of 8 pixels, each in a border of 255."""
    rng = np.random.default_rng(seed)
    rows, columns = -(-height // 8), -(-width // 8)
    label = rng.integers(0, classes, (rows, columns)).repeat(8, 0).repeat(8, 1)[:height, :width]
    label[::8], label[:, ::8] = 255, 255
    return label.astype(np.uint8)


def paint(label: np.ndarray, colors: np.ndarray) -> Image.Image:
    return Image.fromarray(
        np.append(colors, np.full((256 - len(colors), 3), 224), 0)[label].astype("u1")
    )


def save(image: Image.Image, path: Path, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def write_voc(root: Path, augmented: bool = True) -> Path:
    """VOCdevkit/VOC2012 in `root`: images of odd and different sizes; returns VOC2012."""
    folder = root / "VOCdevkit" / "VOC2012"
    for number, name in enumerate(VOC_TRAIN + VOC_SBD + VOC_VAL):
        label = blocks(number, 21, 41 + 4 * (number % 3), 37 + 6 * (number % 2))
        save(paint(label, palette(21)), folder / "JPEGImages" / f"{name}.jpg", quality=95)
        if name not in VOC_SBD:
            index = Image.fromarray(label)
            index.putpalette(palette(256).flatten().tolist())
            save(index, folder / "SegmentationClass" / f"{name}.png")
        if augmented:
            save(Image.fromarray(label), folder / "SegmentationClassAug" / f"{name}.png")
    lists = folder / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for part, ids in {"train": VOC_TRAIN, "val": VOC_VAL, "trainval": VOC_TRAIN + VOC_VAL}.items():
        (lists / f"{part}.txt").write_text("".join(f"{one}\n" for one in ids))
    return folder


def write_cityscapes(root: Path, train_ids: bool) -> Path:
    """Scenes of 32 x 64 pixels, annotated by train ids or by the 34 ids as published."""
    stored = np.full(256, 0, dtype=np.uint8)  # void is id 0, "unlabeled"
    stored[: len(IDS)] = IDS
    for part, ids in {
        "train": CITY_TRAIN,
        "val": CITY_VAL,
        "test": ["berlin_000000_000019"],
    }.items():
        for number, name in enumerate(ids):
            place = Path(part, name.split("_")[0])
            label = blocks(number, 19, 32, 64)
            image = paint(label, np.arange(57).reshape(19, 3) * 4)
            save(image, root / "leftImg8bit" / place / f"{name}_leftImg8bit.png")
            kind, mask = ("TrainIds", label) if train_ids else ("Ids", stored[label])
            save(Image.fromarray(mask), root / "gtFine" / place / f"{name}_gtFine_label{kind}.png")
    return root


def write_folder(root: Path, count: int = 10, bare: int = 3, **described) -> Path:
    """`count` annotated and `bare` unannotated photographs of 3 classes, in two folders."""
    for number in range(count + bare):
        label = blocks(number, 3, 40, 48)
        name = f"{'ab'[number % 2]}/photo {number:02d}"
        save(paint(label, palette(3)), root / "images" / f"{name}.jpg", quality=95)
        if number < count:
            save(Image.fromarray(label), root / "labels" / f"{name}.png")
    given = {"classes": ["background", "crack", "rust"], **described}
    (root / "dataset.yaml").write_text(yaml.safe_dump(given))
    return root
