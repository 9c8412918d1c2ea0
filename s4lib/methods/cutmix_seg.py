"""CutMix-Seg (French et al., BMVC 2020): Mean Teacher whose perturbation is CutMix.

The teacher labels two plain images; a box of one is pasted into the other, and the student must
give for the mixed image the equally mixed labels. Class boundaries in images are not low-density
regions, so small perturbations cannot find them; a pasted box puts hard edges and foreign context
everywhere.

`paper` is French et al.: squared difference of softmax maps, scaled by the *share* of confident
pixels in the batch; its frozen BN becomes a teacher in evaluation mode. `pseudo_label` is what
later papers run under this name or as CutMix-MT: cross-entropy with hard labels, confident pixels
only.
"""

from __future__ import annotations

from typing import Literal

import torch

from ..losses import ce, mse, pseudo_label
from ..method import Method, ema, frozen_copy, joint
from ..mixing import cutmix
from ..schedules import ramp_up, warm_decay


class CutMixSeg(Method):
    """Consistency under CutMix with an EMA teacher."""

    cons: Literal["mse", "ce"] = "mse"  # between softmax maps (the paper), or with pseudo-labels
    threshold: float = 0.97  # confidence that counts as sure
    weight: float = 1.0  # of the consistency loss after its ramp-up
    decay: float = 0.99  # of the EMA; at first 1 - 1/(step + 1), where that is smaller
    ramp: float = 0.0  # share of the training over which the weight rises; 0 for none, as the paper
    area_min: float = 0.5  # lower bound of the share of the image that the box has
    area_max: float = 0.5  # its upper bound
    buffers: Literal["copy", "ema", "keep"] = "ema"  # what the EMA does with BN statistics
    teacher_mode: Literal["eval", "train"] = "eval"  # normalises by running statistics, or batch's
    view: Literal["strong", "weak"] = "strong"  # is mixed and shown to the student

    strong_views = 1
    presets = {
        "paper": {},
        "pseudo_label": {
            "cons": "ce",
            "threshold": 0.9,
            "ramp": 0.2,
            "area_min": 0.25,
            "buffers": "keep",
            "teacher_mode": "train",
            "view": "weak",
        },
    }

    def setup(self, build):
        self.student = build()
        self.teacher = frozen_copy(self.student)
        self.batch_statistics = ("teacher",) if self.teacher_mode == "train" else ()

    def step(self, batch, clock, minimize):
        mix = cutmix(batch.weak, (self.area_min, self.area_max))
        with torch.no_grad():
            logits_t = mix(self.teacher(batch.weak))
        valid = mix(batch.valid)
        view = batch.strong[0] if self.view == "strong" else batch.weak
        logits, logits_u = joint(self.student, batch.image, mix(view))
        label, confidence = pseudo_label(logits_t)
        sure = valid & (confidence >= self.threshold)
        if self.cons == "mse":
            cons = mse(logits_u, logits_t.softmax(1), valid=valid, classes="sum")
            cons = cons * sure.float().mean()
        else:
            cons = ce(logits_u, label, keep=sure, over="all")
        sup = self.criterion(logits, batch.label)
        if minimize(sup + self.weight * ramp_up(clock, self.ramp) * cons, self.student):
            decay = warm_decay(self.decay, clock.step)
            ema(self.teacher, self.student, decay, self.buffers)
        return {"sup": sup.detach(), "cons": cons.detach(), "kept": sure.float().mean()}
