"""n-CPS (Filipiak et al., arXiv 2021): CPS with n networks, and votes among them.

Every network learns from the hard labels of all n - 1 others; the cross loss is divided by n - 1,
so that each network's share of it does not grow with n. What is deployed may be one network or an
ensemble of all, which the paper's best rows are: those compare with ensembles only.

`paper` is three networks with CutMix and CPS's weight, one of them deployed; `code` is
n-cps@9fb856c, where padding counts and boxes show another crop of the same image, as in CPS's;
`soft_voting` deploys the ensemble. `threshold` and
`normalised` are options of the code, off in its settings, and the first is forbidden with CutMix
there. Its hard voting takes a map of (B, H, W, K) for (B, K, H, W) and gives no vote; here it is
one. It averages gradients twice: "lr 0.02, weight decay 1e-4 on 8 GPUs" is 0.0025 and 8e-4 of a
true mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ..losses import IGNORE, pseudo_label
from ..method import Method
from ..mixing import cutmix_xor
from .cps import cross, predictions


class NCPS(Method):
    """Cross pseudo supervision among n networks."""

    n: int = 3  # networks, 2 or more
    weight: float = 1.5  # of the cross loss, from the first step
    normalised: bool = False  # that weight times 2 / n
    threshold: float = 0.0  # confidence above which a pixel teaches; at 0 all do
    cutmix: bool = True  # mix unlabeled images; without, labeled images take part in the cross loss
    padding: bool = False  # padding, and void where labeled images take part, counts too
    partner: Literal["next", "same"] = "next"  # what a box shows, as in `CPS`
    # What is deployed: the first network, or all by `ensemble`.
    deploy: Literal[
        "single", "max_confidence", "max_confidence_softmax", "soft_voting", "hard_voting"
    ] = "single"

    presets = {
        "paper": {},
        "code": {"padding": True, "partner": "same"},
        "soft_voting": {"deploy": "soft_voting"},
    }

    def setup(self, build):
        if self.n < 2:
            raise ValueError(f"n={self.n}: choose 2 or more")
        self.students = nn.ModuleList([build() for _ in range(self.n)])
        self.second_crop = self.cutmix and self.partner == "same"
        self.deployed = "students.0" if self.deploy == "single" else self.deploy

    def step(self, batch, clock, minimize):
        mix = cutmix_xor(batch.weak) if self.cutmix else None
        logits, taught, teaching, keep = predictions(self.students, batch, mix)
        labels = [sure_label(x, self.threshold) for x in teaching]
        cps = cross(taught, labels, None if self.padding else keep)
        sup = sum(self.criterion(x, batch.label) for x in logits)
        weight = self.weight * (2 / self.n if self.normalised else 1)
        minimize(sup + weight * cps, self.students)
        return {"sup": sup.detach(), "cps": cps.detach()}

    def forward(self, image):
        if self.deploy == "single":
            return super().forward(image)
        scores = ensemble([net(image) for net in self.students], self.deploy)
        if self.deploy == "max_confidence":
            return scores
        return scores.clamp(min=1e-30).log()  # so that a softmax gives shares of the scores


def sure_label(logits: Tensor, threshold: float) -> Tensor:
    """(B, H, W) argmax of logits (B, K, H, W), IGNORE unless its confidence exceeds `threshold`."""
    label, confidence = pseudo_label(logits)
    return torch.where(confidence > threshold, label, IGNORE)


def ensemble(logits: Sequence[Tensor], how: str) -> Tensor:
    """Scores (B, K, H, W), the largest of which is the prediction, of n networks' logits.

    Args:
        logits: n of them, each (B, K, H, W).
        how: "single", the first's logits; "max_confidence", the largest logit of each class;
            "max_confidence_softmax", the largest probability; "soft_voting", the sum of
            probabilities; "hard_voting", how many networks predict the class (a tie goes to the
            class of lower index). n-cps@9fb856c, network.py forward_eval.

    Raises:
        ValueError: unknown `how`.
    """
    stacked = torch.stack(list(logits)).float()
    probs = stacked.softmax(2)
    votes = torch.zeros_like(stacked).scatter_(2, stacked.argmax(2, keepdim=True), 1)
    scores = {
        "single": stacked[0],
        "max_confidence": stacked.amax(0),
        "max_confidence_softmax": probs.amax(0),
        "soft_voting": probs.sum(0),
        "hard_voting": votes.sum(0),
    }
    if how not in scores:
        raise ValueError(f"how={how!r}: choose {' or '.join(scores)}")
    return scores[how]
