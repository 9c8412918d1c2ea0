"""What the methods of the self-training chapter make of one batch: maps to draw, and counts.

Probabilities are (B, K, H, W), label maps (B, H, W) int64 with IGNORE = void.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import losses
from ..config import Config
from ..contrast import entropy, entropy_split, onehot, u2pl_samples
from ..data.families import build_views
from ..data.images import Images
from ..methods import METHODS, ael, pseudoseg
from ..methods.st_plus_plus import ranked, reliability
from ..metrics import confusion, miou
from ..trained import Trained


class Stability(NamedTuple):
    """Of some images: how far checkpoints agree on them (ST++)."""

    scores: list[float]  # `reliability`, in [0, 1]
    right: list[float]  # mIoU in % of the last map with the truth

    @property
    def halves(self) -> tuple[list[int], list[int]]:
        """Places of the stable half, and of the other."""
        return ranked(self.scores)

    def __str__(self) -> str:
        from scipy import stats

        stable, rest = (sum(self.right[p] for p in half) / len(half) for half in self.halves)
        return (
            f"Mean mIoU of an image's labels: **{stable:.0f} %** in the stable half, "
            f"**{rest:.0f} %** in the other; Spearman's rank correlation of stability and mIoU: "
            f"{stats.spearmanr(self.scores, self.right).statistic:.2f}."
        )


def stability(nets: Sequence[Trained], images: Images, indices: Sequence[int]) -> Stability:
    """Of annotated images by trained networks, of which the last is the finished one."""
    scores, right, classes = [], [], len(images.classes)
    for image, truth in (images[i] for i in indices):
        maps = [net.probs(image[None])[0].argmax(0) for net in nets]
        scores.append(reliability(maps, classes))
        right.append(miou(confusion(maps[-1], truth, classes)))
    return Stability(scores, right)


@torch.no_grad()
def witnesses(method: pseudoseg.PseudoSeg, image: Tensor) -> dict[str, Tensor]:
    """How PseudoSeg, in evaluation mode, comes to labels of normalised images (B, 3, H, W).

    Returns:
        "spot": (B, h, w) in [0, 1], the activation map of the class that the classifier of images
        is surest of; and probabilities of "decoder", "attention" and "calibrated". On the CPU.
    """
    net, refiner = method.student, method.refiner
    whole = torch.ones_like(image[:, 0], dtype=torch.bool)
    features = net.encode(image)
    fused = net.fuse(features)
    places = fused.shape[-2:]
    decoder, found = net.classify(fused, places), refiner.image_logits(features, whole)
    attended = pseudoseg.resize(refiner(features, whole, (found >= 0).float()), places)
    surest = torch.zeros_like(found).scatter_(1, found.argmax(1, keepdim=True), 1)
    weight, deep = refiner.classifier.weight[..., 0, 0], features[-1]
    spots = pseudoseg.activation_maps(deep, weight, surest, torch.ones_like(deep[:, :1]) > 0)
    both = pseudoseg.calibrated(decoder, attended, method.temperature)
    maps = {"spot": spots.amax(1), "decoder": decoder.softmax(1), "attention": attended.softmax(1)}
    return {name: value.float().cpu() for name, value in (maps | {"calibrated": both}).items()}


def needs(probs: Tensor, truth: Tensor) -> dict[str, dict[str, Tensor]]:
    """AEL's bank after one annotated batch, and what follows from it in both presets, each (K,).

    For `plots.class_shares`. A class that is not in the batch has confidence 0.
    """
    confidence = ael.class_confidence(probs.log(), truth).nan_to_num(0)
    need, kinds = 1 - confidence, METHODS["ael"].presets
    rates = {k: kinds[k].get("beta", METHODS["ael"].beta) for k in kinds}
    return {
        "confidence": {"bank": confidence},
        "chance to be drawn": {"paper": need / need.sum(), "code": need.softmax(0)},
        "pixels that count": {k: ael.sampling_rate(confidence, v) for k, v in rates.items()},
    }


def reliable(probs: Tensor, share: float, negatives: str = "unlike") -> tuple[Tensor, Tensor]:
    """U2PL: labels (B, H, W), IGNORE on the `share` of highest entropy, and (K, B, H, W) bool, the
    pixels that become negatives of each class; `negatives` as in `contrast.u2pl_samples`."""
    label, unsure, classes = probs.argmax(1), entropy(probs.log()), probs.shape[1]
    split = entropy_split(unsure, torch.ones_like(label, dtype=torch.bool), share)
    ranks = min(METHODS["u2pl"].low_rank, classes - 1), METHODS["u2pl"].high_rank
    hot, rules = onehot(label, classes), {"ranks": ranks, "negatives": negatives}
    taken = u2pl_samples(hot, probs, *split, 0, **rules).negatives
    return losses.ignore_unsure(label, -unsure, share)[0], taken.view(classes, *label.shape)


def false_negatives(label: Tensor, truth: Tensor, pairs: int = 200_000) -> dict[str, float]:
    """Share of PC2Seg's negatives that truly are of the anchor's class, by the rule they obey.

    Of random pairs of pixels of which neither is void; NaN if a rule leaves none.
    """
    at = torch.randint(label.numel(), (2, pairs), generator=torch.Generator().manual_seed(0))
    said, true, image = label.flatten()[at], truth.flatten()[at], at // label[0].numel()
    known, same = (true != losses.IGNORE).all(0), true[0] == true[1]
    other, unlike = image[0] != image[1], said[0] != said[1]
    rules = {"anywhere": known, "another image": known & other, "another label": known & unlike}
    rules["both"] = known & other & unlike
    return {name: float(same[rule].float().mean()) for name, rule in rules.items()}


def pool(label: Tensor, truth: Tensor, y: int, x: int) -> dict[str, Tensor]:
    """Where negatives of the pixel (y, x) of image 0 may lie, (B, H, W) int64, by PC2Seg's rules.

    0 not there, 1 another class in truth, 2 the same class, 3 the pixel and its surroundings.
    """
    found = 1 + (truth == truth[0, y, x]).long()
    both = torch.where(label != label[0, y, x], found, 0)
    both[0] = 0
    for each in (found, both):
        each[0, max(0, y - 3) : y + 4, max(0, x - 3) : x + 4] = 3
    return {"anywhere": found, "both rules": both}


def strong(image: Tensor, config: Config, seed: int = 0) -> Tensor:
    """Strong views (B, 3, H, W) in [0, 1] of such images, of the family `config.augment`."""
    views = build_views(config, tuple(image.shape[-2:]), (0.5, 0.5, 0.5))
    return views.strong(image, [np.random.default_rng([seed, i]) for i in range(len(image))])
