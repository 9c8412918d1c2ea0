"""CCT (Ouali, Hudelot and Tami, CVPR 2020): cross-consistency of classifiers of perturbed features.

The main classifier reads the fused map as it is and is trained with labels alone. Auxiliary ones
read it perturbed, each in its own way, and must agree with the main one on unlabeled images. That
trains them and, through them, encoder and decoder: class boundaries lie in low-density regions of
features rather than of images.

`code` is yassouali/CCT@65d4e5b, whose I-VAT is noise far shorter than eps (see `adversarial`);
`torchsemiseg` is TorchSemiSeg@5e0c29c: no I-VAT, two classifiers of the other kinds, annealed CE.
Deviations: classifiers are copies of the network's own with new weights, where CCT has a 1 x 1
convolution and pixel shuffles; padding takes no part. `background` is class 0 in VOC; Cityscapes,
CamVid and mosaic have none, so give None there, which leaves the three guided kinds out.
"""

from __future__ import annotations

import copy
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from ..config import Count, Share
from ..guided import (
    context_mask,
    feature_drop,
    feature_noise,
    foreground,
    guided_cutout,
    object_boxes,
    object_mask,
    outlines,
    shrink,
)
from ..losses import abce, js, kl, mse
from ..method import Method
from ..perturb import adversarial
from ..schedules import logarithmic, ramp_up

KINDS = "vat", "dropout", "cutout", "context", "objects", "drop", "noise"
GUIDED = KINDS[2:5]


class CCT(Method):
    """Auxiliary classifiers of perturbed features agree with the main one."""

    weight: float = 30.0  # of the consistency loss after its ramp-up (eq. 1)
    ramp: float = 0.1  # share of the training over which the weight rises (8 of 80 epochs)
    cons: Literal["mse", "kl", "js"] = "mse"  # distance between softmax maps (eq. 2)
    threshold: float = 0.0  # confidence above which a pixel counts, but with js; 0 for all
    vat: Count = 2  # number of classifiers that see I-VAT: what misleads them most
    dropout: Count = 6  # that see spatial dropout
    cutout: Count = 6  # G-Cutout: no box in each object
    context: Count = 2  # Con-Msk: objects alone
    objects: Count = 2  # Obj-Msk: all but objects
    drop: Count = 6  # F-Drop: not the most active places
    noise: Count = 6  # F-Noise: multiplied by noise
    rate: Share = 0.5  # of channels lost in spatial dropout
    background: int | None = 0  # class that is no object; None leaves out what objects guide
    xi: float = 0.1  # length at which I-VAT compares predictions
    eps: float = 2.0  # length of I-VAT
    floor: float = 0.0  # added to lengths that I-VAT divides by
    sup: Literal["ce", "abce"] = "ce"  # the run's supervised loss, or annealed and bootstrapped
    end: float = 0.99  # threshold of abce after 40 % of the training; 0.9 in CCT's own code

    presets = {"paper": {}, "code": {"xi": 1e-6, "floor": 1e-8}}
    presets["torchsemiseg"] = dict(vat=0, ramp=0.0, sup="abce") | dict.fromkeys(KINDS[1:], 2)

    def setup(self, build):
        kinds = [k for k in KINDS if self.background is not None or k not in GUIDED]
        self.kinds = tuple(kind for kind in kinds for _ in range(getattr(self, kind)))
        if not self.kinds:
            raise ValueError(f"no auxiliary classifier: choose 1 or more of {', '.join(kinds)}")
        self.student = build()
        self.auxiliary = nn.ModuleList(Auxiliary(self.student) for _ in self.kinds)

    def networks(self):  # auxiliary classifiers are no networks of their own
        return {"student": self.student}

    def step(self, batch, clock, minimize):
        sup = self.supervised(self.student(batch.image), batch.label, clock)
        fused, size = self.student.fuse(self.student.encode(batch.weak)), batch.weak.shape[-2:]
        with torch.no_grad():
            logits = self.student.classify(fused, size)
            probs = logits.float().softmax(1)
        sure = batch.valid & (probs.amax(1) > self.threshold)
        pairs = zip(self.auxiliary, self.perturbed(fused, logits, batch.valid), strict=True)
        each = [self.distance(net.classify(x, size), probs, batch.valid, sure) for net, x in pairs]
        cons = sum(each) / len(each)
        total = sup + self.weight * ramp_up(clock, self.ramp) * cons
        minimize(total, self.student, self.auxiliary)
        return {"sup": sup.detach(), "cons": cons.detach(), "kept": sure.float().mean()}

    def perturbed(self, fused, logits, valid):
        """The fused map as each auxiliary classifier sees it, in their order."""
        size, places = valid.shape[-2:], shrink(valid, fused.shape[-2:])
        thing = foreground(logits, self.background) & valid
        found = outlines(thing) if "cutout" in self.kinds else None
        search = dict(noise="uniform", xi=self.xi, eps=self.eps, floor=self.floor)
        see = {
            "vat": lambda net: fused + adversarial(fused, [net], size, valid, **search),
            "dropout": lambda _: F.dropout2d(fused, self.rate),
            "cutout": lambda _: guided_cutout(fused, object_boxes(found, size)),
            "context": lambda _: context_mask(fused, thing),
            "objects": lambda _: object_mask(fused, thing),
            "drop": lambda _: feature_drop(fused, places),
            "noise": lambda _: feature_noise(fused),
        }
        for kind, net in zip(self.kinds, self.auxiliary, strict=True):
            yield see[kind](net)

    def distance(self, logits, probs, valid, sure):
        if self.cons == "mse":
            return mse(logits, probs, valid=sure)
        if self.cons == "js":
            return js(logits, probs, valid=valid)
        # With a confidence mask CCT's code forgets to divide by the number of classes.
        classes = "sum" if self.threshold else "mean"
        return kl(logits, probs, keep=sure, valid=valid, classes=classes)

    def supervised(self, logits, label, clock):
        if self.sup == "ce":
            return self.criterion(logits, label)
        return abce(logits, label, annealed(clock, logits.shape[1], self.end))


class Auxiliary(nn.Module):
    """A classifier like that of a SegNet, with new initial weights."""

    def __init__(self, net):
        super().__init__()
        self.classifier = copy.deepcopy(net.classifier)
        for part in self.classifier.modules():
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()
        self.align_corners = getattr(net, "align_corners", False)

    def classify(self, fused, size):
        """Logits (B, K, *size) of a fused map."""
        logits = self.classifier(fused)
        return F.interpolate(logits, size, mode="bilinear", align_corners=self.align_corners)


def annealed(clock, classes: int, end: float = 0.99, share: float = 0.4) -> float:
    """The threshold of `abce`: from 1 / classes to `end` over the first `share` of the training."""
    start = 1 / classes
    return start + (end - start) * logarithmic(clock.step / (share * clock.steps))
