"""UniMatch (Yang et al., CVPR 2023): one weak view guides two strong views and dropped features.

The network labels the weak view of an unlabeled image and learns these labels, where it is sure, in
three streams: two strong views, each with its own colours and CutMix boxes, and the weak view again
with half of the channels of its features gone. There is no teacher; the weak view's features are
computed once, and labeled and weak images share a pass.

`code` is UniMatch@0324f3dd. Its boxes show the *same* image, in another crop that the network has
labelled in evaluation mode: both of its loaders walk one list in one order. Its BN also sees the
labeled images' dropped features. On Cityscapes it has threshold 0, so that every pixel counts.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from ..config import Count, Share
from ..losses import IGNORE, pseudo_label, weighted_ce
from ..method import Method, joint
from ..mixing import cutmix_small, paste


class UniMatch(Method):
    """FixMatch per pixel, with two image streams and one of features."""

    threshold: float = 0.95  # confidence from which a pixel counts
    views: Count = 2  # strong views (dual-stream perturbation)
    image_weight: float = 0.5  # of the strong views' mean loss (mu)
    feature_weight: float = 0.5  # of the loss with dropped features (lambda)
    dropout: Share = 0.5  # probability that a feature's channel is dropped
    # What a box shows: the next image of the batch, or another crop of the same one.
    partner: Literal["next", "same"] = "next"
    drop_labeled: bool = False  # labeled images are decoded with dropped features too, for BN alone

    presets = {"paper": {}, "code": {"partner": "same", "drop_labeled": True}}

    def setup(self, build):
        if self.views < 1:
            raise ValueError(f"views={self.views}: choose 1 or more")
        self.student, self.strong_views = build(), self.views
        self.second_crop = self.partner == "same"

    def step(self, batch, clock, minimize):
        net, b, u, size = self.student, len(batch.image), len(batch.weak), batch.weak.shape[-2:]
        mixes = [cutmix_small(batch.weak) for _ in batch.strong]
        if self.partner == "same":
            mixes = [mix.same() for mix in mixes]
            shown = *self.labelled(batch.second), batch.second.strong
        features = net.encode(torch.cat([batch.image, batch.weak]))
        dropped = (F.dropout2d(f[0 if self.drop_labeled else b :], self.dropout) for f in features)
        fused = net.fuse(tuple(map(torch.cat, zip(features, dropped, strict=True))))
        logits = net.classify(fused, size)  # labeled, weak, (labeled,) weak with dropped features
        label, confidence = pseudo_label(logits[b : b + u])
        label = torch.where(batch.valid, label, IGNORE)
        if self.partner == "next":
            shown = label, confidence, batch.strong
        streams = [(logits[-u:], label, confidence)]
        logits_s = joint(net, *map(paste, mixes, shown[2], batch.strong))
        for mix, stream in zip(mixes, logits_s, strict=True):
            targets = map(paste, (mix, mix), shown[:2], (label, confidence))
            streams.append((stream, *targets))
        feature, *image = (weighted_ce(*stream, self.threshold, "pixel") for stream in streams)
        unsup, sup = sum(image) / self.views, self.criterion(logits[:b], batch.label)
        minimize((sup + self.image_weight * unsup + self.feature_weight * feature) / 2, net)
        kept = (batch.valid & (confidence >= self.threshold)).float().mean()
        found = {"sup": sup, "unsup": unsup, "feature": feature, "kept": kept}
        return {name: value.detach() for name, value in found.items()}

    @torch.no_grad()
    def labelled(self, crop):
        """(label, confidence) of a crop, from an evaluation pass."""
        label, confidence = pseudo_label(self.student.eval()(crop.weak))
        self.student.train()
        return torch.where(crop.valid, label, IGNORE), confidence
