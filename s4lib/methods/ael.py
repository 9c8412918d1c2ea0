"""AEL (Hu et al., NeurIPS 2021): the classes that the network does badly are shown more often.

A bank holds how confident the student is of each class on labeled pixels. Classes it is less sure
of are pasted more often into labeled images, lie more often in the boxes of CutMix, and more of
their pixels count in the unlabeled loss, each by a power of its confidence.

The paper is not among our sources: `paper` is its algorithm as its abstract, its code and what is
written about it have it, with `beta` and the "norm" of probabilities from memory. `code` is
hzhupku/SemiSeg-AEL@747c797 (threshold 0 there on Cityscapes; 0.7 on VOC), without what divides its
losses by the number of GPUs. In both, ours alone: partners and pasted pixels come from the batch
(see `mixing.cutmix_class`, `copy_paste`), every image is mixed and every class may be pasted, where
the code skips five that suit Cityscapes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .. import distributed
from ..config import Share
from ..losses import IGNORE, ce, pseudo_label
from ..memory import channels
from ..method import Method, ema, frozen_copy, joint
from ..mixing import copy_paste, cutmix_class
from ..schedules import warm_decay


class AEL(Method):
    """Mean Teacher with CutMix, tilted towards the classes of low confidence."""

    weight: float = 1.0  # of the unlabeled loss
    momentum: Share = 0.999  # of the confidence bank
    absent: Literal["keep", "zero"] = "keep"  # what the bank learns of a class that is not there
    start: Literal["zero", "random"] = "zero"  # what it begins with
    tilt: Literal["norm", "softmax"] = "norm"  # probability of a class, from 1 - confidence
    paste: Share = 0.5  # probability of copy-paste for a labeled image
    pasted: int = 3  # classes drawn for it, with replacement; 1 on VOC
    area: Share = 0.5  # of a CutMix box
    beta: float = 0.5  # power of a class's share of pixels that count
    gamma: float = 2.0  # power of a pixel's confidence, its weight
    threshold: float = 0.0  # confidence from which a pixel has a label; 0.7 on VOC
    labeled_too: bool = False  # labeled images have the unlabeled loss as well
    decay: Share = 0.99  # of the EMA; at first 1 - 1/(step + 1), where that is smaller
    teacher_mode: Literal["eval", "train"] = "eval"  # normalises by running statistics, or batch's

    deployed = "teacher"
    presets = {"paper": {}, "code": dict(absent="zero", start="random", tilt="softmax", beta=1.0)}
    presets["code"] |= dict(labeled_too=True, teacher_mode="train")

    def setup(self, build):
        self.student = build()
        self.teacher = frozen_copy(self.student)
        own = self.teacher_mode == "train"
        self.batch_statistics, self.buffer = (("teacher",), "keep") if own else ((), "copy")
        draw = {"zero": torch.zeros, "random": torch.rand}[self.start]
        self.register_buffer("confidence", draw(channels(self.student.classifier)))

    def step(self, batch, clock, minimize):
        pasted = torch.zeros_like(self.confidence, dtype=torch.bool)
        pasted[self.drawn(self.pasted, 0.5)] = True
        mix = copy_paste(batch.label, pasted, self.paste)
        image, truth = mix(batch.image), mix(batch.label)
        with torch.no_grad():
            logits_l, logits_t = joint(self.teacher, image, batch.weak)
        label, _ = pseudo_label(logits_t)
        label = torch.where(batch.valid, label, IGNORE)
        mix = cutmix_class(label, self.drawn(len(label), 1.0), self.area)
        logits, logits_u = joint(self.student, image, mix(batch.weak))
        found = class_confidence(logits, truth)
        if self.absent == "zero":
            found = found.nan_to_num(0)
        found = torch.where(found.isnan(), self.confidence, found)
        self.confidence.lerp_(found, 1 - self.momentum)
        sup = self.criterion(logits, truth)
        unsup, kept = self.consistency(logits_u, mix(logits_t), mix(batch.valid))
        loss = sup + self.weight * unsup
        if self.labeled_too:
            loss = loss + self.weight * self.consistency(logits, logits_l, truth != IGNORE)[0]
        if minimize(loss, self.student):
            ema(self.teacher, self.student, warm_decay(self.decay, clock.step), self.buffer)
        return {"sup": sup.detach(), "unsup": unsup.detach(), "kept": kept}

    def drawn(self, count, power):
        """`count` classes; the code draws those to paste from exp(sqrt(1 - confidence))."""
        need = 1 - self.confidence
        weight = (need**power).exp() if self.tilt == "softmax" else need
        total = weight.cumsum(0)
        u = torch.rand(count, device=total.device)
        return torch.searchsorted(total, u * total[-1]).clamp(max=len(total) - 1)

    def consistency(self, logits, logits_t, valid):
        label, confidence = pseudo_label(logits_t)
        label = torch.where(valid & (confidence >= self.threshold), label, IGNORE)
        rate = sampling_rate(self.confidence, self.beta)
        u = torch.rand(label.shape, device=label.device)
        keep = sampled(logits, rate, u) & valid
        weight = torch.where(keep, confidence**self.gamma, 0)
        return reweighted_ce(logits, label, weight), (keep & (label != IGNORE)).float().mean()


@torch.no_grad()
def class_confidence(logits: Tensor, label: Tensor) -> Tensor:
    """(K,) mean probability of the true class over its pixels, NaN for a class that has none.

    Of logits (B, K, H, W) and labels (B, H, W), over all processes.
    """
    known, classes = label != IGNORE, logits.shape[1]
    at = torch.where(known, label, 0)
    true = logits.float().softmax(1).gather(1, at[:, None])[:, 0]
    sums = []
    for value in (true, torch.ones_like(true)):
        mine = torch.where(known, value, 0).double().flatten()
        sums.append(mine.new_zeros(classes).index_add_(0, at.flatten(), mine))
    total, count = distributed.total(torch.stack(sums))
    return (total / count).float()


def sampling_rate(confidence: Tensor, beta: float = 1.0) -> Tensor:
    """(K,) share of a class's pixels that count: 1 for the least confident class."""
    need = 1 - confidence
    return (need / (need.max() + 1e-12)) ** beta


@torch.no_grad()
def sampled(logits: Tensor, rate: Tensor, u: Tensor) -> Tensor:
    """(B, H, W) bool, pixels drawn by the rate of the class that the student sees there.

    Logits (B, K, H, W), rate (K,), uniform draws u (B, H, W): those above 1 - rate.
    """
    return u > 1 - rate[logits.argmax(1)]


def reweighted_ce(logits: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """Cross-entropy weighted by `weight` (B, H, W), whose sum over all processes is made one.

    A pixel that is IGNORE adds its weight to that sum (SemiSeg-AEL@747c797, Criterion_cons).
    """
    mean = distributed.mean(weight.detach().mean())
    return ce(logits, label, weight=weight, over="all") / mean.clamp(min=1e-12)
