"""Dual Teacher (Na et al., NeurIPS 2023): two temporary teachers that take turns.

A single EMA teacher soon agrees with its student ("coupling"). Of two, only the active one labels
and is averaged, and each turn has its own strong augmentation. Implicit consistency: a sub-model of
the student, some residual blocks skipped, must agree with the active teacher on weak views.

`paper`, or `slides`, is what the authors' slides state; `code` is dual-teacher@868e6e79, bugs and
all, but for CutMix images (jittered before, not after mixing, and not flipped), 8-bit confidence,
the teachers' dropout and random first decoders, and pseudo-labels on padding. Our epochs pass over
the unlabeled list. `dual_student` is in the slides a drawing without words: our reading of it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from ..config import Share, one_of
from ..losses import IGNORE, pseudo_label, weighted_ce
from ..method import Method, ema, frozen_copy, joint, trainable
from ..mixing import classmix, cutmix_beta
from ..perturb import stochastic_depth
from ..schedules import warm_decay


class DualTeacher(Method):
    """Teachers that take turns at labelling for one student."""

    # In "dual_student" the only teacher is no average: it is trained just as the student is, which
    # labels for it in return.
    scheme: Literal["dual_teacher", "single_teacher", "dual_student"] = "dual_teacher"
    period: int = 1  # epochs of a turn
    # What the strong views of one turn after the other are mixed by.
    mixes: tuple[Literal["cutmix", "classmix"], ...] = ("cutmix", "classmix")
    weight: float = 1.0  # of the unsupervised loss (lambda_u)
    # How sure pixels weigh in it, see `weighted_ce`; "image" goes by confidence before mixing, and
    # "code" is "image" with CutMix, "batch" with ClassMix.
    unsup_weight: Literal["none", "pixel", "image", "batch", "code"] = "none"
    threshold: float = 0.95  # confidence from which a pixel is sure, where that matters
    decay: Share = 0.99  # of a teacher's EMA; at first 1 - 1/(k + 1), k its updates so far
    ema_reset: bool = False  # k counts the turn's updates, so that each restarts at the student
    buffers: Literal["copy", "ema", "keep"] = "copy"  # what the EMA does with BN statistics
    teacher_mode: Literal["eval", "train"] = "eval"  # normalises by running statistics, or batch's
    cons_weight: float = 0.2  # of implicit consistency
    cons_input: Literal["weak", "jitter"] = "weak"  # of its sub-model; jitter: strong, unmixed
    # How sure pixels weigh in it; "labeled" is "pixel" less what is void in the *labeled* images.
    cons_mask: Literal["none", "pixel", "labeled"] = "none"
    drop_path: float = 0.1  # rate at which the sub-model skips blocks, see `stochastic_depth`
    drop_all: bool = False  # in every forward of the student
    # Jitter of strong views; "normalised" comes after normalisation, but not for CutMix.
    jitter_space: Literal["rgb", "normalised"] = "rgb"
    # Fixed: in each epoch the first images of the list, as many as are labeled.
    unlabeled_order: Literal["shuffled", "fixed"] = "shuffled"
    deploy: str = "student"  # which network is the result; also "teachers.0" ...

    presets = {"paper": {}, "slides": {}}
    presets |= {name: {"scheme": name} for name in ("single_teacher", "dual_student")}
    presets["code"] = dict(unsup_weight="code", ema_reset=True, buffers="keep")
    presets["code"] |= dict(teacher_mode="train", cons_input="jitter", cons_mask="labeled")
    presets["code"] |= dict(drop_all=True, jitter_space="normalised", unlabeled_order="fixed")

    def setup(self, build):
        if self.period < 1:
            raise ValueError(f"period={self.period}: choose 1 epoch or more")
        if not self.mixes:
            raise ValueError("mixes=(): choose at least one of cutmix, classmix")
        self.student = net = build()
        with stochastic_depth(net, self.drop_path):
            pass  # refuses an encoder without residual blocks before the first step does
        averages = {"dual_teacher": 2, "single_teacher": 1, "dual_student": 0}[self.scheme]
        self.teachers = nn.ModuleList([frozen_copy(net) for _ in range(averages)] or [build()])
        self.batch_statistics = ("teachers",) if self.teacher_mode == "train" else ()
        after = self.jitter_space == "normalised"
        self.family = ("colour", "normalised") if after else ("colour",)
        self.strong_views = len(self.family)
        self.deployed = one_of("deploy", self.deploy, *self.networks())

    def step(self, batch, clock, minimize):
        length = self.period * clock.steps_per_epoch
        turn, since = divmod(clock.step, length)
        teacher = self.teachers[turn % len(self.teachers)]
        mixed = self.mixes[turn % len(self.mixes)]
        total, losses = self.learn(self.student, teacher, batch, mixed)
        if trainable(teacher):
            total = total + self.learn(teacher, self.student, batch, mixed)[0]
            minimize(total, self.student, self.teachers)
        elif minimize(total, self.student):
            k = since if self.ema_reset else turn // len(self.teachers) * length + since
            ema(teacher, self.student, warm_decay(self.decay, k), self.buffers)
        return {name: loss.detach() for name, loss in losses.items()}

    def learn(self, student, teacher, batch, mixed):
        """(total, parts) of the loss of a student with labels and a teacher's pseudo-labels."""
        with torch.no_grad():
            label, confidence = pseudo_label(teacher(batch.weak))
        label, confidence = torch.where(batch.valid, label, IGNORE), confidence * batch.valid
        cut = mixed == "cutmix"
        mix = cutmix_beta(label) if cut else classmix(label, "random")
        with stochastic_depth(student, self.drop_path * self.drop_all):
            logits, logits_u = joint(student, batch.image, mix(batch.strong[0 if cut else -1]))
        with stochastic_depth(student, self.drop_path):
            logits_c = student(batch.strong[-1] if self.cons_input == "jitter" else batch.weak)
        how = ("image" if cut else "batch") if self.unsup_weight == "code" else self.unsup_weight
        sure = confidence if how == "image" else mix(confidence)
        unsup = weighted_ce(logits_u, mix(label), sure, self.threshold, how)
        if self.cons_mask == "labeled" and batch.label.shape == label.shape:
            label = torch.where(batch.label == IGNORE, IGNORE, label)
        each = "pixel" if self.cons_mask == "labeled" else self.cons_mask
        cons = weighted_ce(logits_c, label, confidence, self.threshold, each)
        losses = {"sup": self.criterion(logits, batch.label), "unsup": unsup, "cons": cons}
        if (how, each) != ("none", "none"):
            losses["kept"] = (confidence >= self.threshold).float().mean()
        return losses["sup"] + self.weight * unsup + self.cons_weight * cons, losses
