"""PS-MT: perturbed and strict mean teachers (Liu et al., CVPR 2022).

Two EMA teachers label the weak view; the mean of their logits is deployed. The student sees strong,
CutMixed views, its fused map moved to where the *teachers'* classifiers change their mind (T-VAT).
Confident pixels count, each by its confidence. `code` is yyliu01/PS-MT@058cdc3: random teachers
with a warm-up, T-VAT that is noise far shorter than eps, padding that counts.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from ..losses import IGNORE, ce, pseudo_label
from ..method import Method, ema, frozen_copy, trainable
from ..mixing import cutmix_beta
from ..perturb import adversarial
from ..schedules import cosine, gaussian


class PSMT(Method):
    """Two teachers, adversarial features, confidence-weighted cross-entropy."""

    threshold: float = 0.6  # confidence from which a pixel counts
    weight: float = 1.5  # of the unlabeled loss, after its ramp-up
    ramp: Literal["gaussian", "cosine"] = "gaussian"  # how that weight rises after the warm-up
    ramp_epochs: float = 12.0  # for how long; of 80 and more: a short run needs less
    decay: float = 0.996  # of the EMA, from its beginning
    buffers: Literal["copy", "ema", "keep"] = "ema"  # what the EMA does with BN statistics
    alternate: Literal["step", "epoch"] = "step"  # when the other teacher is updated in its turn
    assist_topk: int | None = None  # classes that count of the teacher not in turn; None: all
    teacher_init: Literal["student", "random"] = "student"  # copies till warm-up ends, or see above
    teacher_mode: Literal["eval", "train"] = "eval"  # normalises by running statistics, or batch's
    warmup_epochs: int = 0  # of supervised training, at a constant learning rate
    perturbation: Literal["none", "vat", "tvat"] = "tvat"  # misleads the student, or the teachers
    perturb_labeled: bool = False  # labeled images too
    noise: Literal["gaussian", "uniform"] = "gaussian"  # where the search for it begins
    xi: float = 0.1  # length at which predictions are compared (eq. 1)
    eps: float = 2.0  # length of the perturbation (eq. 2)
    iters: int = 1  # gradients; 0 for noise
    norm: Literal["sample", "pixel"] = "sample"  # length of an image's map, or at each place
    floor: float = 0.0  # added to lengths that are divided by
    cutmix: bool = True  # of unlabeled images
    padding: bool = False  # padded pixels count too

    strong_views, labeled_strong, deployed = 1, True, "ensemble"
    presets = {"paper": {}, "code": dict(ramp="cosine", alternate="epoch", xi=1e-6, floor=1e-8)}
    presets["code"] |= dict(teacher_init="random", teacher_mode="train", assist_topk=7)
    presets["code"] |= dict(warmup_epochs=1, perturb_labeled=True, noise="uniform", padding=True)

    def setup(self, build):
        least = 1 if self.teacher_init == "random" else 0
        if self.warmup_epochs < least:
            raise ValueError(f"warmup_epochs={self.warmup_epochs}: choose {least} or more")
        self.student, bare = build(), dict(weights=None, pretrained=False)
        nets = (build(**bare) if least else frozen_copy(self.student) for _ in range(2))
        self.teachers = nn.ModuleList(nets)
        self.batch_statistics = ("teachers",) if self.teacher_mode == "train" else ()

    def step(self, batch, clock, minimize):
        if clock.epoch < self.warmup_epochs:
            return self.warm_up(batch, minimize)
        clock = clock.phase(self.warmup_epochs)
        self.teachers.train(bool(self.batch_statistics))
        turn = (clock.step if self.alternate == "step" else clock.epoch) % 2
        with torch.no_grad():
            core, assist = (self.teachers[i](batch.weak) for i in (turn, 1 - turn))
        mix = cutmix_beta(batch.weak) if self.cutmix else lambda x: x
        label, confidence = pseudo_label(mix(ensemble(core, assist, self.assist_topk)))
        valid, annotated = mix(batch.valid) | self.padding, (batch.label != IGNORE) | self.padding
        logits = self.moved(batch.image_strong, annotated if self.perturb_labeled else None)
        logits_u = self.moved(mix(batch.strong[0]), valid)
        sup = self.criterion(logits, batch.label)
        keep = valid & (confidence >= self.threshold)
        unsup = ce(logits_u, label, keep=keep, weight=confidence)  # Conf-CE
        x = clock.step / max(1.0, self.ramp_epochs * clock.steps_per_epoch)
        weight = self.weight * (gaussian(x) if self.ramp == "gaussian" else cosine(x))
        if minimize(sup + weight * unsup, self.student):
            ema(self.teachers[turn], self.student, self.decay, self.buffers)
        return {"sup": sup.detach(), "unsup": unsup.detach(), "kept": keep.float().mean()}

    def moved(self, image, valid):
        """The student's logits, of a fused map that is moved to mislead on the `valid` pixels."""
        size, fused = image.shape[-2:], self.student.fuse(self.student.encode(image))
        if valid is not None and self.perturbation != "none":
            nets = self.teachers if self.perturbation == "tvat" else [self.student]
            search = dict(noise=self.noise, xi=self.xi, iters=self.iters, floor=self.floor)
            search |= dict(eps=self.eps, norm=self.norm)
            fused = fused + adversarial(fused, nets, size, valid, **search)
        return self.student.classify(fused, size)

    def warm_up(self, batch, minimize):
        sup = self.criterion(self.student(batch.image_strong), batch.label)
        if trainable(self.teachers):
            sup_t = sum(self.criterion(net(batch.image), batch.label) for net in self.teachers)
            minimize(sup + sup_t, self.student, self.teachers)
        elif minimize(sup, self.student):
            for net in self.teachers:
                ema(net, self.student, 0.0)
        return {"sup": sup.detach()}

    def forward(self, image):
        return ensemble(self.teachers[0](image), self.teachers[1](image))

    def schedule(self, child, clock):
        return clock.phase(self.warmup_epochs).progress * (clock.epoch >= self.warmup_epochs)

    def restarts(self, child, clock):  # what the teachers' optimizer keeps is not needed any more
        return child == "teachers" and clock.phase(self.warmup_epochs).step == 0


def ensemble(core, assist, topk=None):
    """Mean of two teachers' logits; beyond its `topk` classes `assist` takes over `core`'s."""
    if topk is not None:
        top = assist.topk(min(topk, assist.shape[1]), 1).indices
        assist = torch.where(torch.zeros_like(assist).scatter(1, top, 1) > 0, assist, core)
    return (core + assist) / 2
