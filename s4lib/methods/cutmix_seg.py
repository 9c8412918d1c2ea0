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

import torch

from ..config import one_of
from ..losses import ce, mse, pseudo_label
from ..method import Method, ema, frozen_copy, joint
from ..mixing import cutmix
from ..schedules import ramp_up, warm_decay


class CutMixSeg(Method):
    """Consistency under CutMix with an EMA teacher.

    Args:
        cons: "mse" between softmax maps (French et al.) or "ce" with the teacher's pseudo-labels.
        threshold: confidence that counts as sure.
        weight: factor of the consistency loss after its ramp-up.
        decay: of the EMA; in the first steps it is 1 - 1/(step + 1), where that is smaller.
        ramp: share of the training over which the weight rises; 0 for none, as the paper.
        area_min, area_max: bounds of the box's share of the image.
        buffers: what the EMA does with BN statistics: "copy", "ema" or "keep".
        teacher_mode: "eval" normalises the teacher by running statistics, "train" by the batch.
        view: what is mixed and shown to the student, "strong" (photometric noise) or "weak".
    """

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

    def __init__(
        self,
        build,
        *,
        cons: str = "mse",
        threshold: float = 0.97,
        weight: float = 1.0,
        decay: float = 0.99,
        ramp: float = 0.0,
        area_min: float = 0.5,
        area_max: float = 0.5,
        buffers: str = "ema",
        teacher_mode: str = "eval",
        view: str = "strong",
    ):
        super().__init__()
        self.student = build()
        self.teacher = frozen_copy(self.student)
        one_of("teacher_mode", teacher_mode, "eval", "train")
        self.batch_statistics = ("teacher",) if teacher_mode == "train" else ()
        self.cons = one_of("cons", cons, "mse", "ce")
        self.threshold, self.weight, self.decay, self.ramp = threshold, weight, decay, ramp
        self.area = (area_min, area_max)
        self.buffers = one_of("buffers", buffers, "copy", "ema", "keep")
        self.view = one_of("view", view, "strong", "weak")

    def step(self, batch, clock, minimize):
        mix = cutmix(batch.weak, self.area)
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
