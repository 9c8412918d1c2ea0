"""CPS (Chen et al., CVPR 2021): two networks, each the other's source of labels.

Two equal networks with different initial weights learn from the labels and, as if it were true,
from the other's argmax: hard, of every pixel, from the first step. They agree where they are right
more than where they err, for their errors come from different beginnings. With CutMix, the paper's
main variant, both label plain images and learn from mixed ones; without, they teach each other on
labeled images too.

`paper` has the paper's weight for VOC; its Cityscapes weight is 6. `no_cutmix` is the variant
without CutMix. `code` is TorchSemiSeg@5e0c29c: a smaller weight with CutMix (5 on Cityscapes),
padding that counts, and boxes that show another crop of the *same* image, because both loaders walk
one list in one order. Not copied: as it averages gradients twice, "lr 0.01, weight decay 1e-4 on
4 GPUs" is 0.0025 and 4e-4 of a true mean, as in our protocols.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ..losses import IGNORE, ce
from ..method import Batch, Method
from ..mixing import Mix, cutmix_xor, paste


class CPS(Method):
    """Cross pseudo supervision between two networks, with CutMix or without."""

    weight: float = 1.5  # of the cross loss, from the first step
    cutmix: bool = True  # mix unlabeled images; without, labeled images take part in the cross loss
    padding: bool = False  # padding, and void where labeled images take part, counts too
    # What a box shows: the next image of the batch, or another crop of the same one.
    partner: Literal["next", "same"] = "next"

    deployed = "students.0"
    presets = {
        "paper": {},
        "code": {"weight": 1.0, "padding": True, "partner": "same"},
        "no_cutmix": {"cutmix": False},
    }

    def setup(self, build):
        self.students = nn.ModuleList([build(), build()])
        self.second_crop = self.cutmix and self.partner == "same"

    def step(self, batch, clock, minimize):
        mix = cutmix_xor(batch.weak) if self.cutmix else None
        logits, taught, teaching, keep = predictions(self.students, batch, mix)
        cps = cross(taught, [x.argmax(1) for x in teaching], None if self.padding else keep)
        sup = sum(self.criterion(x, batch.label) for x in logits)
        minimize(sup + self.weight * cps, self.students)
        return {"sup": sup.detach(), "cps": cps.detach()}


def predictions(
    nets: Sequence[nn.Module], batch: Batch, mix: Mix | None
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """Logits on labeled images, logits that are taught, logits that teach them; pixels that count.

    Each list has one item per network. With `mix` the mixed images are taught by what the networks
    say, in training mode, of the plain ones; without, the labeled and the unlabeled images are.
    Boxes show the batch's second crops where it has them, else the partners.
    """
    logits = [net(batch.image) for net in nets]
    if mix is None:
        taught = [torch.cat([x, net(batch.weak)]) for x, net in zip(logits, nets, strict=True)]
        keep = torch.cat([batch.label != IGNORE, batch.valid])
        return logits, taught, taught, keep
    with torch.no_grad():
        shown = plain = [net(batch.weak) for net in nets]
        if batch.second:
            mix, shown = mix.same(), [net(batch.second.weak) for net in nets]
    source = batch.second or batch
    image, keep = paste(mix, source.weak, batch.weak), paste(mix, source.valid, batch.valid)
    teaching = [paste(mix, *pair) for pair in zip(shown, plain, strict=True)]
    return logits, [net(image) for net in nets], teaching, keep


def cross(logits: Sequence[Tensor], labels: Sequence[Tensor], keep: Tensor | None = None) -> Tensor:
    """Cross-entropy of every network with every other's labels, a 0-d tensor.

    The sum over ordered pairs, divided by n - 1 (TorchSemiSeg@5e0c29c; n-cps@9fb856c
    calc_cps_loss).

    Args:
        logits: of n networks, each (B, K, H, W).
        labels: what each says, (B, H, W) int64; IGNORE teaches nothing.
        keep: (B, H, W) bool, the pixels that count; None counts all.

    Raises:
        ValueError: fewer than two networks.
    """
    n = len(logits)
    if n < 2:
        raise ValueError(f"cross supervision of {n} network: give two or more")
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    return sum(ce(logits[i], labels[j], keep=keep) for i, j in pairs) / (n - 1)
