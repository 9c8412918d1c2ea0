"""U2PL (Wang et al., CVPR 2022): pixels too unsure for a pseudo-label still say what they are not.

The teacher's most entropic pixels, a share that shrinks to nothing, get no pseudo-label. They are
kept instead as negatives of the classes that the teacher thinks unlikely there; a second head's
embeddings of confident pixels are drawn to their class's mean and away from those.

`paper` is the corrected algorithm: label, entropy and rank come from a teacher in evaluation mode.
`code` is Haochen-Wang409/U2PL@ab3d2be, whose contrast differs in three ways (`onehot`, `queue_of`,
`negatives`), and whose weight is 1 over the number of GPUs, four on VOC. Ours: padding is void; all
networks start as one; images are CutMixed at a share `cutmix` of the steps, in `paper` too; with
three classes or fewer `low_rank` is K - 1, where the code's loss would be zero.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from ..config import Count, Share
from ..contrast import entropy, entropy_split, onehot, pixels, prototype_nce, shrink, u2pl_samples
from ..losses import IGNORE, ce, confidence_weight, ignore_unsure
from ..memory import Bank, buffers, channels
from ..method import Method, ema, frozen_copy
from ..mixing import cutmix_half
from ..schedules import warm_decay


class U2PL(Method):
    """Pseudo-labels for reliable pixels, a contrastive loss with unreliable ones as negatives."""

    drop: Share = 0.2  # share of the most entropic pixels without label, at the start (eq. 6)
    weight: float = 1.0  # of the unlabeled loss, divided by the share of pixels it is of (eq. 3)
    contrast: float = 0.1  # weight of the contrastive loss (eq. 1)
    cutmix: Share = 0.5  # probability of mixing the batch
    decay: Share = 0.99  # of the EMA; at first 1 - 1/(k + 1), k steps after the warm-up
    warmup: Count = 1  # epochs on labels alone
    temperature: float = 0.5  # of the contrastive loss (eq. 4)
    anchors: int = 256  # drawn per class
    negative: int = 50  # drawn per anchor
    sure: float = 0.3  # probability of its class from which a pixel is an anchor (eq. 7)
    low_rank: int = 3  # a class is unlikely where its rank is this or more (eq. 13)
    high_rank: int = 20  # ... and less than this
    queue: int = 30_000  # embeddings remembered per class
    queue_first: int = 50_000  # of class 0, the background
    onehot: Literal["image", "merged"] = "image"  # one-hot labels of each image, or all in the 1st
    queue_of: Literal["class", "place"] = "class"  # whose memory a class meets, if one is missing
    # A negative of a class is not labeled as that class; in the code only one that is.
    negatives: Literal["unlike", "alike"] = "unlike"
    # Entropy and rank, where the teacher has labeled; or of a second pass over mixed images in
    # training mode (BN statistics of its own), and the teacher is a copy for a whole epoch.
    reliability: Literal["weak_eval", "mixed_train"] = "weak_eval"

    deployed = "teacher"
    _code = {"contrast": 0.25, "onehot": "merged", "queue_of": "place", "negatives": "alike"}
    presets = {"paper": {}, "code": {**_code, "reliability": "mixed_train"}}

    def setup(self, build):
        self.student = build(representation=True)
        self.teacher = frozen_copy(self.student)
        self.released = self.reliability == "mixed_train"
        self.batch_statistics, self.buffer = (
            (("teacher",), "keep") if self.released else ((), "copy")
        )
        classes = channels(self.student.classifier)
        lengths = [self.queue_first] + [self.queue] * (classes - 1)
        for name, value in buffers(lengths, channels(self.student.representation)).items():
            self.register_buffer(name, value)
        self.ranks = min(self.low_rank, classes - 1), self.high_rank

    def step(self, batch, clock, minimize):
        if clock.epoch < self.warmup:
            return self.warm_up(batch, minimize)
        if self.released and clock.epoch == self.warmup:
            ema(self.teacher, self.student, 0.0, self.buffer)
        size, b, net, teacher = batch.image.shape[-2:], len(batch.image), self.student, self.teacher
        mix = cutmix_half(batch.weak, self.cutmix)
        image = torch.cat([batch.image, mix(batch.weak)])
        with torch.no_grad():
            logits_t = mix(teacher.eval()(batch.weak))
            fused_t = teacher.train(self.released).fuse(teacher.encode(image))
            seen = teacher.classifier(fused_t), teacher.representation(fused_t)
        label = torch.where(mix(batch.valid), logits_t.argmax(1), IGNORE)
        if self.released:
            corners = teacher.align_corners
            logits_t = F.interpolate(seen[0][b:], size, mode="bilinear", align_corners=corners)
        unsure, share = entropy(logits_t), self.drop * (1 - clock.epoch / clock.epochs)  # eq. 6
        reliable, _ = ignore_unsure(label, -unsure, share)  # eq. 5
        fused = net.fuse(net.encode(image))
        logits, logits_u = net.classify(fused, size).split([b, len(image) - b])
        sup = self.criterion(logits, batch.label)
        unsup = ce(
            logits_u, reliable, weight=confidence_weight(reliable, unsure, "none", "inv_kept")
        )
        split = entropy_split(unsure, label != IGNORE, share)
        contra = self.contra(net.representation(fused), *seen, batch.label, label, split=split)
        if minimize(sup + self.weight * unsup + self.contrast * contra, net):  # eq. 1
            decay = warm_decay(self.decay, clock.phase(self.warmup).step)
            ema(teacher, net, decay, self.buffer)
        found = {"sup": sup, "unsup": unsup, "contra": contra}
        found["kept"] = (reliable != IGNORE).float().mean()
        return {name: value.detach() for name, value in found.items()}

    def contra(self, rep, logits_t, rep_t, *labels, split):
        """Remember negatives, then eq. 4; `labels` of labeled and of unlabeled images."""
        classes, size = logits_t.shape[1], rep.shape[-2:]
        known = labels[0] != IGNORE
        low, high = (shrink(torch.cat([known, part]), size) for part in split)
        merged = self.onehot == "merged"
        hot = torch.cat([onehot(shrink(x, size), classes, merged) for x in labels])
        rules = dict(sure=self.sure, ranks=self.ranks, negatives=self.negatives)
        samples = u2pl_samples(hot, logits_t.softmax(1), low, high, len(known), **rules)
        bank = Bank(self.keys, self.seen, self.lengths)
        bank.push(pixels(rep_t), samples.negatives)
        u = torch.rand(classes, self.anchors, 1 + self.negative, device=rep.device)
        drawn = u[..., 0], u[..., 1:], self.temperature, self.queue_of
        return prototype_nce(rep, rep_t, samples, bank, *drawn)

    def warm_up(self, batch, minimize):
        sup = self.criterion(self.student(batch.image), batch.label)
        if minimize(sup, self.student) and not self.released:
            ema(self.teacher, self.student, 0.0)
        if self.released:  # its BN statistics begin with a look at the images
            with torch.no_grad():
                self.teacher.train()(batch.image)
        return {"sup": sup.detach()}
