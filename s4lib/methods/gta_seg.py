"""GTA-Seg (Jin, Wang and Lin, NeurIPS 2022): an assistant between pseudo-labels and student.

The teacher's pseudo-labels shape features but mislead the `classifier`: so an assistant learns from
them, and the student takes over its features alone. `code` is Jin-Ying/GTA-Seg@534f10f (see `tie`).
Ours: eq. 7 is a mean, padding void (there class 0), all start as one, eqs. 2 and 6 per process.
"""

from __future__ import annotations

from typing import Literal

import torch

from ..config import Count, Share
from ..losses import IGNORE, ce, confidence_weight, ignore_unsure, pseudo_label
from ..method import Method, ema, frozen_copy, joint
from ..mixing import cutmix_half
from ..schedules import warm_decay

PARTS = {"all": [""], "features": ["encoder", "decoder"], "backbone": ["encoder"]}


class GTASeg(Method):
    """Features learn from pseudo-labels and labels, the classifier from labels alone."""

    assistant_data: Literal["pseudo", "labeled", "both", "none"] = "pseudo"  # Tables 7, 4 (none)
    student_data: Literal["labeled", "pseudo", "both"] = "labeled"  # eq. 10; both for Table 4
    ema_scope: Literal["features", "backbone", "all"] = "features"  # of eq. 9, Table 5
    tie_classifier: bool = False  # student and assistant have one classifier, as in the code
    reweight: Literal["laplace", "confidence", "none"] = "laplace"  # eq. 6, Tables 4 and 9
    normaliser: Literal["kept", "all", "inv_kept"] = "kept"  # pixels eq. 6 sums over
    confidence: Literal["weak_eval", "mixed_train"] = "weak_eval"  # of eq. 1, or of a second pass
    drop: Share = 0.2  # share of the least confident pixels, which are ignored (eq. 2)
    cutmix: Share = 0.0  # probability of mixing the batch; the paper is silent, its code has 0.5
    student_decay: Share = 0.99  # from assistant to student (eq. 9, Table 8)
    teacher_decay: Share = 0.99  # from student to teacher (eq. 12, Table 8)
    decay_ramp: bool = False  # both are 1 - 1/(k + 1) where smaller, k steps after the warm-up
    warmup: Count = 1  # epochs on labels alone (Table 8)
    released_passes: bool = False  # the code's: an epoch of hand-over, joint batches for BN
    assistant_lr: Literal["poly", "const"] = "poly"  # of eq. 8

    deployed = "teacher"  # Table 6 compares all networks, and so does every record
    _code = {"tie_classifier": True, "normaliser": "all", "confidence": "mixed_train"}
    _code |= {"cutmix": 0.5, "student_decay": 0.999, "teacher_decay": 0.999, "decay_ramp": True}
    _code |= {"released_passes": True, "assistant_lr": "const"}
    presets = {"paper": {}, "code": _code}

    def setup(self, build):
        self.student = build()
        if self.assistant_data != "none":
            self.assistant = frozen_copy(self.student).requires_grad_(True)
        self.teacher = frozen_copy(self.student)
        self.others = [net for net in self.children() if net is not self.student]
        own = self.confidence == "mixed_train"  # passes in train mode, so BN statistics of its own
        self.batch_statistics, self.buffers = (("teacher",), "keep") if own else ((), "copy")

    def schedule(self, child, clock):
        return clock.progress * (child != "assistant" or self.assistant_lr == "poly")

    def step(self, batch, clock, minimize):
        if clock.epoch < self.warmup:
            return self.warm_up(batch, minimize)
        k = clock.phase(self.warmup).step if self.decay_ramp else float("inf")
        first = self.released_passes and clock.epoch == self.warmup
        for net in self.others * first:
            ema(net, self.student, 0.0, self.buffers)
        image, label, confidence = self.pseudo_labels(batch)  # eq. 1
        label, confidence = ignore_unsure(label, confidence, self.drop)  # eq. 2
        weight = confidence_weight(label, confidence, self.reweight, self.normaliser)  # eq. 6
        streams = {
            "sup": (batch.image, lambda logits: self.criterion(logits, batch.label)),  # eq. 10
            "unsup": (image, lambda logits: ce(logits, label, weight=weight)),  # eq. 7
        }
        theirs = {}
        if self.assistant_data != "none":
            theirs = self.losses(self.assistant, self.assistant_data, streams)
            if minimize(sum(theirs.values()), self.assistant):  # eq. 8
                self.tie(self.assistant, first)
                for part in PARTS[self.ema_scope]:  # eq. 9
                    pair = (net.get_submodule(part) for net in (self.student, self.assistant))
                    ema(*pair, warm_decay(self.student_decay, k), "keep")
        own = self.losses(self.student, self.student_data, streams)
        if minimize(sum(own.values()), self.student):  # eq. 11
            self.tie(self.student, first)
            ema(self.teacher, self.student, warm_decay(self.teacher_decay, k), self.buffers)  # 12
        found = theirs | own | {"kept": (label != IGNORE).float().mean()}
        return {name: value.detach() for name, value in found.items()}

    def warm_up(self, batch, minimize):
        sup = self.criterion(self.student(batch.image), batch.label)
        minimize(sup, self.student)
        with torch.no_grad():
            for net in self.others:  # equal the student or, in the code, just see the images
                net(batch.image) if self.released_passes else ema(net, self.student, 0.0)
        return {"sup": sup.detach()}

    def pseudo_labels(self, batch):
        mix = cutmix_half(batch.weak, self.cutmix)
        image, valid = mix(batch.weak), mix(batch.valid)
        label, confidence = map(mix, pseudo_label(self.teacher.eval()(batch.weak)))
        if self.confidence == "mixed_train":
            confidence = pseudo_label(joint(self.teacher.train(), batch.image, image)[1])[1]
        return image, torch.where(valid, label, IGNORE), torch.where(valid, confidence, 0)

    def losses(self, net, data, streams):
        learns = {"labeled": ["sup"], "pseudo": ["unsup"]}.get(data, ["sup", "unsup"])
        seen = streams if self.released_passes else learns
        logits = dict(zip(seen, joint(net, *(streams[s][0] for s in seen)), strict=True))
        return {s: streams[s][1](logits[s]) for s in learns}

    def tie(self, source, first):
        """Give `source`'s new values to what is one tensor with it in the code.

        There `p.data = q.data` hands over tensors, in the first epoch after the warm-up: all that
        the assistant learns then; and, as eq. 9 leaves it out, its classifier to the end.
        """
        if self.tie_classifier and self.assistant_data != "none":
            part = "" if first and source is self.assistant else "classifier"
            for net in (self.student, self.assistant, *[self.teacher] * first):
                ema(net.get_submodule(part), source.get_submodule(part), 0.0, "keep")
