"""GTA-Seg (Jin, Wang and Lin, NeurIPS 2022): an assistant between pseudo-labels and student.

Pseudo-labels shape good features but mislead the mask predictor (our `classifier`). So a third
network, the gentle teaching assistant, learns from them; the student takes over its features alone,
by EMA, and learns from true labels; the teacher, the student's EMA, makes the pseudo-labels.

`code` is Jin-Ying/GTA-Seg@534f10f, where pseudo-labels do reach the student's classifier: see
`tie`. Ours in both presets: eq. 7 is a mean, as the paper's learning rate demands; padding is void,
there class 0; all networks start as one, there apart. Eqs. 2 and 6 see one process's batch.
"""

from __future__ import annotations

import copy
import math

import torch

from ..config import one_of
from ..losses import IGNORE, ce, pseudo_label
from ..method import Method, ema, frozen_copy, joint
from ..mixing import cutmix_half
from ..schedules import warm_decay

LEARNS = {"labeled": ["sup"], "pseudo": ["unsup"], "both": ["sup", "unsup"]}
PARTS = {"all": [""], "features": ["encoder", "decoder"], "backbone": ["encoder"]}
TAU = {"none": (0, 1), "confidence": (1, 0), "laplace": (1, 1)}  # eq. 6: a * confidence + tau


class GTASeg(Method):
    """Features learn from pseudo-labels and labels, the classifier from labels alone.

    Args:
        assistant_data: pseudo, labeled, both (Table 7); none: the student has both (Table 4).
        student_data: labeled, pseudo or both (eq. 10, Table 7).
        ema_scope: what the student takes from the assistant: features, backbone, all (Table 5).
        tie_classifier: student and assistant have one classifier, as in the code (not eq. 9).
        reweight: laplace (tau = 1), confidence (tau = 0) or none (eq. 6, Tables 4 and 9).
        normaliser: eq. 6 sums over kept or all pixels; inv_kept: kept, over their share.
        confidence: weak_eval: of the labels' own pass (eq. 1); mixed_train: of another, mixed one.
        drop: share of the least confident pixels, which are ignored (eq. 2).
        cutmix: probability of mixing the batch; the paper is silent, its code has 0.5.
        student_decay: from assistant to student (eq. 9, Table 8).
        teacher_decay: from student to teacher (eq. 12, Table 8).
        decay_ramp: both are 1 - 1/(k + 1) where that is smaller, k steps after the warm-up.
        warmup: epochs on labels alone (Table 8).
        hand_over: the others equal the student in each step of the warmup, or of the epoch after.
        joint_bn: networks also see what they do not learn from, for the statistics of their BN.
        assistant_lr: poly or const (eq. 8).
        eval_net: what is deployed: teacher, student or assistant (Table 6).
    """

    presets = {
        "paper": {},
        "code": {
            "tie_classifier": True,
            "normaliser": "all",
            "confidence": "mixed_train",
            "cutmix": 0.5,
            "student_decay": 0.999,
            "teacher_decay": 0.999,
            "decay_ramp": True,
            "hand_over": "epoch",
            "joint_bn": True,
            "assistant_lr": "const",
        },
    }

    def __init__(
        self,
        build,
        *,
        assistant_data: str = "pseudo",
        student_data: str = "labeled",
        ema_scope: str = "features",
        tie_classifier: bool = False,
        reweight: str = "laplace",
        normaliser: str = "kept",
        confidence: str = "weak_eval",
        drop: float = 0.2,
        cutmix: float = 0.0,
        student_decay: float = 0.99,
        teacher_decay: float = 0.99,
        decay_ramp: bool = False,
        warmup: int = 1,
        hand_over: str = "warmup",
        joint_bn: bool = False,
        assistant_lr: str = "poly",
        eval_net: str = "teacher",
    ):
        super().__init__()
        one_of("assistant_data", assistant_data, *LEARNS, "none")
        self.assistant_learns = LEARNS.get(assistant_data)
        self.student_learns = LEARNS[one_of("student_data", student_data, *LEARNS)]
        self.student = build()
        if assistant_data == "none":
            self.student_learns = LEARNS["both"]
        else:
            self.assistant = copy.deepcopy(self.student)
        self.teacher = frozen_copy(self.student)
        self.deployed = one_of("eval_net", eval_net, *self.networks())
        self.parts = PARTS[one_of("ema_scope", ema_scope, *PARTS)]
        self.reweight = one_of("reweight", reweight, *TAU)
        self.normaliser = one_of("normaliser", normaliser, "kept", "all", "inv_kept")
        self.confidence = one_of("confidence", confidence, "weak_eval", "mixed_train")
        # A teacher with passes in train mode has BN statistics of its own, else the student's.
        own = confidence == "mixed_train"
        self.batch_statistics, self.buffers = (("teacher",), "keep") if own else ((), "copy")
        self.hand_over = one_of("hand_over", hand_over, "warmup", "epoch")
        self.assistant_lr = one_of("assistant_lr", assistant_lr, "poly", "const")
        shares = {"drop": drop, "cutmix": cutmix, "student_decay": student_decay}
        for name, value in (shares | {"teacher_decay": teacher_decay}).items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value}: choose a number from 0 to 1")
        if warmup < 0:
            raise ValueError(f"warmup={warmup}: choose 0 or more epochs")
        self.drop, self.cutmix, self.warmup, self.joint_bn = drop, cutmix, warmup, joint_bn
        self.decays, self.decay_ramp = (student_decay, teacher_decay), decay_ramp
        self.tie_classifier = tie_classifier

    def schedule(self, child, clock):
        constant = child == "assistant" and self.assistant_lr == "const"
        return 0.0 if constant else clock.progress

    def step(self, batch, clock, minimize):
        if clock.epoch < self.warmup:
            return self.warm_up(batch, minimize)
        since = clock.phase(self.warmup).step
        k = since if self.decay_ramp else math.inf  # no ramp: as if it were long over
        to_student, to_teacher = (warm_decay(decay, k) for decay in self.decays)
        first = self.hand_over == "epoch" and since < clock.steps_per_epoch
        if first:
            self.copy_student(self.buffers)
        image, label, confidence = self.pseudo_labels(batch)  # step 1 of Algorithm 1: eq. 1
        label, confidence = ignore_unsure(label, confidence, self.drop)  # eq. 2
        weight = pixel_weight(label, confidence, self.reweight, self.normaliser)  # eq. 6
        streams = {
            "sup": (batch.image, lambda logits: self.criterion(logits, batch.label)),  # eq. 10
            "unsup": (image, lambda logits: ce(logits, label, weight=weight)),  # eq. 7
        }
        theirs = {}
        if self.assistant_learns:  # step 2
            theirs = self.losses(self.assistant, self.assistant_learns, streams)
            if minimize(sum(theirs.values()), self.assistant):  # eq. 8
                self.tie(self.assistant, first)
                for part in self.parts:  # eq. 9
                    pair = (net.get_submodule(part) for net in (self.student, self.assistant))
                    ema(*pair, to_student, "keep")  # BN statistics are of own forward passes
        own = self.losses(self.student, self.student_learns, streams)  # step 3; of both: eq. 3
        if minimize(sum(own.values()), self.student):  # eq. 11; of both: eq. 4
            self.tie(self.student, first)
            ema(self.teacher, self.student, to_teacher, self.buffers)  # eq. 12, or 5
        found = theirs | own | {"kept": (label != IGNORE).float().mean()}
        return {name: value.detach() for name, value in found.items()}

    def warm_up(self, batch, minimize):
        """Labels alone. The paper trains all three networks: with one start, they stay equal. In
        the code the student learns and the others only gather BN statistics."""
        sup = self.criterion(self.student(batch.image), batch.label)
        if minimize(sup, self.student) and self.hand_over == "warmup":
            self.copy_student("copy")
        if self.hand_over == "epoch":
            with torch.no_grad():
                for net in self.others():
                    net(batch.image)
        return {"sup": sup.detach()}

    def others(self):
        return [net for name, net in self.named_children() if name != "student"]

    def copy_student(self, buffers):
        for net in self.others():
            ema(net, self.student, 0.0, buffers)

    @torch.no_grad()
    def pseudo_labels(self, batch):
        """(image, label, confidence) of the unlabeled images, perhaps mixed; IGNORE on padding."""
        mix = cutmix_half(batch.weak, self.cutmix)
        image, valid = mix(batch.weak), mix(batch.valid)
        label, confidence = map(mix, pseudo_label(self.teacher.eval()(batch.weak)))
        if self.confidence == "mixed_train":
            _, logits = joint(self.teacher.train(), batch.image, image)
            _, confidence = pseudo_label(logits)
        return image, torch.where(valid, label, IGNORE), torch.where(valid, confidence, 0)

    def losses(self, net, learns, streams):
        """Losses of what `net` learns from, by name; streams: name -> (images, loss of logits)."""
        seen = streams if self.joint_bn else learns
        logits = dict(zip(seen, joint(net, *(streams[s][0] for s in seen)), strict=True))
        return {name: streams[name][1](logits[name]) for name in learns}

    def tie(self, source, first):
        """After an update of `source`: give its values to what is the same tensor in the code.

        There `parameter.data = student.data` hands over tensors, not numbers, in each step of the
        first epoch after the warm-up; an EMA makes new ones, of the student's features and of the
        whole teacher. So in that epoch the assistant's update is everyone's; and as eq. 9 leaves
        the classifiers out, student and assistant share theirs to the end: two optimizers, each
        with a momentum of its own, take turns on it.
        """
        if self.tie_classifier and self.assistant_learns:
            part = "" if first and source is self.assistant else "classifier"
            for net in (self.student, self.assistant, *[self.teacher] * first):
                ema(net.get_submodule(part), source.get_submodule(part), 0.0, "keep")


def ignore_unsure(label, confidence, drop):
    """Eq. 2: (label, confidence) with IGNORE and 0 at the `drop` share of least confident pixels.

    All (B, H, W). The threshold is their quantile, linearly interpolated, over pixels that are not
    IGNORE yet; what equals it goes too.
    """
    valid = label != IGNORE
    threshold = torch.where(valid, confidence, math.nan).nanquantile(drop)
    unsure = valid & (confidence <= threshold)
    return torch.where(unsure, IGNORE, label), torch.where(unsure, 0, confidence)


def pixel_weight(label, confidence, reweight="laplace", normaliser="kept"):
    """Eq. 6: (B, H, W) weights for a mean over the pixels that are not IGNORE; theirs is 1.

    With normaliser "all" the ignored ones add confidence + tau to the sum, which weakens the loss
    (the code); "inv_kept" strengthens it (the code without re-weighting).
    """
    a, tau = TAU[reweight]
    raw, keep = a * confidence + tau, label != IGNORE
    total = (raw if normaliser == "all" else raw * keep).sum().clamp(min=1e-6)
    return raw / total * (keep.numel() if normaliser == "inv_kept" else keep.sum())
