"""Mean Teacher (Tarvainen and Valpola, NeurIPS 2017), per pixel.

The teacher's weights are the exponential moving average (EMA) of the student's. Both see the same
unlabeled crop, the student with photometric changes; it is pulled towards the teacher's softmax by
a squared difference. The EMA covers parameters; the teacher normalises by the batch (train mode),
with running statistics of its own, as in the authors' code (CuriousAI/mean-teacher, main.py).

Deviations from the paper: its noise is translations, flips, Gaussian noise and dropout, ours the
photometric changes that segmentation work uses instead; the preset `noise` is Gaussian noise alone.
`code` follows the re-implementation that most segmentation papers quote (TorchSemiSeg@5e0c29c,
MeanTeacher): one view for both, weight 100, no ramp-up. One thing is not copied: there the EMA runs
before the student's update, here after.
"""

from __future__ import annotations

from typing import Literal

import torch

from ..losses import mse
from ..method import Method, ema, frozen_copy, joint
from ..schedules import ramp_up, warm_decay


class MeanTeacher(Method):
    """Consistency between a student and the moving average of its weights."""

    # Of the consistency loss (mean over classes and pixels) after its ramp-up. The paper's 100 is
    # for its own loss scale and schedule; 5 was chosen on mosaic-32.
    weight: float = 5.0
    decay: float = 0.99  # of the EMA; at first 1 - 1/(step + 1), where that is smaller (eq. 3)
    ramp: float = 0.2  # share of the training over which the weight rises; 0 for none
    buffers: Literal["copy", "ema", "keep"] = "keep"  # what the EMA does with BN statistics
    teacher_mode: Literal["eval", "train"] = "train"  # normalises by running statistics, or batch's
    # Noise on each network's own view, photometric changes of the student's, or none of either.
    views: Literal["noise", "colour", "same"] = "colour"

    presets = {
        "paper": {},
        "noise": {"views": "noise"},
        "code": {"weight": 100.0, "ramp": 0.0, "views": "same"},
    }

    def setup(self, build):
        self.student = build()
        self.teacher = frozen_copy(self.student)
        self.batch_statistics = ("teacher",) if self.teacher_mode == "train" else ()
        self.strong_views = {"noise": 2, "colour": 1, "same": 0}[self.views]
        self.family = "noise" if self.views == "noise" else "colour"

    def step(self, batch, clock, minimize):
        # Both strong views if there are two, else the weak one for the teacher, or for both.
        teacher_view, student_view = (batch.weak, batch.weak, *batch.strong)[-2:]
        with torch.no_grad():
            target = self.teacher(teacher_view).softmax(1)
        logits, logits_u = joint(self.student, batch.image, student_view)
        sup = self.criterion(logits, batch.label)
        cons = mse(logits_u, target, valid=batch.valid)  # eq. 1
        if minimize(sup + self.weight * ramp_up(clock, self.ramp) * cons, self.student):
            decay = warm_decay(self.decay, clock.step)
            ema(self.teacher, self.student, decay, self.buffers)  # eq. 3
        return {"sup": sup.detach(), "cons": cons.detach()}
