"""ClassMix (Olsson et al., WACV 2021): Mean Teacher that pastes what it believes to be objects.

The teacher labels two unlabeled images; half of the classes it sees in one are cut out along its
own contours and pasted onto the other, labels alike, and the student learns the mixture. Mixed
borders follow objects instead of CutMix's boxes, and a wrong contour takes its label along. The
loss is scaled by the share of pixels that the teacher is sure of, one number for the batch.

`paper` is also what ClassMix@aa852919 runs on Cityscapes: teacher in training mode, its average of
parameters alone, the student deployed, labeled and unlabeled images in passes of their own. There
colours change after mixing, for the whole picture; here every image has its own before. `voc` is
its setting for VOC, without changes of colours; `unsure` has its other ways to weigh.
"""

from __future__ import annotations

from typing import Literal

import torch

from ..config import Share
from ..losses import IGNORE, pseudo_label, weighted_ce
from ..method import Method, ema, frozen_copy
from ..mixing import classmix
from ..schedules import warm_decay


class ClassMix(Method):
    """Pseudo-labels of an EMA teacher under ClassMix."""

    threshold: float = 0.968  # confidence from which a pixel counts as sure
    # What sureness weighs: the batch by its share, each pixel by 0 or 1, or nothing.
    unsure: Literal["batch", "pixel", "none"] = "batch"
    weight: float = 1.0  # of the unlabeled loss
    decay: Share = 0.99  # of the EMA; at first 1 - 1/(step + 1), where that is smaller
    buffers: Literal["copy", "ema", "keep"] = "keep"  # what the EMA does with BN statistics
    teacher_mode: Literal["eval", "train"] = "train"  # normalises by running statistics, or batch's
    view: Literal["strong", "weak"] = "strong"  # is mixed and shown to the student

    presets = {"paper": {}, "voc": {"view": "weak"}}

    def setup(self, build):
        self.student = build()
        self.teacher = frozen_copy(self.student)
        self.batch_statistics = ("teacher",) if self.teacher_mode == "train" else ()
        self.strong_views = 1 if self.view == "strong" else 0

    def step(self, batch, clock, minimize):
        with torch.no_grad():
            label, confidence = pseudo_label(self.teacher(batch.weak))
        mix = classmix(torch.where(batch.valid, label, IGNORE))  # padding is no class
        valid, confidence = mix(batch.valid), mix(confidence)
        label = torch.where(valid, mix(label), IGNORE)
        logits = self.student(batch.image)
        logits_u = self.student(mix(batch.strong[0] if self.strong_views else batch.weak))
        sup = self.criterion(logits, batch.label)
        unsup = weighted_ce(logits_u, label, confidence, self.threshold, self.unsure)
        if minimize(sup + self.weight * unsup, self.student):
            ema(self.teacher, self.student, warm_decay(self.decay, clock.step), self.buffers)
        kept = (valid & (confidence >= self.threshold)).float().mean()
        return {"sup": sup.detach(), "unsup": unsup.detach(), "kept": kept}
