"""UniMatch V2 (Yang et al., TPAMI 2025): strong views whose features lose complementary channels.

An EMA teacher labels the weak view. The student learns its sure labels from two strong views, each
with its own colours and CutMix boxes; of their features, one view has the channels that the other
lacks, but for half of the images, which keep theirs. This one stream replaces the three of UniMatch
and its pass over weak views.

The paper's network is DINOv2 with DPT: see the recipe `unimatch_v2`, as in the protocol
`voc-classic-92-unimatch_v2`. With a pyramid, features with different numbers of channels have coins
of their own. `code` is UniMatch-V2@f6afb4d: a box shows the batch in reverse order, so that the
middle one of an odd number shows itself. Its locked encoder (ADE20K alone) is not here.
"""

from __future__ import annotations

from typing import Literal

import torch

from ..config import Share
from ..losses import IGNORE, pseudo_label, weighted_ce
from ..method import Method, ema, frozen_copy
from ..mixing import Mix, cutmix_small
from ..perturb import complementary_dropout
from ..schedules import warm_decay


class UniMatchV2(Method):
    """Teacher's labels, two strong views, complementary dropout."""

    threshold: float = 0.95  # confidence from which a pixel counts
    weight: float = 1.0  # of the unlabeled loss, a mean over the two views
    dropout: Literal["complementary", "none"] = "complementary"  # of the two views' channels
    kept: Share = 0.5  # share of images whose channels all stay
    decay: Share = 0.996  # of the EMA; at first 1 - 1/(step + 1), where that is smaller
    buffers: Literal["copy", "ema", "keep"] = "ema"  # what the EMA does with BN statistics
    partner: Literal["next", "reversed"] = "next"  # the image of the batch that a box shows

    strong_views, deployed = 2, "teacher"
    presets = {"paper": {}, "code": {"partner": "reversed"}}

    def setup(self, build):
        self.student = build()
        self.teacher = frozen_copy(self.student)

    def step(self, batch, clock, minimize):
        with torch.no_grad():
            label, confidence = pseudo_label(self.teacher(batch.weak))
        label = torch.where(batch.valid, label, IGNORE)
        mixes = [cutmix_small(batch.weak) for _ in batch.strong]
        if self.partner == "reversed":
            mixes = [Mix(mix.mask, mix.partner.sort(descending=True).values) for mix in mixes]
        views = torch.cat([mix(view) for mix, view in zip(mixes, batch.strong, strict=True)])
        net, features = self.student, self.student.encode(views)
        if self.dropout == "complementary":
            features = complementary_dropout(features, self.kept)
        logits_u = net.classify(net.fuse(features), views.shape[-2:]).chunk(2)
        sup = self.criterion(net(batch.image), batch.label)
        unsup = sum(
            weighted_ce(logits, mix(label), mix(confidence), self.threshold, "pixel")
            for logits, mix in zip(logits_u, mixes, strict=True)
        )
        unsup = unsup / len(mixes)
        if minimize((sup + self.weight * unsup) / 2, net):
            ema(self.teacher, net, warm_decay(self.decay, clock.step), self.buffers)
        kept = (batch.valid & (confidence >= self.threshold)).float().mean()
        return {"sup": sup.detach(), "unsup": unsup.detach(), "kept": kept}
