"""AugSeg (Zhao et al., CVPR 2023): a plain mean teacher, all effort in how images are perturbed.

The strong view has a random number of random colour operations (the views of `augment=augseg`), and
CutMix shows the student less of what its teacher is unsure of: the less sure, the likelier that a
box of a labeled image is pasted over, before images are mixed with each other.

`code` is AugSeg@7ead870: padding is pseudo-labelled, and through the first epoch the teacher is a
copy of the student. It cuts labeled and unlabeled images one to one; its configurations differ in
`extra_weak` (true for the 92 labels of VOC with ResNet-50). On Cityscapes it has threshold -0.7,
so that every pixel counts, and decay 0.996.
"""

from __future__ import annotations

from typing import Literal

import torch

from ..config import Count, Share
from ..losses import IGNORE, ce, confidence_per_image, pseudo_label
from ..method import Method, ema, frozen_copy, joint
from ..mixing import cutmix_inject
from ..schedules import warm_decay


class AugSeg(Method):
    """Pseudo-labels of an EMA teacher, label-injecting CutMix."""

    threshold: float = 0.95  # confidence from which a pixel counts
    weight: float = 1.0  # of the unlabeled loss
    # Labeled boxes: the likelier the less sure the teacher is of an image, always, or never.
    inject: Literal["adaptive", "always", "never"] = "adaptive"
    decay: Share = 0.999  # of the EMA; at first 1 - 1/(step + 1), where that is smaller
    copy_epochs: Count = 0  # at the beginning, in which the teacher is a copy of the student
    buffers: Literal["copy", "ema", "keep"] = "ema"  # what the EMA does with BN statistics
    padding: bool = False  # padded pixels count too
    extra_weak: bool = False  # the student's batch has the weak views too, for BN alone

    strong_views, deployed = 1, "teacher"
    presets = {"paper": {}, "code": {"padding": True, "copy_epochs": 1}}

    def setup(self, build):
        self.student = build()
        self.teacher = frozen_copy(self.student)

    def step(self, batch, clock, minimize):
        with torch.no_grad():
            logits_t = self.teacher(batch.weak)
        valid = batch.valid | self.padding
        label, confidence = pseudo_label(logits_t)
        label = torch.where(valid, label, IGNORE)
        sure = confidence_per_image(logits_t, valid)
        score = {"adaptive": sure, "always": -torch.ones_like(sure), "never": torch.ones_like(sure)}
        mix = cutmix_inject(batch.weak, batch.image, score[self.inject])
        label = mix(label, batch.label)
        confidence = mix(confidence, torch.ones_like(batch.label, dtype=confidence.dtype))
        keep = (label != IGNORE) & (confidence >= self.threshold)
        views = [batch.image, *[batch.weak] * self.extra_weak, mix(batch.strong[0], batch.image)]
        logits, *_, logits_u = joint(self.student, *views)
        sup = self.criterion(logits, batch.label)
        unsup = ce(logits_u, label, keep=keep, over="all")
        if minimize(sup + self.weight * unsup, self.student):
            decay = warm_decay(self.decay, clock.step) * (clock.epoch >= self.copy_epochs)
            ema(self.teacher, self.student, decay, self.buffers)
        return {"sup": sup.detach(), "unsup": unsup.detach(), "kept": keep.float().mean()}
