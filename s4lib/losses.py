"""Losses as functions of logits (B, K, H, W), float or half; all arithmetic is in float32.

Every mean divides by a count taken over *all* processes, so that a loss, and with it the averaged
gradient, does not depend on how many processes share the batch.
"""

from __future__ import annotations

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import distributed
from .config import one_of

IGNORE = 255  # the label of void and of padding: out of every loss and every metric


def full_precision(device: str) -> contextlib.AbstractContextManager:
    """No autocast within, on a type of device that has it."""
    if torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


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


@torch.no_grad()
def confidence_per_image(logits: Tensor, valid: Tensor | None = None) -> Tensor:
    """(B,) in [0, 1]: mean over valid pixels of confidence times 1 - entropy / ln K.

    AugSeg's measure of how sure a teacher is of an image (AugSeg@7ead870, train_semi.py); 0 where
    no pixel is valid. `logits` (B, K, H, W), `valid` (B, H, W) bool; None counts all pixels.
    """
    log_probs = logits.float().log_softmax(1)
    probs = log_probs.exp()
    sure = (1 + (probs * log_probs).sum(1) / math.log(logits.shape[1])) * probs.amax(1)
    valid = torch.ones_like(sure, dtype=torch.bool) if valid is None else valid
    total = torch.where(valid, sure, 0).sum((1, 2))
    return total / valid.sum((1, 2)).clamp(min=1)


def kl(
    logits: Tensor,
    probs: Tensor,
    *,
    keep: Tensor | None = None,
    valid: Tensor | None = None,
    classes: str = "sum",
) -> Tensor:
    """KL(probs || softmax(logits)) of (B, K, H, W), summed over `keep`, divided by `valid` pixels.

    Both masks (B, H, W) bool; None is all. Over classes "sum", or "mean" as F.kl_div's default has
    it, which is K times smaller. CCT@65d4e5b (softmax_kl_loss) takes the mean without a confidence
    mask and the sum with one.
    """
    one_of("classes", classes, "mean", "sum")
    each = F.kl_div(logits.float().log_softmax(1), probs.float(), reduction="none")
    each = each.mean(1) if classes == "mean" else each.sum(1)
    valid = torch.ones_like(each, dtype=torch.bool) if valid is None else valid
    return _mean(torch.where(valid if keep is None else valid & keep, each, 0), valid)


def js(
    logits: Tensor, probs: Tensor, *, valid: Tensor | None = None, floor: float = 1e-5
) -> Tensor:
    """(KL(m || softmax(logits)) + KL(m || probs)) / 2, m their mean; mean over classes and pixels.

    CCT@65d4e5b (softmax_js_loss): Jensen-Shannon's arguments are the other way round, and `floor`
    is added to the probabilities inside one logarithm. Arguments as of `kl`.
    """
    middle = (logits.float().softmax(1) + probs.float()) / 2
    other = (probs.float() + floor).log()
    each = F.kl_div(logits.float().log_softmax(1), middle, reduction="none")
    each = (each + F.kl_div(other, middle, reduction="none")).mean(1) / 2
    valid = torch.ones_like(each, dtype=torch.bool) if valid is None else valid
    return _mean(torch.where(valid, each, 0), valid)


def abce(logits: Tensor, label: Tensor, threshold: float, min_kept: int = 1) -> Tensor:
    """Cross-entropy over pixels whose true class has *less* than `threshold` probability.

    In any case over the `min_kept` hardest per image of this process, as far as there is one more.
    Annealed, bootstrapped cross-entropy: the threshold rises (CCT@65d4e5b, abCE_loss). Arguments as
    of `ce`.
    """
    with torch.no_grad():
        valid = label != IGNORE
        true = logits.float().softmax(1).gather(1, torch.where(valid, label, 0)[:, None])[:, 0]
        true = torch.where(valid, true, math.inf).flatten()
        hardest = true.topk(min(min_kept * len(label) + 1, len(true)), largest=False).values
        last = (valid.sum() - 1).clamp(0, len(hardest) - 1)
        cut = hardest.index_select(0, last[None]).clamp(min=threshold)
    return ce(logits, label, keep=true.view_as(label) < cut)


def mean_over(value: Tensor, keep: Tensor) -> Tensor:
    """Mean of `value` over `keep` (bool, of its shape), the count being taken over all processes.

    Zero, with a gradient of zero, where nothing is kept.
    """
    return _mean(torch.where(keep, value, 0), keep)
