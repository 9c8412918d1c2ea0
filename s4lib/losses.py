"""Losses as functions of logits (B, K, H, W), float or half; all arithmetic is in float32.

Every mean divides by a count taken over *all* processes, so that a loss, and with it the averaged
gradient, does not depend on how many processes share the batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import distributed
from .method import IGNORE, one_of


def _mean(value: Tensor, count: Tensor) -> Tensor:
    return value.sum() / distributed.mean(count.sum().float()).clamp(min=1)


def ce(
    logits: Tensor,
    label: Tensor,
    *,
    keep: Tensor | None = None,
    weight: Tensor | None = None,
    over: str = "kept",
) -> Tensor:
    """Cross-entropy, a 0-d tensor; zero (with a gradient of zero) where nothing is kept.

    Args:
        logits: (B, K, H, W).
        label: (B, H, W) int64; IGNORE takes no part.
        keep: (B, H, W) bool, the pixels that count; None keeps all.
        weight: (B, H, W) float, a factor per pixel.
        over: what the sum is divided by, where published methods differ: "kept" pixels, "valid"
            pixels (label is not IGNORE), or "all" pixels.

    Raises:
        ValueError: unknown `over`.
    """
    valid = label != IGNORE
    kept = valid if keep is None else valid & keep
    counted = {"kept": kept, "valid": valid, "all": torch.ones_like(valid)}
    one_of("over", over, *counted)
    loss = F.cross_entropy(logits.float(), label, ignore_index=IGNORE, reduction="none")
    loss = torch.where(kept, loss, 0)  # not loss * kept: infinity times zero is NaN
    return _mean(loss if weight is None else loss * weight, counted[over])


def mse(
    logits: Tensor, probs: Tensor, *, valid: Tensor | None = None, classes: str = "mean"
) -> Tensor:
    """Squared difference of softmax(logits) and `probs` (B, K, H, W), mean over valid pixels.

    Over classes, "mean" is Mean Teacher's convention and "sum" that of French et al.: they differ
    by K.
    """
    one_of("classes", classes, "mean", "sum")
    difference = (logits.float().softmax(1) - probs.float()).square()
    difference = difference.mean(1) if classes == "mean" else difference.sum(1)
    valid = torch.ones_like(difference, dtype=torch.bool) if valid is None else valid
    return _mean(torch.where(valid, difference, 0), valid)


@torch.no_grad()
def pseudo_label(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(label, confidence): argmax and max of the softmax, each (B, H, W), without gradient."""
    confidence, label = logits.float().softmax(1).max(1)
    return label, confidence
