"""Mixing as a value: draw it once, then apply it to images, labels, confidences alike."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mix:
    """Where `mask` is True, image i shows image `partner[i]`; elsewhere itself.

    `mask` is (B, H, W) bool and `partner` (B,) int64. `mix(x)` takes (B, H, W) or (B, C, H, W).
    """

    mask: Tensor
    partner: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        mask = self.mask if x.ndim == 3 else self.mask[:, None]
        return torch.where(mask, x[self.partner], x)


def cutmix(
    like: Tensor, area: tuple[float, float] = (0.5, 0.5), aspect: tuple[float, float] | None = None
) -> Mix:
    """One box per image, pasted from the next image of the batch (from itself if it is alone).

    Args:
        like: any tensor (B, ..., H, W); gives batch, size and device.
        area: the box's share of the image is drawn uniformly between these.
        aspect: bounds of height / width as shares of the image, drawn log-uniformly. None draws
            the height as French et al. (2020) do: log-uniform between `area` and 1.

    The draws come from torch's CPU generator, which the trainer seeds by (seed, step, rank).
    """
    b, (h, w) = len(like), like.shape[-2:]
    u = torch.rand(b, 4)
    share = area[0] + u[:, 0] * (area[1] - area[0])
    if aspect is None:
        high = share ** u[:, 1]
    else:
        low, top = map(math.log, aspect)
        high = (share * (low + u[:, 1] * (top - low)).exp()).sqrt().clamp(max=1)
    height = (high * h).round()
    width = (share / high * w).round().clamp(max=w)
    top, left = (u[:, 2] * (h - height + 1)).floor(), (u[:, 3] * (w - width + 1)).floor()
    y, x = torch.arange(h)[:, None], torch.arange(w)
    top, bottom, left, right = (v[:, None, None] for v in (top, top + height, left, left + width))
    mask = (y >= top) & (y < bottom) & (x >= left) & (x < right)
    return Mix(mask.to(like.device), torch.arange(b, device=like.device).roll(-1))
