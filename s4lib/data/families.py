"""How published methods made their views, by name: resize, crop, padding, flip and colour.

A family is what a released code does, read there (commits at each entry). A crop is drawn as rows
and columns of the resized image, and only the pixels that it shows are computed, so the cost of a
large image is that of its crop. Interpolation follows the original (PIL's filters grow with the
reduction, OpenCV's and torch's do not), without rounding to 8 bits; annotations take the nearest
pixel's value, by pixel centres.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config import Config
from ..losses import IGNORE
from . import colour
from .views import CPU, Views, move

Size = tuple[int, int]  # height, width
TRIES = 11  # crops drawn at most where one class must not fill them


def resize_u2pl(rng: np.random.Generator, height: int, width: int, base: int) -> Size:
    """Reduced by U(0.5, 1) or enlarged by U(1, 2), with equal probability."""
    zoom = rng.uniform(0.5, 1) if rng.uniform() < 0.5 else rng.uniform(1, 2)
    zoom *= base / max(height, width) if base else 1
    return int(height * zoom), int(width * zoom)


def resize_cps(rng: np.random.Generator, height: int, width: int, base: int) -> Size:
    """One of six zooms; 1.25 is not among them."""
    zoom = rng.choice((0.5, 0.75, 1, 1.5, 1.75, 2)) * (base / max(height, width) if base else 1)
    return int(height * zoom), int(width * zoom)


def resize_long(rng: np.random.Generator, height: int, width: int, base: int) -> Size:
    """The longer side becomes a random whole number from base / 2 to 2 base."""
    base = base or max(height, width)
    side = int(rng.integers(int(0.5 * base), int(2 * base), endpoint=True))
    zoom = side / max(height, width)
    return (side, int(width * zoom + 0.5)) if height > width else (int(height * zoom + 0.5), side)


def resize_short(rng: np.random.Generator, height: int, width: int, base: int) -> Size:
    """The shorter side becomes U(0.5, 2) times base; the longer at most four times that factor."""
    base = base or min(height, width)
    zoom = rng.uniform(0.5, 2)
    zoom *= min(base / min(height, width), 4 * base / max(height, width))
    return int(height * zoom + 0.5), int(width * zoom + 0.5)


def linear(x: np.ndarray) -> np.ndarray:
    return np.maximum(0, 1 - np.abs(x))


def cubic(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    inner, outer = (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
    return np.where(x < 1, inner, np.where(x < 2, outer, 0))


@dataclass(frozen=True)
class Family:
    """Everything in which the released codes' views differ.

    Args:
        resize: draws the size to which an image is resized, from its own and a base size.
        kernel: interpolation, `linear` or `cubic`.
        antialias: whether the kernel grows where the image is reduced.
        centred: padding on both sides (the smaller half first), or only below and to the right.
        mirror_padding: whether padding is flipped with the image, and so may lie to the left.
        black: padding is black; or the mean colour, which is 0 once normalised.
        overshoot: pixels by which a crop may leave the image.
        class_share: another crop is tried while one class fills this share of its annotation.
        distort: draws colour operations of the weak view (padding keeps its colour).
        colour: draws colour operations of a strong view.
    """

    resize: Callable[[np.random.Generator, int, int, int], Size]
    colour: Callable[[np.random.Generator], colour.Operations]
    kernel: Callable[[np.ndarray], np.ndarray] = linear
    antialias: bool = True
    centred: bool = False
    mirror_padding: bool = False
    black: bool = False
    overshoot: int = 0
    class_share: float = 1.0
    distort: Callable[[np.random.Generator], colour.Operations] = colour.draw_none


FAMILIES: dict[str, Family] = {
    # U2PL@53bbdd2, u2pl/dataset/augmentation.py; GTA-Seg@534f10f
    "u2pl": Family(resize_u2pl, colour.draw_none, antialias=False, centred=True),
    # TorchSemiSeg@c0a13ce, CPS+CutMix/dataloader.py and furnace/utils/img_utils.py; the crop's
    # first row is drawn from one too many
    "cps": Family(resize_cps, colour.draw_none, antialias=False, centred=True, overshoot=1),
    # PS-MT@896af48, VocCode/Base/base_dataset.py (base size 600 for VOC)
    "ps_mt": Family(resize_long, colour.draw_ps_mt, kernel=cubic, mirror_padding=True),
    # UniMatch@7292bac, dataset/transform.py
    "unimatch": Family(resize_long, colour.draw_unimatch, mirror_padding=True, black=True),
    # AugSeg@65bd476, augseg/dataset/pascal_voc.py (base size 500 for VOC)
    "augseg": Family(resize_long, colour.draw_augseg),
    # dual-teacher@868e6e7, local_configs/_base_/datasets/ade20k_repeat.py (base size 512 for
    # ADE20K). Unlabeled images too are cropped by their annotation.
    "dual_teacher": Family(
        resize_short,
        colour.draw_dual_teacher,
        antialias=False,
        class_share=0.75,
        distort=colour.draw_distortion,
    ),
}


class Axis(NamedTuple):
    """How one axis of a crop is made of an image's pixels."""

    shown: slice  # places in the crop that show the image; the others are padding
    window: slice  # pixels of the image that are needed
    index: np.ndarray  # (taps, shown) int64 pixels of the window that are summed
    weight: np.ndarray  # (taps, shown) float32, their weights
    nearest: np.ndarray  # (shown,) int64, in the image


class Crop(NamedTuple):
    """One drawn weak view."""

    rows: Axis
    columns: Axis
    distort: colour.Operations


@dataclass(frozen=True)
class FamilyViews:
    """Views of a published family; the methods are those of `Views`.

    Args:
        family: whose.
        crop: (height, width) of a view.
        mean: colour of padding, RGB in [0, 1].
        base: size that the family's resizing refers to; 0 for the image's own.
        pad_label: annotation of padding: IGNORE, or the class 0 that U2PL and GTA-Seg gave it.
        noise: as in `Views`.
    """

    family: Family
    crop: Size
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    base: int = 0
    pad_label: int = IGNORE
    noise: float = 0.15

    def draw_crop(
        self, rng: np.random.Generator, height: int, width: int, label: Tensor | None = None
    ) -> Crop:
        flip = rng.uniform() < 0.5
        resized = [max(1, side) for side in self.family.resize(rng, height, width, self.base)]
        for _ in range(TRIES):
            places = [self._place(rng, *sides) for sides in zip(resized, self.crop, strict=True)]
            if flip and self.family.mirror_padding:
                places[1] = places[1][::-1]
            elif flip:
                places[1] = resized[1] - 1 - places[1]
            rows, columns = map(self._axis, places, resized, (height, width))
            if label is None or self.family.class_share == 1:
                break
            counts = np.bincount(_nearest(label, rows, columns).flatten(), minlength=256)
            counts[IGNORE] = 0
            if 0 < counts.max() < self.family.class_share * counts.sum():
                break
        return Crop(rows, columns, self.family.distort(rng))

    def _place(self, rng: np.random.Generator, side: int, crop: int) -> np.ndarray:
        """(crop,) consecutive places on a resized side; outside it lies padding."""
        if side > crop:
            last = min(side - crop + self.family.overshoot, side - 1)
            first = rng.integers(0, last, endpoint=True)
        else:
            first = -((crop - side) // 2) if self.family.centred else 0
        return first + np.arange(crop)

    def _axis(self, places: np.ndarray, resized: int, own: int) -> Axis:
        shown = np.flatnonzero((places >= 0) & (places < resized))
        centre = (places[shown] + 0.5) * (own / resized)
        nearest = np.minimum(centre.astype(np.int64), own - 1)
        reach = 1 if self.family.kernel is linear else 2
        grow = max(1, own / resized) if self.family.antialias else 1
        first = np.floor(centre - reach * grow).astype(np.int64)
        index = first + np.arange(int(2 * reach * grow) + 2)[:, None]
        weight = self.family.kernel((index + 0.5 - centre) / grow) * ((index >= 0) & (index < own))
        index, weight = index[weight.any(1)].clip(0, own - 1), weight[weight.any(1)]
        low, high = index.min(), index.max() + 1
        return Axis(
            slice(shown[0], shown[-1] + 1),
            slice(low, high),
            index - low,
            (weight / weight.sum(0)).astype(np.float32),
            nearest,
        )

    def crop_images(self, images: list[Tensor], crops: list[Crop], device=CPU) -> Tensor:
        """Float views (B, 3, *crop) in [0, 1] of uint8 images (3, H, W) that may differ in size."""
        fill = torch.tensor((0.0, 0.0, 0.0) if self.family.black else self.mean).view(3, 1, 1)
        views = move(fill, device).expand(len(images), 3, *self.crop).clone()
        for view, image, (rows, columns, distort) in zip(views, images, crops, strict=True):
            pixels = move(image[:, rows.window, columns.window].contiguous(), device).float()
            pixels = _weighted(_weighted(pixels.transpose(1, 2), columns).transpose(1, 2), rows)
            view[:, rows.shown, columns.shown] = colour.recolour(pixels / 255, distort)
        return views

    def crop_labels(self, labels: list[Tensor], crops: list[Crop], device=CPU) -> Tensor:
        """Views (B, *crop) int64 of uint8 labels (H, W)."""
        views = torch.full((len(labels), *self.crop), self.pad_label, dtype=torch.uint8)
        for view, label, (rows, columns, _) in zip(views, labels, crops, strict=True):
            view[rows.shown, columns.shown] = _nearest(label, rows, columns)
        return move(views, device).long()

    def valid(self, images: list[Tensor], crops: list[Crop], device=CPU) -> Tensor:
        """(B, *crop) bool: False on padding, whatever its label."""
        views = torch.zeros(len(images), *self.crop, dtype=torch.bool)
        for view, crop in zip(views, crops, strict=True):
            view[crop.rows.shown, crop.columns.shown] = True
        return move(views, device)

    def strong(self, images: Tensor, rngs: list[np.random.Generator]) -> Tensor:
        """Views (B, 3, H, W) in [0, 1], each in colours drawn from its own generator."""
        drawn = [self.family.colour(rng) for rng in rngs]
        return torch.stack([colour.recolour(*pair) for pair in zip(images, drawn, strict=True)])


def _nearest(label: Tensor, rows: Axis, columns: Axis) -> Tensor:
    return torch.from_numpy(label.numpy()[rows.nearest][:, columns.nearest])


def _weighted(pixels: Tensor, axis: Axis) -> Tensor:
    """Weighted sums of rows: (C, H, W) to (C, shown, W), in [0, 255] as PIL's after each axis."""
    pixels = pixels.contiguous()  # rows in one piece: several times as fast
    index, weight = (move(torch.from_numpy(x), pixels.device) for x in (axis.index, axis.weight))
    out = pixels.new_zeros(len(pixels), index.shape[1], pixels.shape[2])
    for i, w in zip(index, weight[:, :, None], strict=True):
        out.addcmul_(pixels.index_select(1, i), w)
    return out.clamp_(0, 255)


def build_views(config: Config, size: Size, mean: tuple[float, ...]) -> Views | FamilyViews:
    """The views of `config.augment`: ours ("s4") or a published family's.

    Args:
        size: (height, width) of a view where the config names no crop.
        mean: colour that normalisation turns into 0.
    """
    crop = config.crop or size
    if config.augment == "s4":
        return Views(
            crop=crop,
            scale=config.scale,
            outside=config.outside,
            jitter=config.jitter,
            hue=config.hue,
            noise=config.noise,
        )
    return FamilyViews(
        FAMILIES[config.augment],
        crop=crop,
        mean=tuple(mean),
        base=config.resize_base,
        pad_label=config.pad_label,
        noise=config.noise,
    )
