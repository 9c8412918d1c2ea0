"""Entropy minimisation (Grandvalet and Bengio, NeurIPS 2004), per pixel.

The decision boundary should lie where data are few, so the network is asked to be sure about
unlabeled images: the entropy of its softmax is one more loss. It is Pseudo-Label with soft labels
that move along. Nothing says which class to be sure of, so the weight must stay small while little
is known, or the classes seen most win everywhere.

The paper tunes the weight between 0 and 1 by cross-validation; ours is 1, reached over the first
fifth of the training, as in `pseudo_label`. `advent` is the direct minimisation that segmentation
quotes (Vu et al., CVPR 2019): entropy as a share of its maximum ln K, weight 0.001, from the start.
"""

from __future__ import annotations

import math

from ..losses import soft_ce
from ..method import Method, joint
from ..schedules import ramp_up


class EntropyMin(Method):
    """Entropy of the predictions on unlabeled images as a loss."""

    weight: float = 1.0  # of the entropy after its ramp-up
    ramp: float = 0.2  # share of the training over which the weight rises; 0 for none
    relative: bool = False  # entropy as a share of ln K, or in nats

    presets = {"paper": {}, "advent": {"weight": 1e-3, "ramp": 0.0, "relative": True}}

    def setup(self, build):
        self.student = build()

    def step(self, batch, clock, minimize):
        logits, logits_u = joint(self.student, batch.image, batch.weak)
        sup = self.criterion(logits, batch.label)
        entropy = soft_ce(logits_u, logits_u.float().softmax(1), keep=batch.valid)
        unsup = entropy / math.log(logits_u.shape[1]) if self.relative else entropy
        minimize(sup + self.weight * ramp_up(clock, self.ramp) * unsup, self.student)
        return {"sup": sup.detach(), "unsup": unsup.detach()}
