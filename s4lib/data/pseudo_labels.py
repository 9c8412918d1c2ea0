"""Pseudo-labels that are made before a training, kept on disk: one PNG an image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..run_folder import write_atomically
from .images import open_label


@dataclass(frozen=True)
class PseudoLabels:
    """Label maps of a dataset's images, by index: `folder`/INDEX.png, class indices with palette.

    Args:
        folder: where they are; made with the first of them.
        indices: the images that a training takes from there, all of which must be there by then.
        colors: (K, 3) uint8, the dataset's, for whoever looks at the files.
    """

    folder: Path
    indices: tuple[int, ...]
    colors: np.ndarray

    def path(self, index: int) -> Path:
        return self.folder / f"{index}.png"

    def __getitem__(self, index: int) -> Tensor:
        """(H, W) uint8. Raises ValueError if the file is missing, damaged or of other classes."""
        label = open_label(self.path(index), None, range(len(self.colors)))
        return torch.from_numpy(np.array(label))

    def write(self, index: int, label: Tensor) -> None:
        """Keep (H, W) class indices. Raises OSError if the disk is full or read-only."""
        image = Image.fromarray(label.to("cpu", torch.uint8).numpy())
        image.putpalette(self.colors.flatten().tolist())
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path(index), lambda file: image.save(file, "PNG"))
