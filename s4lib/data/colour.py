"""Colour operations that released codes draw for a view, on RGB in [0, 1], before normalisation.

A draw is a list of (operation, value), applied in its order; one function per code draws it. The
originals work on 8-bit images and round after each operation; here nothing is rounded, and their
approximation of a Gaussian by box filters (PIL) is a Gaussian.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor
from torch.nn.functional import pad

Operations = list[tuple[str, object]]


def hue(image: Tensor, shift: float) -> Tensor:
    """Hue turned by `shift` of the colour circle, HSV's saturation and value kept.

    As torchvision's `adjust_hue`, which takes eight times as long.
    """
    red, green, blue = image
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    sector = (red - green).add_(chroma, alpha=4)
    # A choice, as `where` makes it in twenty times the time: the weights are 0 or 1.
    sector.lerp_((blue - red).add_(chroma, alpha=2), (value == green).float())
    sector.lerp_(green - blue, (value == red).float()).div_(chroma.clamp(min=1e-12))
    turned = torch.empty_like(image)
    for offset, channel in zip((5, 3, 1), turned, strict=True):
        at = sector + (6 * shift + offset)
        at.sub_(torch.floor(at / 6), alpha=6)
        torch.sub(value, torch.minimum(at, 4 - at).clamp_(0, 1).mul_(chroma), out=channel)
    return turned


def hsv_saturation(image: Tensor, factor: float) -> Tensor:
    """HSV's saturation times `factor`, at most 1; hue and value kept."""
    value = image.amax(0)
    most = value / (value - image.amin(0)).clamp(min=1e-12)
    return value - (value - image) * most.clamp(max=factor)


def blur(image: Tensor, sigma_radius: tuple[float, int]) -> Tensor:
    """Gaussian blur, the image mirrored at its borders; radius 0 leaves it as it is.

    Sums of shifted images, one axis after the other: a convolution takes three times as long.
    """
    sigma, radius = sigma_radius
    radius = min(radius, min(image.shape[1:]) - 1)
    weight = np.exp(-0.5 * (np.arange(radius + 1) / sigma) ** 2)
    weight /= 2 * weight.sum() - 1
    for axis, border in ((1, (0, 0, radius, radius)), (2, (radius, radius, 0, 0))):
        mirrored, side = pad(image[None], border, mode="reflect")[0], image.shape[axis]
        image = mirrored.narrow(axis, radius, side) * float(weight[0])
        for i in range(1, radius + 1):
            for first in (radius - i, radius + i):
                image.add_(mirrored.narrow(axis, first, side), alpha=float(weight[i]))
    return image


OPERATIONS = {
    "brightness": F.adjust_brightness,
    "contrast": F.adjust_contrast,  # around the mean of the grey image
    "saturation": F.adjust_saturation,  # towards or away from the grey image
    "hue": hue,
    "grey": lambda image, _: F.rgb_to_grayscale(image, 3),
    "blur": blur,
    "add": lambda image, value: (image + value).clamp(0, 1),
    "hsv saturation": hsv_saturation,
    "identity": lambda image, _: image,
    "autocontrast": lambda image, _: F.autocontrast(image),
    "equalize": lambda image, _: F.equalize(image),
    "sharpness": F.adjust_sharpness,
    "posterize": F.posterize,
    "solarize": F.solarize,
}


def recolour(image: Tensor, operations: Operations) -> Tensor:
    """One image (3, H, W) in [0, 1] after the operations, again in [0, 1]."""
    for name, value in operations:
        image = OPERATIONS[name](image, value)
    return image


def draw_none(rng: np.random.Generator) -> Operations:
    """U2PL, GTA-Seg and CPS: no colour at all; what is strong there is CutMix."""
    return []


def draw_jitter(rng: np.random.Generator, amount: float = 0.5, shift: float = 0.25) -> Operations:
    """torchvision's ColorJitter(amount, amount, amount, shift): all four, in random order."""
    names = ("brightness", "contrast", "saturation")
    drawn = [(name, 1 + amount * rng.uniform(-1, 1)) for name in names]
    drawn.append(("hue", shift * rng.uniform(-1, 1)))
    return [drawn[i] for i in rng.permutation(4)]


def draw_unimatch(rng: np.random.Generator) -> Operations:
    """UniMatch@7292bac, dataset/semi.py: jitter, grey, blur."""
    drawn = draw_jitter(rng) if rng.uniform() < 0.8 else []
    if rng.uniform() < 0.2:
        drawn.append(("grey", None))
    if rng.uniform() < 0.5:
        drawn.append(("blur", _sigma(rng, 0.1, 2.0)))
    return drawn


def draw_ps_mt(rng: np.random.Generator) -> Operations:
    """PS-MT@896af48, Base/base_dataset.py: as UniMatch, but the blur has kernels of 1 (none) to 5.

    The kernel size is int(4.95 u), plus 1 where that is even: 1, 3 and 5 with probabilities 0.40,
    0.40 and 0.19.
    """
    drawn = draw_jitter(rng) if rng.uniform() < 0.8 else []
    if rng.uniform() < 0.2:
        drawn.append(("grey", None))
    if rng.uniform() < 0.5:
        drawn.append(("blur", (rng.uniform(0.1, 2.0), int(4.95 * rng.uniform()) // 2)))
    return drawn


def draw_augseg(rng: np.random.Generator) -> Operations:
    """AugSeg@65bd476, dataset/augs_TIBA.py: one to three of eleven, with replacement (eq. 3)."""
    names = ("identity", "autocontrast", "equalize", "blur", "contrast", "brightness")
    names += ("saturation", "sharpness", "posterize", "solarize", "hue")
    drawn: Operations = []
    for i in rng.integers(len(names), size=rng.integers(1, 3, endpoint=True)):
        value = None
        if names[i] == "blur":
            value = _sigma(rng, 0.1, 2.0)
        elif names[i] in ("contrast", "brightness", "saturation", "sharpness"):
            value = 0.95 - 0.9 * rng.uniform()  # these only weaken the image
        elif names[i] == "posterize":
            value = int(rng.integers(4, 7, endpoint=True))  # bits kept
        elif names[i] == "solarize":
            value = int(rng.integers(1, 255, endpoint=True)) / 255
        elif names[i] == "hue":
            value = rng.uniform(-0.5, 0.5)
        drawn.append((names[i], value))
    return drawn


def draw_dual_teacher(rng: np.random.Generator) -> Operations:
    """dual-teacher@868e6e7, seg_core/augmentations.py, `transform`: after CutMix, per image."""
    drawn = draw_jitter(rng, 0.25, 0.25) if rng.uniform() < 0.8 else []
    if rng.uniform() < 0.5:
        drawn.append(("blur", _sigma(rng, 0.15, 1.15)))
    return drawn


def draw_distortion(rng: np.random.Generator) -> Operations:
    """PhotoMetricDistortion of MMSegmentation 0.x: each with probability 1/2, contrast 2nd or last.

    Its contrast is a plain factor, so an operation "brightness"; its hue counts 180 steps a circle.
    """
    drawn = [
        ("add", rng.uniform(-32, 32) / 255),
        ("brightness", rng.uniform(0.5, 1.5)),
        ("hsv saturation", rng.uniform(0.5, 1.5)),
        ("hue", int(rng.integers(-18, 18)) / 180),
    ]
    order = (0, 1, 2, 3) if rng.uniform() < 0.5 else (0, 2, 3, 1)
    return [drawn[i] for i in order if rng.uniform() < 0.5]


def _sigma(rng: np.random.Generator, low: float, high: float) -> tuple[float, int]:
    sigma = rng.uniform(low, high)
    return sigma, math.ceil(3 * sigma)


def jitter_normalised(batch: Tensor, rng: np.random.Generator) -> Tensor:
    """Jitter and greyscale of *normalised* images (B, 3, H, W), one draw for all of them.

    dual-teacher@868e6e7, tools/train.py: operations made for RGB in [0, 1] are given normalised
    values, and they clamp to [0, 1]: everything darker than the mean becomes 0.
    """
    drawn = draw_jitter(rng)
    if rng.uniform() < 0.2:
        drawn.append(("grey", None))
    for name, value in drawn:
        if name == "hue":  # torchvision's, as released: ours differs outside [0, 1]
            # It divides by the largest channel; what has 0 there can only be black after the clamp.
            batch = F.adjust_hue(batch, value).nan_to_num_(0)
        else:
            batch = OPERATIONS[name](batch, value)
    return batch
