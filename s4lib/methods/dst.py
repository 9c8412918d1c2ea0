"""DST (Chen et al., NeurIPS 2022): debiased self-training, with heads that spare the main one.

Pseudo-labels train a second classifier on the same features, so that their noise never reaches the
one that gives them. A third one is set on being right about labeled pixels and wrong about the
others, the worst that the features allow; they learn the opposite, so that it is less bad.

A reconstruction: the paper classifies images, GTA-Seg (Table 5, "Unbiased ST") quotes it for
segmentation without code or details. Ours alone are: heads that are copies of the SegNet's
`classifier` and samples that are pixels; and in `paper`, to compare with GTA-Seg, its warm-up,
CutMix, EMA teacher and dropped fifth. Losses, weights and gradient reversal are those of
thuml/Transfer-Learning-Library (dst.py@c11a06f). `code` is that program with pixels for samples:
labels of the main head, sure ones alone but averaged over all, a strong view, no warm-up.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Count, Share
from ..losses import IGNORE, ce, ignore_unsure, mean_over, pseudo_label
from ..method import Method, ema, frozen_copy
from ..mixing import cutmix_half


class DST(Method):
    """A head for pseudo-labels, a worst-case head, and a main head that learns from labels."""

    weight: float = 1.0  # of the pseudo-labels' loss
    worst: float = 1.0  # of the worst-case loss (eta); 0 for the pseudo-labels' head alone
    worst_labeled: float = 2.0  # of its labeled part (eta')
    most: float = 0.1  # share of its gradient that reaches the features in the end, turned round
    rise: float = 1000.0  # steps after which that share is 46 % of its last value
    strong_labeled: float = 0.0  # weight of the labeled images' strong view
    labels: Literal["teacher", "student"] = "teacher"  # whose pseudo-labels: an EMA's, or its own
    drop: Share = 0.2  # share of the least confident pixels, which are ignored
    threshold: float | None = None  # instead: confidence from which a pixel counts
    cutmix: Share = 0.5  # probability of mixing the batch
    decay: Share = 0.99  # of the EMA
    warmup: Count = 1  # epochs on labels alone
    view: Literal["weak", "strong"] = "weak"  # is mixed and shown to the pseudo-labels' head

    deployed = "teacher"  # where there is one
    presets = {"paper": {}, "code": dict(labels="student", threshold=0.7, cutmix=0.0, warmup=0)}
    presets["code"] |= dict(strong_labeled=0.1, view="strong")

    def setup(self, build):
        self.student = build()
        self.heads = nn.ModuleList(build().classifier for _ in range(2))  # pseudo, worst case
        if self.labels == "teacher":
            self.teacher = frozen_copy(self.student)
        self.deployed, self.strong_views = self.labels, int(self.view == "strong")
        self.labeled_strong = self.strong_labeled > 0

    def networks(self):
        return {k: net for k, net in self.named_children() if k != "heads"}

    def step(self, batch, clock, minimize):
        if clock.epoch < self.warmup:
            return self.warm_up(batch, minimize)
        net, (pseudo, worst), size = self.student, self.heads, batch.image.shape[-2:]
        mix = cutmix_half(batch.weak, self.cutmix)
        views = [batch.image, batch.weak, mix((*batch.strong, batch.weak)[0])]
        views += [batch.image_strong] * self.labeled_strong
        counts = [len(x) for x in views]
        fused = net.fuse(net.encode(torch.cat(views)))
        logits, logits_u, _, *strong = net.classify(fused, size).split(counts)
        sup = self.criterion(logits, batch.label)
        for one in strong:
            sup = sup + self.strong_labeled * self.criterion(one, batch.label)
        with torch.no_grad():
            given = self.teacher(batch.weak) if self.labels == "teacher" else logits_u
        label, confidence = map(mix, pseudo_label(given))
        label = torch.where(mix(batch.valid), label, IGNORE)
        if self.threshold is None:
            label, _ = ignore_unsure(label, confidence, self.drop)
            keep, over = label != IGNORE, "kept"
        else:
            keep, over = (label != IGNORE) & (confidence >= self.threshold), "valid"

        def read(head, part):
            align = net.align_corners
            return F.interpolate(head(part), size, mode="bilinear", align_corners=align)

        unsup = ce(read(pseudo, fused.split(counts)[2]), label, keep=keep, over=over)
        step = clock.phase(self.warmup).step
        turned = reverse(fused[: sum(counts[:2])], reversal(step, self.most, self.rise))
        guess, guess_u = read(worst, turned).split(counts[:2])
        valid = batch.label != IGNORE, batch.valid
        case = worst_case(logits, guess, logits_u, guess_u, self.worst_labeled, *valid)
        if minimize(sup + self.weight * unsup + self.worst * case, net, self.heads):
            if self.labels == "teacher":
                ema(self.teacher, net, self.decay)
        found = {"sup": sup, "unsup": unsup, "worst": case, "kept": keep.float().mean()}
        return {name: value.detach() for name, value in found.items()}

    def warm_up(self, batch, minimize):
        sup = self.criterion(self.student(batch.image), batch.label)
        if minimize(sup, self.student) and self.labels == "teacher":
            ema(self.teacher, self.student, 0.0)
        return {"sup": sup.detach()}


def worst_case(
    logits: Tensor,
    worst: Tensor,
    logits_u: Tensor,
    worst_u: Tensor,
    labeled: float,
    valid: Tensor,
    valid_u: Tensor,
) -> Tensor:
    """What the worst-case head minimises: agree with the main head's label on labeled pixels,
    `labeled` times, and disagree on unlabeled ones, -log(1 - p + 1e-6); means over valid pixels.

    Logits (B, K, H, W), of the main head without gradient, and of the worst-case head; `valid`
    (B, H, W) bool. DST, eq. of the worst case; WorstCaseEstimationLoss of TLlib@c11a06f.
    """
    agree = ce(worst, logits.argmax(1), keep=valid)
    probs = worst_u.float().softmax(1).gather(1, logits_u.argmax(1, keepdim=True))[:, 0]
    return labeled * agree + mean_over(-(1 - probs + 1e-6).clamp(max=1).log(), valid_u)


def reverse(x: Tensor, coefficient: float) -> Tensor:
    """`x`, whose gradient is turned round and multiplied by `coefficient` (Ganin and Lempitsky)."""
    return x.detach() - coefficient * (x - x.detach())


def reversal(step: int, most: float = 0.1, rise: float = 1000.0) -> float:
    """Coefficient of `reverse` after so many steps: from 0 to `most` (TLlib@65c8ae9, WarmStart)."""
    return 2 * most / (1 + math.exp(-step / rise)) - most
