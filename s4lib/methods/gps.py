"""GPS (Cho et al., WACV 2024): a teacher and two students teach each other by back-propagation.

First the teacher learns alone, from labels. Then each step has two updates: *guiding*, the students
learn from the teacher's pseudo-labels (guided pseudo supervision) and from each other's (cross);
*feedback*, the teacher learns from the mean prediction of the students just updated. No EMA.

No code was released: this is Algorithm 1 of the supplementary (numbers in comments are its lines)
with CPS's losses and BN. `paper` replaces the weight of line 4, a "ramp-up" that falls as printed,
by the Gaussian, and the probabilities of line 31 by labels, as Fig. 1 has them. Lines 5-14 have no
length: here a share of the epochs, to suit short trainings; 5 of CPS's 34 on VOC 1/8.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from .. import distributed
from ..losses import ce, soft_ce
from ..method import Method
from ..mixing import cutmix_xor
from ..schedules import gaussian, gps_printed


class GPS(Method):
    """Guided, cross and feedback pseudo supervision."""

    alpha: float = 0.5  # weight of guided pseudo supervision; 1 on Cityscapes (Table 1)
    beta: float = 1.5  # of cross pseudo supervision; 5 on Cityscapes
    gamma: float = 0.5  # of feedback pseudo supervision; 1 on Cityscapes
    # Share of the epochs, rounded, in which the teacher learns alone (lines 5-14); 0 for none.
    teacher_share: float = 0.15
    # Of gamma (line 4): exp(-k (1 - e/E)^2), or exp(-1 - e/E)^2, as printed.
    ramp: Literal["k5", "k1", "literal"] = "k5"
    latch: bool = True  # the ramp ends, at 1, once the students fit the labels as the teacher does
    feedback: Literal["hard", "soft"] = "hard"  # the teacher learns from labels or probabilities
    cutmix: bool = False  # mix the unlabeled images and their labels, as CPS with CutMix
    # Which network is the result; the ensemble is the mean of both students.
    deploy: Literal["students.0", "students.1", "teacher", "ensemble"] = "students.0"

    presets = {
        "paper": {},
        "literal": {"ramp": "literal", "feedback": "soft"},
        "cutmix": {"cutmix": True},
    }

    def setup(self, build):
        if not 0 <= self.teacher_share < 1:
            raise ValueError(f"teacher_share={self.teacher_share}: choose at least 0, less than 1")
        self.students, self.teacher = nn.ModuleList([build(), build()]), build()
        self.deployed = self.deploy
        self.register_buffer("sums", torch.zeros(2))  # of an epoch's L_s and L_t
        self.register_buffer("caught_up", torch.tensor(False))

    def step(self, batch, clock, minimize):
        if clock.epoch < self.alone(clock):  # 5-14: Establishing a Teacher Network
            sup = self.criterion(self.teacher(batch.image), batch.label)  # 9, 11
            minimize(sup, self.teacher)  # 12
            return {"sup": sup.detach()}
        mix = cutmix_xor(batch.weak) if self.cutmix else lambda x: x
        mixed, valid = mix(batch.weak), mix(batch.valid)
        # 18-27: Guiding Step, Students Update
        logits = [net(mixed) for net in self.students]  # 20
        with torch.no_grad():
            label_t = mix(self.teacher(batch.weak).argmax(1))  # 20, 21
            plain = [net(batch.weak) for net in self.students] if self.cutmix else logits
            one, two = (mix(x.argmax(1)) for x in plain)  # 21
        sup_s = sum(self.criterion(net(batch.image), batch.label) for net in self.students)  # 23
        gps = sum(ce(x, label_t, keep=valid) for x in logits)  # 24
        cps = ce(logits[0], two, keep=valid) + ce(logits[1], one, keep=valid)  # 25
        minimize(sup_s + self.alpha * gps + self.beta * cps, self.students)  # 26, 27
        # 28-36: Feedback Step, Teacher Update
        sup = self.criterion(self.teacher(batch.image), batch.label)  # 29, 33
        with torch.no_grad():
            probs = mix(self.mean_probs(batch.weak))  # 30, 31
        target, loss = (probs.argmax(1), ce) if self.feedback == "hard" else (probs, soft_ce)
        fps = loss(self.teacher(mixed), target, keep=valid)  # 34
        x = (clock.epoch - self.alone(clock)) / (clock.epochs - self.alone(clock))  # e / epoch
        w = gps_printed(x) if self.ramp == "literal" else gaussian(x, 5 if self.ramp == "k5" else 1)
        weight = torch.where(self.caught_up, 1.0, w)  # 4, 39
        updated = minimize(sup + weight * self.gamma * fps, self.teacher)  # 35, 36
        self.sums += distributed.mean(torch.stack([sup_s, sup]).detach())
        if updated and (clock.step + 1) % clock.steps_per_epoch == 0:
            self.caught_up |= (0.5 * self.sums[0] <= self.sums[1]) & self.latch  # 38
            self.sums.zero_()
        losses = {"sup": sup, "sup_students": sup_s, "gps": gps, "cps": cps, "fps": fps}
        return {name: value.detach() for name, value in losses.items()} | {"weight": weight}

    def alone(self, clock):
        epochs = max(1, round(self.teacher_share * clock.epochs))
        return min(epochs, clock.epochs - 1) if self.teacher_share else 0

    def schedule(self, child, clock):
        return clock.phase(self.alone(clock)).progress

    def restarts(self, child, clock):
        return clock.phase(self.alone(clock)).step == 0

    def mean_probs(self, image):
        return sum(net(image).float().softmax(1) for net in self.students) / 2

    def forward(self, image):
        if self.deployed == "ensemble":
            return self.mean_probs(image).clamp(min=1e-30).log()
        return super().forward(image)
