"""CCT's perturbations of a fused map, three of them guided by what the network predicts.

Ouali et al. (2020), section 3.3. Maps are (B, C, h, w), predictions (B, K, H, W) with H >= h; masks
of predictions reach the map's size by `shrink`. What is drawn may be given instead.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def feature_noise(x: Tensor, bound: float = 0.3, noise: Tensor | None = None) -> Tensor:
    """F-Noise: x + x n, the same n (C, h, w), uniform in [-bound, bound), for the whole batch."""
    if noise is None:
        noise = (2 * torch.rand(x.shape[1:], device=x.device) - 1) * bound
    return x + x * noise.to(x.dtype)


def feature_drop(
    x: Tensor,
    valid: Tensor | None = None,
    bounds: tuple[float, float] = (0.7, 0.9),
    share: float | Tensor | None = None,
) -> Tensor:
    """F-Drop: zero where the mean over channels reaches a share of its largest value in the image.

    Args:
        valid: (B, 1, h, w) bool, places among which the largest value is sought; None for all.
        bounds: of the share, one uniform draw for the batch (CCT@65d4e5b; its paper says 0.6).
        share: the draw.
    """
    if share is None:
        share = bounds[0] + (bounds[1] - bounds[0]) * torch.rand((), device=x.device)
    mean = x.float().mean(1, keepdim=True)
    among = mean if valid is None else mean.masked_fill(~valid, -torch.inf)
    return torch.where(mean < share * among.amax((2, 3), keepdim=True), x, 0)


def shrink(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, 1, *size) of a mask (B, H, W), bool, by nearest neighbours."""
    return F.interpolate(mask[:, None].float(), size, mode="nearest") > 0


def foreground(logits: Tensor, background: int | None = 0) -> Tensor:
    """(B, H, W) bool: any class but `background` is the most likely one; all, if that is None."""
    return logits.argmax(1) != (-1 if background is None else background)


def context_mask(x: Tensor, thing: Tensor) -> Tensor:
    """Con-Msk: x, zero outside of objects; `thing` (B, H, W) is `foreground`."""
    return torch.where(shrink(thing, x.shape[-2:]), x, 0)


def object_mask(x: Tensor, thing: Tensor) -> Tensor:
    """Obj-Msk: x, zero on objects; `thing` (B, H, W) is `foreground`."""
    return torch.where(shrink(thing, x.shape[-2:]), 0, x)


def guided_cutout(x: Tensor, erased: Tensor) -> Tensor:
    """G-Cutout: x, zero where `erased` (B, H, W), which `object_boxes` gives."""
    return torch.where(shrink(~erased, x.shape[-2:]), x, 0)


class Outlines(NamedTuple):
    """Outer outlines of regions, each at the index y * W + x of its region's first pixel.

    All (B, H * W) int64. `points` is 0 where no region begins, and for regions in holes of others.
    """

    points: Tensor
    top: Tensor
    left: Tensor
    bottom: Tensor  # the last row of the region, not the one behind it
    right: Tensor


def outlines(mask: Tensor) -> Outlines:
    """Of the 8-connected regions of a mask (B, H, W), computed without waiting for the device.

    `points` counts as OpenCV's findContours does with RETR_EXTERNAL and CHAIN_APPROX_SIMPLE: where
    the walk around a region turns, so that a rectangle has four.
    """
    b, h, w = mask.shape
    region = components(mask, diagonal=True).flatten(1)
    ring = F.pad(mask, (1, 1, 1, 1))
    outside = components(~ring, diagonal=False) == 0  # the corner's region: no hole
    around = [(0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1)] * 2
    cut = [(slice(1 + y, 1 + y + h), slice(1 + x, 1 + x + w)) for y, x in around]
    near, out = ([m[:, ys, xs] for ys, xs in cut] for m in (ring, outside))
    turns = mask & ~torch.stack(near[:8]).any(0) & out[0]  # a single pixel is one point
    turns = turns.long()
    # The walk comes to a pixel from neighbour k and leaves to the next one in turn, k + m, if what
    # lies between is empty and touches one of the pixel's sides; it goes straight on if m is 4.
    for k in range(8):
        empty, open_ = mask & near[k], torch.zeros_like(mask)
        for m in range(1, 9):
            if m not in (1, 4):
                turns += empty & open_ & near[(k + m) % 8]
            empty = empty & ~near[(k + m) % 8]
            if (k + m) % 2 == 0:
                open_ = open_ | out[(k + m) % 8]
    y = torch.arange(h, device=mask.device)[:, None].expand(b, h, w).flatten(1)
    x = torch.arange(w, device=mask.device).expand(b, h, w).flatten(1)

    def collect(value: Tensor, how: str, start: int) -> Tensor:
        found = torch.full((b, h * w + 1), start, device=mask.device)
        return found.scatter_reduce(1, region, value, how)[:, :-1]

    points = collect(turns.flatten(1), "sum", 0)
    low, high = (collect(v, "amin", h * w) for v in (y, x)), (collect(v, "amax", 0) for v in (y, x))
    return Outlines(points, *low, *high)


def components(mask: Tensor, diagonal: bool) -> Tensor:
    """(B, H, W) int64: the index y * W + x of the first pixel of each pixel's region, H * W where
    `mask` is False. Diagonal neighbours belong together if `diagonal`.

    Labels are lowered to those of neighbours, and roots with them, for a fixed number of rounds
    that grows with the logarithm of the size, twice as many as spirals and random shapes need.
    """
    b, h, w = mask.shape
    n = h * w
    rest = torch.full((b, 1), n, device=mask.device)
    label = torch.where(mask, torch.arange(n, device=mask.device).view(h, w), n).flatten(1)
    label = torch.cat([label, rest], 1)
    windows = [(3, 3)] if diagonal else [(3, 1), (1, 3)]
    for _ in range(n.bit_length()):
        high = -label[:, :n].view(b, 1, h, w).double()
        near = [F.max_pool2d(high, k, 1, (k[0] // 2, k[1] // 2)) for k in windows]
        near = torch.where(mask, -torch.stack(near).amax(0)[:, 0], n).long().flatten(1)
        roots = label.scatter_reduce(1, label[:, :n], near, "amin")
        label = torch.cat([torch.minimum(roots[:, :n], near), rest], 1)
        label = label.gather(1, label)
        label = label.gather(1, label)
    return label[:, :n].view(b, h, w)


def object_boxes(
    found: Outlines,
    size: tuple[int, int],
    share: float = 0.4,
    least: int = 50,
    u: Tensor | None = None,
) -> Tensor:
    """(B, H, W) bool: in each region's bounding box a box with `share` of its sides, rounded down.

    Regions whose outline has at most `least` points stay whole (CCT@65d4e5b, guided_cutout).

    Args:
        size: (H, W).
        u: (B, 2, H * W), uniform in [0, 1): how far down and to the right in the room there is, at
            the region's first pixel.
    """
    h, w = size
    if u is None:
        u = torch.rand(len(found.points), 2, h * w, device=found.points.device)
    edges = []
    for low, high, draw in ((found.top, found.bottom, u[:, 0]), (found.left, found.right, u[:, 1])):
        length = (high - low).clamp(min=0).double()
        start = low + (draw * ((length * (1 - share)).floor() + 1)).floor().long()
        edges.append((start, start + (length * share).floor().long()))
    big, grid = (found.points > least).long(), torch.zeros_like(found.points[:, :1])
    grid = grid.repeat(1, (h + 1) * (w + 1))
    (top, bottom), (left, right) = edges
    for y, x, sign in ((top, left, 1), (top, right, -1), (bottom, left, -1), (bottom, right, 1)):
        corner = torch.where(big > 0, y * (w + 1) + x, 0)
        grid = grid.scatter_add(1, corner, sign * big)
    return grid.view(-1, h + 1, w + 1).cumsum(1).cumsum(2)[:, :h, :w] > 0
