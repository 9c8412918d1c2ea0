"""Datasets by name, their splits, views and the loader that makes batches of them."""

from __future__ import annotations

from .camvid import CamVid
from .images import Images
from .mosaic import Mosaic

DATASETS: dict[str, type[Images]] = {"mosaic": Mosaic, "camvid": CamVid}


def open_dataset(
    name: str, part: str, *, root: str = "", size: tuple[int, int] | None = None
) -> Images:
    """The images of one part ("train", "val", "test") of a dataset.

    Args:
        root: the dataset's folder; the embedded `mosaic` needs none.
        size: (height, width) at which to work; None keeps the images' own.

    Raises:
        ValueError: unknown name or part, or a folder that does not hold the dataset; says which and
            what is valid.
    """
    if name not in DATASETS:
        raise ValueError(f"dataset={name!r}: choose one of {', '.join(DATASETS)}")
    if part not in ("train", "val", "test"):
        raise ValueError(f"part={part!r}: choose train, val or test")
    return DATASETS[name](part, root=root, size=size)
