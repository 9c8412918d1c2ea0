"""What every dataset is: images and annotations by index, read with care, kept if they fit."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..losses import IGNORE

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}


class Images:
    """A dataset's images, by index.

    Subclasses set `classes`, `colors`, `ids` and define `read`. Attributes:
        classes: class names, in the order of their indices.
        colors: (K, 3) uint8, for drawing.
        ids: one readable name per image; splits and hashes refer to these.
        note: what was found, where a layout leaves a choice.
        keep_bytes: decoded images are kept in memory up to this size.
    """

    classes: tuple[str, ...]
    colors: np.ndarray
    ids: list[str]
    note = ""
    keep_bytes = 2 * 2**30

    def __init__(self):
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._room = self.keep_bytes
        self._lock = threading.Lock()  # several threads read

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """(image, label): uint8 RGB (3, H, W) and uint8 class indices (H, W), IGNORE = void.

        The label of an image without annotation is all IGNORE.
        """
        kept = self._kept.get(index)
        if kept is not None:
            return kept
        image, label = self.read(index)
        sample = (
            torch.from_numpy(image.transpose(2, 0, 1).copy()),
            torch.from_numpy(label.copy()),
        )
        size = sum(part.nbytes for part in sample)
        with self._lock:
            # Nothing is thrown out: epochs pass over everything, and then the first that fitted are
            # found more often than the last that were used.
            if index not in self._kept and size <= self._room:
                self._kept[index] = sample
                self._room -= size
        return sample

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(image, label) as uint8 arrays (H, W, 3) and (H, W)."""
        raise TypeError(f"{type(self).__name__} does not define read")

    def label(self, index: int) -> Tensor:
        """The label alone, as in `self[index]`."""
        return self[index][1]

    def annotated(self) -> Sequence[int]:
        """Indices of the images that have an annotation."""
        return range(len(self))

    def require_annotations(self, indices: Iterable[int]) -> None:
        """Raises ValueError if one of these images cannot be labeled or evaluated on."""

    def missing(self) -> list[Path]:
        """Files that the dataset needs and that are not there."""
        return []


class ImageFiles(Images):
    """Images and annotations in files.

    Subclasses set `pairs`, the paths of image and annotation (None: has none), `size` (height,
    width; None keeps the files' own) and `void`, the stored values that are no class.
    """

    pairs: list[tuple[Path, Path | None]]
    size: tuple[int, int] | None = None
    void: tuple[int, ...] = ()

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image = open_image(self.pairs[index][0])
        label = self._label(index, image.size)
        if label is None:
            height, width = self.size or image.size[::-1]
            label = np.full((height, width), IGNORE, dtype=np.uint8)
        if self.size and self.size != image.size[::-1]:
            image = image.resize(self.size[::-1], Image.Resampling.BOX)
        return np.asarray(image), np.asarray(label)

    def label(self, index: int) -> Tensor:
        label = None if index in self._kept else self._label(index, None)
        return self[index][1] if label is None else torch.from_numpy(np.array(label))

    def _label(self, index: int, image_size: tuple[int, int] | None) -> Image.Image | None:
        path = self.pairs[index][1]
        if path is None:
            return None
        label = open_label(path, image_size, *self.encoding(path))
        if self.size and self.size != label.size[::-1]:
            label = label.resize(self.size[::-1], Image.Resampling.NEAREST)
        return label

    def encoding(self, path: Path) -> tuple[Sequence[int], tuple[int, ...]]:
        """(stored value of each class, stored values of void) of an annotation."""
        return range(len(self.classes)), self.void

    def annotated(self) -> Sequence[int]:
        return [index for index, (_, label) in enumerate(self.pairs) if label]

    def require_annotations(self, indices: Iterable[int]) -> None:
        for index in indices:
            if self.pairs[index][1] is None:
                raise ValueError(
                    f"{self.pairs[index][0]}: has no annotation, so it can only be an unlabeled "
                    "image, neither a labeled one nor one to evaluate on"
                )

    def missing(self) -> list[Path]:
        paths = [path for pair in self.pairs for path in pair if path]
        there = {
            folder: set(os.listdir(folder)) if folder.is_dir() else set()
            for folder in {path.parent for path in paths}
        }
        return [path for path in paths if path.name not in there[path.parent]]


def open_image(path: Path) -> Image.Image:
    """An RGB image, decoded.

    Raises:
        ValueError: missing, damaged, or of more than 8 bits a channel; names the file.
    """
    image = _decoded(path, "image")
    if image.mode[0] in "IF":
        raise ValueError(f"{path}: image of mode {image.mode}; expected 8 bits a channel")
    return image.convert("RGB")


def open_label(
    path: Path,
    image_size: tuple[int, int] | None,
    values: Sequence[int],
    void: tuple[int, ...] = (),
) -> Image.Image:
    """An annotation as class indices, `void` values replaced by IGNORE.

    Palette and greyscale PNGs are both read as the indices they store, never as colours.

    Args:
        image_size: (width, height) that it must have; None accepts any.
        values: the stored value of each class.

    Raises:
        ValueError: missing, damaged, an RGB file, of another size than its image, or a value that
            is no class.
    """
    stored = _decoded(path, "annotation")
    if stored.mode not in ("P", "L"):
        raise ValueError(
            f"{path}: annotation of mode {stored.mode}; expected class indices (mode P or L), "
            "not colours"
        )
    if image_size and stored.size != image_size:
        own, other = ("{} x {}".format(*size) for size in (stored.size, image_size))
        raise ValueError(f"{path}: annotation is {own} pixels, its image {other}")
    table = np.full(256, -1, dtype=np.int16)
    table[list(values)] = np.arange(len(values))
    table[[*void, IGNORE]] = IGNORE
    stored = np.asarray(stored)
    index = table[stored]
    if index.min() < 0:
        valid = f"0 to {len(values) - 1}" if isinstance(values, range) else _listed(values)
        raise ValueError(
            f"{path}: annotation value {stored[index < 0].min()} is out of range; valid are "
            f"{valid}, void {_listed(sorted({*void, IGNORE}))}"
        )
    return Image.fromarray(index.astype(np.uint8))


def _listed(values: Iterable[int]) -> str:
    return ", ".join(map(str, values))


def _decoded(path: Path, what: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except FileNotFoundError:
        raise ValueError(f"{path}: no such {what}") from None
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(
            f"{path}: not a readable {what}, truncated or damaged ({error})"
        ) from error
