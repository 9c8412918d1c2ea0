"""Datasets by name, their splits, views and the loader that makes batches of them."""

from __future__ import annotations

from .camvid import CamVid
from .cityscapes import Cityscapes
from .folder import Folder
from .images import Images
from .mosaic import Mosaic
from .voc import VOC

DATASETS: dict[str, type[Images]] = {
    "mosaic": Mosaic,
    "camvid": CamVid,
    "voc": VOC,
    "cityscapes": Cityscapes,
    "folder": Folder,  # its classes are in a file: an opened one has them
}


def open_dataset(
    name: str, part: str, *, root: str = "", size: tuple[int, int] | None = None
) -> Images:
    """The images of one part ("train", "val", "test") of a dataset.

    Args:
        root: the dataset's folder; the embedded `mosaic` needs none.
        size: (height, width) at which to work; None keeps the images' own.

    Raises:
        ValueError: unknown name or part, a folder that does not hold the dataset, or a missing
            file; says which and what is valid.
    """
    if name not in DATASETS:
        raise ValueError(f"dataset={name!r}: choose one of {', '.join(DATASETS)}")
    if part not in ("train", "val", "test"):
        raise ValueError(f"part={part!r}: choose train, val or test")
    images = DATASETS[name](part, root=root, size=size)
    if missing := images.missing():
        others = f", nor {len(missing) - 1} others" if len(missing) > 1 else ""
        raise ValueError(f"{missing[0]}: no such file{others}, but {name} {part} needs it")
    return images
