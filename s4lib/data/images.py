"""What every dataset is: images and annotations by index, read with care, then kept in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..losses import IGNORE


class Images:
    """A dataset's images, by index.

    Subclasses set `classes`, `colors`, `ids` and define `read`. Attributes:
        classes: class names, in the order of their indices.
        colors: (K, 3) uint8, for drawing.
        ids: one readable name per image; splits and hashes refer to these.
    """

    classes: tuple[str, ...]
    colors: np.ndarray
    ids: list[str]

    def __init__(self):
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """(image, label): uint8 RGB (3, H, W) and uint8 class indices (H, W), IGNORE = void."""
        if index not in self._kept:
            image, label = self.read(index)
            self._kept[index] = (
                torch.from_numpy(image.transpose(2, 0, 1).copy()),
                torch.from_numpy(label.copy()),
            )
        return self._kept[index]

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(image, label) as uint8 arrays (H, W, 3) and (H, W)."""
        raise TypeError(f"{type(self).__name__} does not define read")


def open_image(path: Path) -> Image.Image:
    """An RGB image, decoded. Raises ValueError, naming the file, if it is missing or damaged."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such image") from None
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{path}: not a readable image, truncated or damaged ({error})") from error


def open_label(
    path: Path, image_size: tuple[int, int], classes: int, void: tuple[int, ...]
) -> Image.Image:
    """An annotation as class indices, `void` values replaced by IGNORE.

    Palette and greyscale PNGs are both read as the indices they store, never as colours.

    Raises:
        ValueError: missing, damaged, an RGB file, of another size than its image, or a value that
            is no class.
    """
    try:
        with Image.open(path) as image:
            image.load()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such annotation") from None
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(
            f"{path}: not a readable annotation, truncated or damaged ({error})"
        ) from error
    if image.mode not in ("P", "L"):
        raise ValueError(
            f"{path}: annotation of mode {image.mode}; expected class indices (mode P or L)"
        )
    if image.size != image_size:
        own, other = ("{} x {}".format(*size) for size in (image.size, image_size))
        raise ValueError(f"{path}: annotation is {own} pixels, its image {other}")
    index = np.array(image)
    index[np.isin(index, void)] = IGNORE
    bad = np.unique(index[(index >= classes) & (index != IGNORE)])
    if len(bad):
        raise ValueError(
            f"{path}: annotation value {bad[0]} is out of range; valid are 0 to {classes - 1}, "
            f"void {', '.join(map(str, sorted({*void, IGNORE})))}"
        )
    return Image.fromarray(index)
