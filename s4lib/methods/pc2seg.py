"""PC2Seg (Zhong et al., ICCV 2021): labels agree between views, embeddings differ between pixels.

One network sees an unlabeled image weakly and strongly changed. Its softmax should be the same in
both; and a second head's embedding of a pixel should be that of the same pixel in the other view,
and unlike those of pixels elsewhere. A pixel drawn at random may be of the same class, a false
negative: so negatives come from other images and have another pseudo-label.

A reconstruction: there is no code, and of the paper we have the public description alone. From it
are the squared difference between views, the contrast of pixels, and both rules for negatives.
Ours are: the weak view as target without gradient, in both losses; the sum over classes; the head,
that of U2PL; and every number. `uniform` draws negatives anywhere, the control for both rules.
"""

from __future__ import annotations

import torch

from ..contrast import pixel_nce, shrink
from ..losses import IGNORE, mse
from ..method import Method


class PC2Seg(Method):
    """Consistency of labels and contrast of pixels between a weak and a strong view."""

    weight: float = 1.0  # of the consistency loss
    contrast: float = 0.1  # of the contrastive loss
    temperature: float = 0.1  # of the contrastive loss
    anchors: int = 1024  # pixels drawn per step and process
    negative: int = 128  # drawn for each of them
    same_image: bool = False  # negatives may come from the anchor's own image
    debias: bool = True  # negatives have another pseudo-label

    strong_views = 1
    presets = {"paper": {}, "uniform": {"same_image": True, "debias": False}}

    def setup(self, build):
        self.student = build(representation=True)

    def step(self, batch, clock, minimize):
        net, b, u, size = self.student, len(batch.image), len(batch.weak), batch.image.shape[-2:]
        fused = net.fuse(net.encode(torch.cat([batch.image, batch.weak, *batch.strong])))
        logits, logits_w, logits_s = net.classify(fused, size).split([b, u, u])
        _, rep_w, rep_s = net.representation(fused).split([b, u, u])
        sup = self.criterion(logits, batch.label)
        target = logits_w.detach().float().softmax(1)
        cons = mse(logits_s, target, valid=batch.valid, classes="sum")
        label = torch.where(batch.valid, target.argmax(1), IGNORE)
        label = shrink(label, rep_s.shape[-2:])
        draw = torch.rand(self.anchors, 1 + self.negative, device=label.device)
        rules = self.temperature, self.same_image, self.debias
        drawn = logits.shape[1], draw[:, 0], draw[:, 1:]
        contra = pixel_nce(rep_s, rep_w, label, *drawn, *rules)
        minimize(sup + self.weight * cons + self.contrast * contra, net)
        return {"sup": sup.detach(), "cons": cons.detach(), "contra": contra.detach()}
