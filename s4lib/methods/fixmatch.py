"""FixMatch (Sohn et al., NeurIPS 2020), per pixel, as UniMatch's paper has it for a baseline.

One network labels the weak view of an unlabeled image and must say the same of its strong view:
cross-entropy with the argmax, where it was at least 0.95 sure. There is no second network and no
average; what holds the labels still is that the weak view gives no gradient.

The loss is divided by all pixels, not by the sure ones (eq. 4), so it grows as they do: the only
ramp-up there is. `code` is UniMatch@0324f3dd, fixmatch.py: CutMix between strong views, pasted
labels from evaluation mode, a pass of its own for strong views, half of the total loss. Not copied:
it pastes another view of the *same* image, here it is the next one of the batch.
"""

from __future__ import annotations

import torch

from ..config import Share
from ..losses import IGNORE, ce, pseudo_label
from ..method import Method, joint
from ..mixing import cutmix_small


class FixMatch(Method):
    """Strong views learn what the same network says, surely, of weak ones."""

    threshold: float = 0.95  # confidence from which a pixel is kept
    weight: float = 1.0  # of the unlabeled loss, from the first step
    cutmix: Share = 0.0  # probability that a strong view is mixed; the released code has 0.5
    released: bool = False  # its passes, and its half of the total loss

    strong_views = 1
    presets = {"paper": {}, "code": {"cutmix": 0.5, "released": True}}

    def setup(self, build):
        self.student = build()

    def step(self, batch, clock, minimize):
        mix = cutmix_small(batch.weak, self.cutmix)
        strong, valid = mix(batch.strong[0]), mix(batch.valid)
        if self.released:
            with torch.no_grad():
                pasted = pseudo_label(self.student.eval()(batch.weak))
            self.student.train()
            logits, logits_w = joint(self.student, batch.image, batch.weak)
            plain, logits_s = pseudo_label(logits_w), self.student(strong)
        else:
            logits, logits_w, logits_s = joint(self.student, batch.image, batch.weak, strong)
            plain = pasted = pseudo_label(logits_w)
        pairs = zip(plain, pasted, strict=True)
        label, confidence = (torch.where(mix.mask, mix(theirs), own) for own, theirs in pairs)
        keep = valid & (confidence >= self.threshold)
        sup = self.criterion(logits, batch.label)
        unsup = ce(logits_s, torch.where(valid, label, IGNORE), keep=keep, over="valid")  # eq. 4
        loss = sup + self.weight * unsup
        minimize(loss / 2 if self.released else loss, self.student)
        return {"sup": sup.detach(), "unsup": unsup.detach(), "kept": keep.float().mean()}
