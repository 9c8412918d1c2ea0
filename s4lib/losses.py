"""Losses as functions of logits (B, K, H, W), float or half; all arithmetic is in float32.

Every mean divides by a count taken over *all* processes, so that a loss, and with it the averaged
gradient, does not depend on how many processes share the batch.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import distributed
from .config import one_of

IGNORE = 255  # the label of void and of padding: out of every loss and every metric


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


def soft_ce(logits: Tensor, probs: Tensor, *, keep: Tensor) -> Tensor:
    """Cross-entropy with `probs` (B, K, H, W) in place of a label, mean over `keep` (B, H, W)."""
    loss = -(probs.float() * logits.float().log_softmax(1)).sum(1)
    return _mean(torch.where(keep, loss, 0), keep)


def weighted_ce(
    logits: Tensor, label: Tensor, confidence: Tensor, threshold: float, how: str
) -> Tensor:
    """Cross-entropy with pseudo-labels, scaled by how many of them are sure, a 0-d tensor.

    Args:
        logits, label: as of `ce`.
        confidence: (B, H, W); at least `threshold` is sure.
        how: "none", mean over valid pixels; "pixel", the same with zero for unsure ones; "batch",
            times the sure share of this process's pixels (ClassMix@aa852919, dual-teacher@868e6e79
            compute_classmix); "image", times that of the pixel's image, and the mean is over pixels
            with a loss above zero (dual-teacher@868e6e79 compute_unsupervised_loss).

    Raises:
        ValueError: unknown `how`.
    """
    one_of("how", how, "none", "pixel", "batch", "image")
    valid = label != IGNORE
    sure = valid & (confidence >= threshold)
    if how == "image":
        share = sure.sum((1, 2), keepdim=True) / valid.sum((1, 2), keepdim=True).clamp(min=1)
        each = F.cross_entropy(logits.float(), label, ignore_index=IGNORE, reduction="none")
        return _mean(each * share, each > 0)
    loss = ce(logits, label, keep=sure if how == "pixel" else None, over="valid")
    return loss * sure.sum() / valid.sum().clamp(min=1) if how == "batch" else loss


def ohem(logits: Tensor, label: Tensor, threshold: float = 0.7, min_kept: int = 100_000) -> Tensor:
    """Cross-entropy over hard pixels: those whose true class has at most `threshold` probability,
    and in any case the `min_kept` hardest of this process (online hard example mining).

    The rule of U2PL@ab3d2be (OhemCrossEntropy2dTensor), TorchSemiSeg@5e0c29c
    (ProbOhemCrossEntropy2d) and UniMatch@0324f3dd. Arguments as of `ce`.
    """
    if min_kept >= label.numel():
        return ce(logits, label)
    with torch.no_grad():
        valid = label != IGNORE
        probs = logits.float().softmax(1)
        true = probs.gather(1, torch.where(valid, label, 0)[:, None])[:, 0]
        true = torch.where(valid, true, 1.0)  # so that too few valid pixels keep them all
        cut = true.flatten().kthvalue(max(min_kept, 1)).values.clamp(min=threshold)
    return ce(logits, label, keep=true <= cut)


@torch.no_grad()
def ignore_unsure(label: Tensor, confidence: Tensor, drop: float) -> tuple[Tensor, Tensor]:
    """(label, confidence) with IGNORE and 0 at the `drop` share of least confident pixels.

    All (B, H, W). The threshold is their quantile, linearly interpolated, over this process's
    pixels that are not IGNORE yet; what equals it goes too (GTA-Seg, eq. 2).
    """
    valid = label != IGNORE
    threshold = torch.where(valid, confidence, math.nan).nanquantile(drop)
    unsure = valid & (confidence <= threshold)
    return torch.where(unsure, IGNORE, label), torch.where(unsure, 0, confidence)


@torch.no_grad()
def confidence_weight(label: Tensor, confidence: Tensor, how: str, normaliser: str) -> Tensor:
    """(B, H, W) weights with mean 1 over pixels that are not IGNORE (GTA-Seg, eq. 6).

    `how`: "laplace", confidence + 1; "confidence" alone; or "none", all equal. With `normaliser`
    "all" the ignored pixels add their confidence + 1 to the sum, which weakens the loss (GTA-Seg's
    code); "inv_kept" divides by the kept share, which strengthens it (its code without weights).
    """
    times, plus = {"none": (0, 1), "confidence": (1, 0), "laplace": (1, 1)}[how]
    raw, keep = times * confidence + plus, label != IGNORE
    total = (raw if normaliser == "all" else raw * keep).sum().clamp(min=1e-6)
    return raw / total * (keep.numel() if normaliser == "inv_kept" else keep.sum())


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
