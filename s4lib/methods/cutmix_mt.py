"""CutMix-MT (U2PL, Wang et al., CVPR 2022): what newer tables run as Mean Teacher and as CutMix.

An EMA teacher labels the weak view, every pixel, and cross-entropy with those hard labels teaches
the student: neither Tarvainen and Valpola's squared difference nor French et al.'s. With CutMix the
whole batch is mixed, or nothing of it, by a coin; boxes have half of an image's area. The teacher
labels in evaluation mode, with BN statistics that it gathers by looking, in training mode, at all
that the student sees.

`paper` is the row "CutMix" and `mt`, without mixing, the row "MT" of U2PL's and GTA-Seg's tables.
This is a reconstruction: their code has neither, but U2PL@ab3d2be, train_semi, comes down to it
when nothing is dropped and nothing contrasted. Not copied: on VOC it starts with an epoch of labels
alone (`warmup` of the configuration) and copies the student to the teacher throughout the next.
"""

from __future__ import annotations

import torch

from ..config import Share
from ..losses import IGNORE, ce
from ..method import Method, ema, frozen_copy, joint
from ..mixing import cutmix_half
from ..schedules import warm_decay


class CutMixMT(Method):
    """Hard labels of an EMA teacher, with U2PL's CutMix or without."""

    cutmix: Share = 0.5  # probability of mixing the batch
    weight: float = 1.0  # of the unlabeled loss, from the first step
    decay: Share = 0.99  # of the EMA; at first 1 - 1/(step + 1), where that is smaller

    batch_statistics = ("teacher",)
    presets = {"paper": {}, "mt": {"cutmix": 0.0}}

    def setup(self, build):
        self.student = build()
        self.teacher = frozen_copy(self.student)

    def step(self, batch, clock, minimize):
        mix = cutmix_half(batch.weak, self.cutmix)
        mixed = mix(batch.weak)
        with torch.no_grad():
            label = self.teacher.eval()(batch.weak).argmax(1)
            joint(self.teacher.train(), batch.image, mixed)  # for its BN statistics alone
        label = mix(torch.where(batch.valid, label, IGNORE))
        logits, logits_u = joint(self.student, batch.image, mixed)
        sup, unsup = self.criterion(logits, batch.label), ce(logits_u, label)
        if minimize(sup + self.weight * unsup, self.student):
            ema(self.teacher, self.student, warm_decay(self.decay, clock.step), "keep")
        return {"sup": sup.detach(), "unsup": unsup.detach()}
