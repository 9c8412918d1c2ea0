"""Pseudo-Label (Lee, ICML workshop 2013), per pixel.

The network labels the unlabeled images with its own argmax, again at every step, and trains on
those labels as if they were true; their weight ramps up. The paper keeps every label; `threshold`
keeps only the confident ones, as nearly all later work does. Deviations: Lee's ramp is linear
between two epochs, ours is `schedules.ramp_up`, which all our methods share, and his weight 3 was
tuned for digit classification, ours is 1.
"""

from __future__ import annotations

from ..losses import ce, pseudo_label
from ..method import Method, joint
from ..schedules import ramp_up


class PseudoLabel(Method):
    """Pseudo-labels of the network itself, optionally above a confidence threshold."""

    threshold: float = 0.0  # confidence from which a pixel is kept; 0 keeps all, as the paper
    weight: float = 1.0  # of the unlabeled loss after its ramp-up
    ramp: float = 0.2  # share of the training over which the weight rises

    presets = {"paper": {}, "confident": {"threshold": 0.9}}

    def setup(self, build):
        self.student = build()

    def step(self, batch, clock, minimize):
        logits, logits_u = joint(self.student, batch.image, batch.weak)
        label, confidence = pseudo_label(logits_u)  # of the same forward pass: Lee, eq. 14
        keep = batch.valid & (confidence >= self.threshold)
        sup = self.criterion(logits, batch.label)
        unsup = ce(logits_u, label, keep=keep, over="all")  # Lee, eq. 15
        minimize(sup + self.weight * ramp_up(clock, self.ramp) * unsup, self.student)
        return {"sup": sup.detach(), "unsup": unsup.detach(), "kept": keep.float().mean()}
