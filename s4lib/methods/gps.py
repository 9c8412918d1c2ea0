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

import torch
from torch import nn

from .. import distributed
from ..config import one_of
from ..losses import ce, soft_ce
from ..method import Method
from ..mixing import cutmix_xor
from ..schedules import gaussian, gps_printed


class GPS(Method):
    """Guided, cross and feedback pseudo supervision.

    Args:
        alpha, beta, gamma: their weights: for VOC; Cityscapes has 1, 5, 1 (Table 1).
        teacher_share: share of the epochs, rounded, in which the teacher learns alone; 0 for none.
        ramp: of gamma: "k5" or "k1", exp(-k (1 - e/E)^2), or "literal", exp(-1 - e/E)^2.
        latch: whether the ramp ends, at 1, once the students fit the labels as the teacher does.
        feedback: "hard" pseudo-labels for the teacher or "soft" probabilities.
        cutmix: mix the unlabeled images and their labels, as CPS with CutMix.
        deploy: "students.0", "students.1", "teacher", or "ensemble", the mean of both students.
    """

    presets = {
        "paper": {},
        "literal": {"ramp": "literal", "feedback": "soft"},
        "cutmix": {"cutmix": True},
    }

    def __init__(
        self,
        build,
        *,
        alpha: float = 0.5,
        beta: float = 1.5,
        gamma: float = 0.5,
        teacher_share: float = 0.15,
        ramp: str = "k5",
        latch: bool = True,
        feedback: str = "hard",
        cutmix: bool = False,
        deploy: str = "students.0",
    ):
        super().__init__()
        if not 0 <= teacher_share < 1:
            raise ValueError(f"teacher_share={teacher_share}: choose 0 or more, and less than 1")
        self.students, self.teacher = nn.ModuleList([build(), build()]), build()
        self.alpha, self.beta, self.gamma = alpha, beta, gamma
        self.share, self.latch, self.cutmix = teacher_share, latch, cutmix
        self.ramp = one_of("ramp", ramp, "k5", "k1", "literal")
        self.hard = one_of("feedback", feedback, "hard", "soft") == "hard"
        self.deployed = one_of("deploy", deploy, *self.networks(), "ensemble")
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
        target, loss = (probs.argmax(1), ce) if self.hard else (probs, soft_ce)
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
        return min(max(1, round(self.share * clock.epochs)), clock.epochs - 1) if self.share else 0

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
