"""PseudoSeg (Zou et al., ICLR 2021): labels from a decoder and from class activations, calibrated.

One network labels weak views for their strong views. A classifier of whole images knows by its
activation maps (Grad-CAM) where a class is, roughly; attention between places with like features
spreads them to whole objects. Both sources' scores are brought to one scale, averaged, sharpened.

From the description and the TensorFlow code, googleinterns/wss@b01acaf0, which cannot be run any
more: no output was compared. Deviations: colours as the run has them; activation maps come from the
pass that labels, in training mode; attention compares the last feature and the one before it that
our decoder reads; padding takes no part, nor void in labeled images. Classes of a dataset without
background (Cityscapes, CamVid, mosaic) need `background=False`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Count, Share
from ..guided import shrink
from ..losses import IGNORE, ce, mean_over, soft_ce
from ..method import Method
from ..mixing import paint


class PseudoSeg(Method):
    """Consistency with calibrated labels of two sources."""

    weight: float = 1.0  # of the unlabeled loss
    temperature: float = 0.5  # that sharpens labels: probabilities to the power of 1 / T
    attention_weight: float = 1.0  # of the cross-entropy of refined activation maps with labels
    image_weight: float = 1.0  # of the loss of the classifier of whole images
    width: Count = 128  # of attention's keys and queries
    cutout: Share = 0.2  # sides of the box that is erased in strong views: 100 of 513 pixels
    background: bool = True  # class 0 is the background: what is no other class

    strong_views = 1

    def setup(self, build):
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature}: choose a number above 0")
        self.student = build()
        image = torch.zeros(1, 3, 64, 64)
        with torch.no_grad():
            classes = self.student.eval()(image).shape[1]
            channels = [x.shape[1] for x in self.student.encode(image)[-2:]]
        self.refiner = Refiner(channels, classes, self.width, self.background)

    def networks(self):  # the refiner is no network of its own
        return {"student": self.student}

    def step(self, batch, clock, minimize):
        net, refiner, size = self.student, self.refiner, batch.image.shape[-2:]
        # Labeled: segmentation, classifier of images, attention
        annotated, features = batch.label != IGNORE, net.encode(batch.image)
        sup = self.criterion(net.classify(net.fuse(features), size), batch.label)
        there = present(batch.label, refiner.classes)[:, refiner.first :].float()
        found = refiner.image_logits(features, annotated)
        each = F.binary_cross_entropy_with_logits(found, there, reduction="none")
        image = mean_over(each, annotated.flatten(1).any(1, keepdim=True).expand_as(each))
        attention = ce(resize(refiner(features, annotated, there), size), batch.label)
        # Unlabeled: pseudo-labels of weak views, consistency of strong ones
        with torch.no_grad():
            features = net.encode(batch.weak)
            fused = net.fuse(features)
            places = fused.shape[-2:]
            logits = net.classify(fused, places)
            there = (refiner.image_logits(features, batch.valid) >= 0).float()  # sigmoid >= 0.5
            logits_a = resize(refiner(features, batch.valid, there), places)
            valid = shrink(batch.valid, places)[:, 0]
            probs = calibrated(logits, logits_a, self.temperature, valid)
        erased = cutout_box(batch.weak, self.cutout)
        strong = torch.where(erased[:, None], 0, batch.strong[0])
        logits_s = net.classify(net.fuse(net.encode(strong)), places)
        unsup = soft_ce(logits_s, probs, keep=shrink(batch.valid & ~erased, places)[:, 0])
        total = sup + self.attention_weight * attention + self.image_weight * image
        minimize(total + self.weight * unsup, net, refiner)
        losses = {"sup": sup, "unsup": unsup, "attention": attention, "image": image}
        return {name: value.detach() for name, value in losses.items()}


class Refiner(nn.Module):
    """A classifier of images, and attention that refines its activation maps to logits.

    Args:
        channels: of the features that attention compares, the last of which is classified.
        classes, width, background: as in `PseudoSeg`.
    """

    def __init__(self, channels: list[int], classes: int, width: int, background: bool = True):
        super().__init__()
        self.classes, self.first = classes, int(background)
        self.classifier = nn.Conv2d(channels[-1], classes - self.first, 1)
        self.key = nn.Conv2d(sum(channels), width, 1, bias=False)
        self.query = nn.Conv2d(sum(channels), width, 1, bias=False)
        scale = nn.Conv2d(classes, classes, 1, bias=False)
        self.scale = nn.Sequential(scale, nn.BatchNorm2d(classes))

    def image_logits(self, features: tuple[Tensor, ...], valid: Tensor) -> Tensor:
        """(B, classes less background) of the last feature's mean over `valid` (B, H, W) places."""
        keep = shrink(valid, features[-1].shape[-2:])
        mean = torch.where(keep, features[-1], 0).sum((2, 3), keepdim=True)
        return self.classifier(mean / keep.sum((2, 3), keepdim=True).clamp(min=1))[..., 0, 0]

    def forward(self, features: tuple[Tensor, ...], valid: Tensor, there: Tensor) -> Tensor:
        """Logits (B, classes, h, w) at the last feature's size; its gradient ends in this module.

        `there` (B, classes less background) is 1 for a class that is in the image, else 0.
        """
        deep = features[-1].detach()
        keep = shrink(valid, deep.shape[-2:])
        maps = activation_maps(deep, self.classifier.weight.detach()[..., 0, 0], there, keep)
        seen = [resize(x.detach(), deep.shape[-2:]) for x in features[-2:]]
        seen = torch.cat(seen, 1)
        score = attend(self.query(seen), self.key(seen), maps, keep)
        if self.first:
            score = torch.cat([2 - score.amax(1, keepdim=True), score], 1)
        return self.scale(score)


def activation_maps(x: Tensor, weight: Tensor, there: Tensor, keep: Tensor) -> Tensor:
    """Grad-CAM (B, N, h, w) of N classes that a linear classifier finds in the mean of `x`.

    There the gradient of a score is weight / (h w) at each place, so that the map is
    relu(sum_k weight[c, k] x[:, k]) but for a factor which division by the largest value cancels.

    Args:
        x: (B, C, h, w).
        weight: (N, C).
        there: (B, N), 0 for classes whose map is to be zero.
        keep: (B, 1, h, w) bool, where maps may be above zero.
    """
    maps = torch.einsum("bkhw,ck->bchw", x.float(), weight.float()).clamp(min=0)
    maps = torch.where(keep, maps * there[..., None, None], 0)
    largest = maps.amax((2, 3), keepdim=True)
    return torch.where(largest > 0, maps / largest.clamp(min=1e-5), 0)


def attend(query: Tensor, key: Tensor, score: Tensor, keep: Tensor) -> Tensor:
    """`score` plus its mean over places, weighted by softmax(query . key / sqrt(width)).

    query, key (B, width, h, w), score (B, N, h, w), keep (B, 1, h, w) bool: other places are looked
    at by none, and their result is 0.
    """
    q, k, value = (x.float().flatten(2) for x in (query, key, score))
    alike = torch.einsum("bdi,bdj->bij", q, k) / q.shape[1] ** 0.5
    alike = alike.masked_fill(~keep.flatten(2), -1e9).softmax(2)
    found = torch.einsum("bij,bcj->bci", alike, value) + value
    return torch.where(keep, found.view_as(score), 0)


@torch.no_grad()
def calibrated(
    decoder: Tensor, attention: Tensor, temperature: float = 0.5, valid: Tensor | None = None
) -> Tensor:
    """Probabilities (B, K, h, w) of two sources' logits (B, K, h, w), brought to one scale.

    Both are divided by the root of their common mean square over this process's batch, averaged as
    probabilities, taken to the power of 1 / temperature, and normalised (section 3.1). Of the mean
    square only `valid` (B, h, w) pixels are part; None is all.
    """
    both = torch.stack([decoder.float(), attention.float()])
    valid = torch.ones_like(both[0, :, 0], dtype=torch.bool) if valid is None else valid
    square = torch.where(valid[:, None], both.square(), 0).sum()
    count = valid.sum().clamp(min=1) * both.shape[2] * 2
    probs = (both * (square / count + 1e-8).rsqrt()).softmax(2).mean(0)
    sharp = probs ** (1 / temperature)
    return sharp / sharp.sum(1, keepdim=True)


def present(label: Tensor, classes: int) -> Tensor:
    """(B, classes) bool: which are in a label (B, H, W)."""
    found = torch.zeros(len(label), 256, dtype=torch.bool, device=label.device)
    return found.scatter_(1, label.flatten(1), True)[:, :classes]


def cutout_box(like: Tensor, share: float) -> Tensor:
    """(B, H, W) bool: boxes with a share of each side, about any pixel, cut off at the border."""
    h, w = like.shape[-2:]
    u = torch.rand(len(like), 2).to(like.device, non_blocking=True)
    height, width = round(share * h), round(share * w)
    top, left = (u[:, 0] * h).floor() - height // 2, (u[:, 1] * w).floor() - width // 2
    return paint(top, left, torch.full_like(top, height), torch.full_like(left, width), like)


def resize(x: Tensor, size: torch.Size) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=True)
