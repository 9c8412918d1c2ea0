"""Mean Teacher (Tarvainen and Valpola, NeurIPS 2017), per pixel.

The teacher's weights are the exponential moving average (EMA) of the student's. Both see the same
unlabeled crop, the student with photometric noise; the student is pulled towards the teacher's
softmax by a squared difference.

`code` follows the re-implementation that most segmentation papers quote (TorchSemiSeg@5e0c29c,
MeanTeacher): one view for both, weight 100 without ramp-up, BN statistics of the teacher its own
(train mode). One thing is not copied: there the EMA runs before the student's update, here after.
"""

from __future__ import annotations

import torch

from ..losses import ce, mse
from ..method import Method, ema, frozen_copy, joint, one_of
from ..schedules import ramp_up, warm_decay


class MeanTeacher(Method):
    """Consistency between a student and the moving average of its weights.

    Args:
        weight: factor of the consistency loss after its ramp-up (mean over classes and pixels).
        decay: of the EMA; in the first steps it is 1 - 1/(step + 1), where that is smaller.
        ramp: share of the training over which the weight rises; 0 for none.
        buffers: what the EMA does with BN statistics: "copy", "ema" or "keep".
        teacher_mode: "eval" normalises the teacher by running statistics, "train" by the batch.
        student_view: "strong" (photometric noise) or "weak" (the teacher's own view).
    """

    strong_views = 1
    presets = {
        "paper": {},
        "code": {
            "weight": 100.0,
            "ramp": 0.0,
            "buffers": "keep",
            "teacher_mode": "train",
            "student_view": "weak",
        },
    }

    def __init__(
        self,
        build,
        *,
        weight: float = 10.0,
        decay: float = 0.99,
        ramp: float = 0.2,
        buffers: str = "copy",
        teacher_mode: str = "eval",
        student_view: str = "strong",
    ):
        super().__init__()
        self.student = build()
        self.teacher = frozen_copy(self.student)
        one_of("teacher_mode", teacher_mode, "eval", "train")
        self.batch_statistics = ("teacher",) if teacher_mode == "train" else ()
        self.weight, self.decay, self.ramp = weight, decay, ramp
        self.buffers = one_of("buffers", buffers, "copy", "ema", "keep")
        self.student_view = one_of("student_view", student_view, "strong", "weak")

    def step(self, batch, clock, minimize):
        with torch.no_grad():
            target = self.teacher(batch.weak).softmax(1)
        view = batch.strong[0] if self.student_view == "strong" else batch.weak
        logits, logits_u = joint(self.student, batch.image, view)
        sup = ce(logits, batch.label)
        cons = mse(logits_u, target, valid=batch.valid)  # eq. 1
        if minimize(sup + self.weight * ramp_up(clock, self.ramp) * cons, self.student):
            decay = warm_decay(self.decay, clock.step)
            ema(self.teacher, self.student, decay, self.buffers)  # eq. 3
        return {"sup": sup.detach(), "cons": cons.detach()}
