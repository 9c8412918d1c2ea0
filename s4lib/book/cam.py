"""Grad-CAM: which places of a fused map speak for a class in a region of the image."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nets import SegNet
from .features import Maps


def grad_cam(net: SegNet, fused: Tensor, region: Tensor, index: int) -> Tensor:
    """What each place of a fused map adds to the logits of class `index`, summed over a region.

    Selvaraju et al. (2017), eq. 1 and 2, on the map that the classifier reads: a channel's weight
    is the mean over places of the score's gradient, a place's contribution the weighted sum of its
    channels where that is positive. Their score is one logit of an image; for segmentation it is
    the sum over a region (Vinogradova et al., 2020).

    It is not scaled, so that maps of one image before and after a perturbation can be compared:
    divide them by the same number.

    Args:
        net: in evaluation mode; it is left as it was, without gradients.
        fused: (B, C, h, w).
        region: (B, H, W) bool, at the size of the logits.
        index: of the class, 0 to K - 1.

    Returns:
        (B, H, W), 0 or more, bilinearly enlarged.

    Raises:
        ValueError: a region of another number of images, or a class that the network has not.
    """
    if region.ndim != 3 or len(region) != len(fused):
        raise ValueError(f"region {tuple(region.shape)}: expected ({len(fused)}, H, W)")
    with torch.enable_grad():
        fused = fused.detach().requires_grad_()
        logits = net.classify(fused, region.shape[-2:])
        if not 0 <= index < logits.shape[1]:
            raise ValueError(f"index={index}: choose 0 to {logits.shape[1] - 1}")
        score = torch.where(region, logits[:, index], 0).sum()
        (gradient,) = torch.autograd.grad(score, fused)
    weight = gradient.mean((2, 3), keepdim=True)
    heat = (weight * fused.detach()).sum(1, keepdim=True).clamp(min=0)
    return F.interpolate(heat, region.shape[-2:], mode="bilinear")[:, 0]


def after(maps: Maps, steps: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    """Grad-CAM (N, H, W) of the student, "no step" and after each of `steps`, for class `index`
    where the annotation has it; an image's maps are divided by the largest value of "no step"."""
    region, found = (maps.truth == index).to(maps.fused.device), {}
    for name, step in {"no step": torch.zeros_like(maps.fused), **steps}.items():
        found[name] = grad_cam(maps.method.student, maps.fused + step, region, index).cpu()
    largest = found["no step"].amax((1, 2), keepdim=True)
    return {k: torch.where(largest > 0, heat / largest, 0) for k, heat in found.items()}
