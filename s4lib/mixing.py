"""Mixing as a value: draw it once, then apply it to images, labels, confidences alike.

Published CutMix is many algorithms. They differ in how boxes are drawn and in what they show:

| function | from | pasted share of an image |
|---|---|---|
| `cutmix` | French et al. (2020) | exactly `area` |
| `cutmix_half` | U2PL, GTA-Seg | a half, or nothing in the whole batch |
| `cutmix_beta` | PS-MT, Dual Teacher | one draw for the batch, cut off at the border |
| `cutmix_xor` | CPS | three boxes that cancel where they overlap: about a quarter |
| `cutmix_small` | UniMatch | up to 0.4, or nothing |
| `classmix` | Olsson et al. (2021) | half of the classes that are seen |
| `cutmix_class` | AEL | `area`, with something of a wanted class in it |
| `copy_paste` | AEL | given classes of an annotated image |
| `cutmix_inject` | AugSeg | as `cutmix_beta`, of images that hold labeled ones |

Arguments they share: `like` is any tensor (B, ..., H, W) that gives batch, size and device; `area`
bounds a box's share of the image, drawn uniformly. `partner` is the next image of the batch unless
said otherwise; alone in its batch, an image shows itself. Every draw comes from torch's CPU
generator, which the trainer seeds by (seed, step, rank), so that all devices draw alike; nothing
waits for the device. A bound that makes no sense raises ValueError.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Beta

from .config import one_of
from .losses import IGNORE


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

    def same(self) -> Mix:
        """These boxes, each image its own partner: to `paste` another crop of it."""
        return Mix(self.mask, torch.arange(len(self.mask), device=self.mask.device))


def paint(top: Tensor, left: Tensor, height: Tensor, width: Tensor, like: Tensor) -> Tensor:
    """Masks (..., H, W) bool, True inside boxes (...) in pixels; what sticks out is cut off."""
    y = torch.arange(like.shape[-2], device=like.device)[:, None]
    x = torch.arange(like.shape[-1], device=like.device)
    top, left, bottom, right = (v[..., None, None] for v in (top, left, top + height, left + width))
    return (y >= top) & (y < bottom) & (x >= left) & (x < right)


def cutmix(
    like: Tensor,
    area: tuple[float, float] = (0.5, 0.5),
    aspect: tuple[float, float] | None = None,
    boxes: int = 1,
) -> Mix:
    """Boxes of a given area at a uniform place inside the image.

    Args:
        aspect: bounds of height / width as shares of the image, drawn log-uniformly. None draws
            the height as French et al. (2020) do: log-uniform between `area` and 1.
        boxes: how many per image, each shrunk to its part of the area it drew; where an even
            number of them overlaps the image shows itself.
    """
    _ordered("area", area, 1)
    b, (h, w) = len(like), like.shape[-2:]
    u = _move(torch.rand(b, boxes, 4), like)
    share = area[0] + u[..., 0] * (area[1] - area[0])
    if aspect is None:
        high = share ** u[..., 1]
    else:
        _ordered("aspect", aspect)
        low, top = map(math.log, aspect)
        high = (share * (low + u[..., 1] * (top - low)).exp()).sqrt().clamp(max=1)
    shrink = boxes**-0.5
    height = (high * shrink * h).round()
    width = (share / high * shrink * w).round().clamp(max=w)
    return Mix(_inside(height, width, u[..., 2:], like).sum(1) % 2 == 1, _next(like))


def cutmix_xor(like: Tensor, area: tuple[float, float] = (0.25, 0.5), boxes: int = 3) -> Mix:
    """CPS with CutMix (Chen et al., 2021; TorchSemiSeg@5e0c29c mask_gen.py, BoxMaskGenerator)."""
    return cutmix(like, area, boxes=boxes)


def cutmix_half(like: Tensor, p: float = 0.5) -> Mix:
    """U2PL and GTA-Seg: with probability `p` all images are mixed, by a box of half their area.

    The box is wider than half the image and less wide than all of it (U2PL@ab3d2be and
    GTA-Seg@534f10f, generate_unsup_data).
    """
    b, (h, w) = len(like), like.shape[-2:]
    u = _move(torch.rand(b, 3), like)
    least = w // 2 + 1
    width = least + (u[:, 0] * (w - least)).floor()
    height = (h * w / 2 / width).round()
    mixed = _move(torch.rand(1), like) < p
    return Mix(_inside(height, width, u[:, 1:], like) & mixed, _next(like))


def cutmix_beta(like: Tensor, a: float = 4.0) -> Mix:
    """PS-MT (VOC) and Dual Teacher: sides of sqrt(1 - s), s ~ Beta(a, a) once for the batch.

    A box's centre lies anywhere but in the first eighth of a side, and the box is cut off at the
    border; partners are a random permutation (PS-MT@058cdc3 rand_bbox_1, cut_mix;
    dual-teacher@868e6e79 cut_mixer).
    """
    if a <= 0:
        raise ValueError(f"a={a}: choose a number above 0")
    mask = boxes_beta(like, a, a)
    return Mix(mask, _move(torch.randperm(len(like)), like))


def cutmix_small(
    like: Tensor,
    p: float = 0.5,
    area: tuple[float, float] = (0.02, 0.4),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> Mix:
    """UniMatch: each image is mixed with probability `p` (UniMatch@0324f3dd obtain_cutmix_box).

    `aspect` bounds height / width, drawn uniformly. A box keeps its area and is drawn again until
    it lies inside the image, which favours squares; here at most 128 times, and one that still
    sticks out (at the defaults 1.6 in 100,000) is cut off.
    """
    _ordered("area", area, 1)
    _ordered("aspect", aspect)
    b, (h, w) = len(like), like.shape[-2:]
    u, each = _move(torch.rand(b, 128, 3), like), _move(torch.rand(b, 2), like)
    size = (area[0] + each[:, 1:] * (area[1] - area[0])) * h * w
    ratio = aspect[0] + u[..., 0] * (aspect[1] - aspect[0])
    height, width = (size * ratio).sqrt().floor(), (size / ratio).sqrt().floor()
    top, left = (u[..., 1] * h).floor(), (u[..., 2] * w).floor()
    fits = (top + height <= h) & (left + width <= w)
    first = fits.int().argmax(1, keepdim=True)
    box = (v.gather(1, first)[:, 0] for v in (top, left, height, width))
    return Mix(paint(*box, like) & (each[:, :1, None] < p), _next(like))


def classmix(label: Tensor, partner: str = "next") -> Mix:
    """ClassMix: image i keeps half of the classes in its (pseudo-)label, rounded down.

    The rest of it shows the partner: all of an image with a single class, and always its IGNORE
    pixels, which are no class (ClassMix@aa852919, U2PL@ab3d2be, dual-teacher@868e6e79).

    Args:
        label: (B, H, W) int64, classes below 256.
        partner: "next" image of the batch, or "random", a permutation (Dual Teacher).

    Raises:
        ValueError: unknown `partner`.
    """
    one_of("partner", partner, "next", "random")
    flat = label.flatten(1)
    present = torch.zeros(len(label), 256, dtype=torch.bool, device=label.device)
    present = present.scatter_(1, flat, True)
    present[:, IGNORE] = False
    u = _move(torch.rand(len(label), 256), label)
    rank = u.masked_fill(~present, 2).argsort(1).argsort(1)  # those present come first
    kept = rank < present.sum(1, keepdim=True) // 2
    mask = ~kept.gather(1, flat).view_as(label)
    random = partner == "random"
    return Mix(mask, _move(torch.randperm(len(label)), label) if random else _next(label))


def paste(mix: Mix, source: Tensor, x: Tensor) -> Tensor:
    """As `mix(x)`, but the boxes show `source`: another batch, which `mix.partner` counts in."""
    mask = mix.mask if x.ndim == 3 else mix.mask[:, None]
    return torch.where(mask, source[mix.partner], x)


@dataclass(frozen=True)
class Injection:
    """Image i shows in `mix.mask` its partner as it is after labeled boxes went into it.

    Called with (x, labeled), both (B, H, W) or (B, C, H, W): images, labels or confidences of the
    unlabeled and of the labeled.
    """

    inject: Mix  # boxes of labeled images, in copies of the unlabeled ones
    mix: Mix  # boxes of these copies, in the unlabeled images

    def __call__(self, x: Tensor, labeled: Tensor) -> Tensor:
        return paste(self.mix, paste(self.inject, labeled, x), x)


def cutmix_inject(like: Tensor, labeled: Tensor, score: Tensor) -> Injection:
    """AugSeg's label-injecting CutMix (AugSeg@7ead870, cut_mix_label_adaptive).

    A copy of unlabeled image i takes a box of a labeled one with probability 1 - score[i]; then
    each image takes a box of its partner's copy, so that what goes into copy i is seen in another
    image. One random permutation finds partners and labeled images, counted round if too few.

    Args:
        like: unlabeled, (B, ..., H, W).
        labeled: any tensor with as many entries as there are labeled images.
        score: (B,) in [0, 1], how sure the teacher is of each image: `confidence_per_image`.
    """
    inner, outer = boxes_beta(like, 8.0, 2.0), boxes_beta(like, 4.0, 4.0)
    partner = _move(torch.randperm(len(like)), like)
    unsure = _move(torch.rand(len(like)), like) > score
    inject = Mix(inner & unsure[:, None, None], partner % len(labeled))
    return Injection(inject, Mix(outer, partner))


def boxes_beta(like: Tensor, a: float, b: float) -> Tensor:
    """Masks (B, H, W) of boxes as in `cutmix_beta`, with sides of sqrt(1 - s), s ~ Beta(a, b)."""
    count, (h, w) = len(like), like.shape[-2:]
    side = (1 - _move(Beta(a, b, validate_args=False).sample(), like)).sqrt()
    u = _move(torch.rand(count, 2), like)
    up, back = (side * h / 2).floor(), (side * w / 2).floor()
    y = h // 8 + (u[:, 0] * (h - h // 8)).floor()
    x = w // 8 + (u[:, 1] * (w - w // 8)).floor()
    return paint(y - up, x - back, 2 * up, 2 * back, like)


def copy_paste(label: Tensor, classes: Tensor, p: float = 0.5) -> Mix:
    """AEL: with probability `p` an image gets the next one's pixels of some classes.

    In the released code they are zoomed by 0.1 to 2 before (SemiSeg-AEL@747c797), here they stay.

    Args:
        label: (B, H, W) int64, annotations; IGNORE is of no class.
        classes: (K,) bool, those that are pasted.
    """
    classes = torch.cat([classes, classes.new_zeros(IGNORE + 1 - len(classes))])
    pasted = _move(torch.rand(len(label), 1, 1), label) < p
    partner = _next(label)
    return Mix(classes[label[partner]] & pasted, partner)


def cutmix_class(label: Tensor, wanted: Tensor, area: float = 0.5) -> Mix:
    """AEL: a box that holds something of a wanted class, from an image that shows it.

    The partner is any other image of the batch with that class, else any other. The box has the
    shape of `cutmix` and lies anywhere where it holds a random pixel of the class. The released
    code instead draws partners from the whole list, by what it last saw in them, and fits the box
    to a connected region (SemiSeg-AEL@747c797, generate_cutmix_mask).

    Args:
        label: (B, H, W) int64, predictions.
        wanted: (B,) int64, a class per image.
    """
    _ordered("area", (area, area), 1)
    b, (h, w) = len(label), label.shape[-2:]
    u, prefer = (_move(torch.rand(b, n), label) for n in (4, b))
    shown = torch.stack([(label == c).flatten(1).any(1) for c in wanted])  # (image, partner)
    itself = torch.eye(b, device=label.device)
    partner = (prefer + shown.float() - 3 * itself).argmax(1)
    pool = label[partner].flatten(1) == wanted[:, None]
    order = (pool | ~pool.any(1, keepdim=True)).cumsum(1)
    number = (u[:, :1] * order[:, -1:]).long().minimum(order[:, -1:] - 1) + 1
    pixel = torch.searchsorted(order, number)[:, 0]
    high = area ** u[:, 1]
    sides = torch.stack([(high * h).round(), (area / high * w).round().clamp(max=w)], 1)
    room = torch.tensor([h, w], device=label.device) - sides
    at = torch.stack([pixel // w, pixel % w], 1)
    low, top = (at - sides + 1).clamp(min=0), at.minimum(room)
    place = low + (u[:, 2:] * (top - low + 1)).floor()
    return Mix(paint(*place.T, *sides.T, label), partner)


def _ordered(name: str, bounds: tuple[float, float], most: float = math.inf) -> None:
    if not 0 < bounds[0] <= bounds[1] <= most:
        raise ValueError(f"{name}={tuple(bounds)}: choose 0 < lower <= upper <= {most:g}")


def _move(draw: Tensor, like: Tensor) -> Tensor:
    return draw.to(like.device, non_blocking=True)


def _next(like: Tensor) -> Tensor:
    return torch.arange(len(like), device=like.device).roll(-1)


def _inside(height: Tensor, width: Tensor, u: Tensor, like: Tensor) -> Tensor:
    """Masks of boxes inside the image, each whole-pixel place equally likely; u (..., 2)."""
    h, w = like.shape[-2:]
    top, left = (u[..., 0] * (h - height + 1)).floor(), (u[..., 1] * (w - width + 1)).floor()
    return paint(top, left, height, width, like)
