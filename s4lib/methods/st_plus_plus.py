"""ST++ (Yang et al., CVPR 2022): self-training in stages, on the more stable images first.

A teacher learns from the labels, labels whole unlabeled images, and a student that begins anew
learns from both, seeing what was pseudo-labeled under strong augmentation and Cutout: that is ST,
preset `st`. An image on whose labels the teacher's earlier checkpoints and its last one agree is
likely to be labeled well. So in ST++ a first student learns from the half that agrees most, labels
the other half in place of the teacher, and a second student, again anew, learns from all.

`code` labels with the weights that were best in evaluation, as ST-PlusPlus@f4e7a571 does. Ours: a
step shows as many labeled as unlabeled images, where theirs mixes both at random in that ratio;
the teacher trains as long as supervised-only does here, theirs for as many passes over the labels;
every stage begins with the same weights; colours and learning rate are the run's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from .. import distributed
from ..config import Share
from ..evaluate import Evaluation, predict
from ..losses import IGNORE, ce
from ..method import Method, joint
from ..metrics import confusion, miou
from ..mixing import cutmix_small
from ..run_folder import write_atomically
from .supervised import Supervised


class STPlusPlus(Method):
    """Self-training in stages, reliable images first."""

    selective: bool = True  # two students, the first for the reliable images; or one for all (ST)
    reliable: Share = 0.5  # share of the unlabeled images that the first student learns from
    checkpoints: int = 3  # of the teacher that are compared, at equal distances, the last included
    label_by: Literal["last", "best"] = "last"  # weights that label: at the end, or best in mIoU
    scales: tuple[float, ...] = (0.5, 0.75, 1.0, 1.5, 2.0)  # whose softmax maps are averaged
    flip: bool = True  # mirrored images are averaged too
    view: Literal["strong", "weak"] = "strong"  # of what was pseudo-labeled
    cutout: Share = 0.5  # probability that a box of it is noise without a label

    strong_views = 1
    offline_labels = True
    stands_on = (Supervised,)  # the teacher: a record's fingerprint covers what is named here
    presets = {"paper": {}, "code": {"label_by": "best"}, "st": {"selective": False}}

    def setup(self, build):
        self.student = build()
        self.stages = 3 if self.selective else 2
        if self.checkpoints < 2:
            raise ValueError(f"checkpoints={self.checkpoints}: choose 2 or more")

    def step(self, batch, clock, minimize):
        view = batch.strong[0] if self.view == "strong" else batch.weak
        label = torch.where(batch.valid, batch.weak_label, IGNORE)
        view, label = cutout(view, label, self.student.mean, self.student.std, self.cutout)
        logits, logits_u = joint(self.student, batch.image, view)
        both = self.criterion(torch.cat([logits, logits_u]), torch.cat([batch.label, label]))
        minimize(both, self.student)
        with torch.no_grad():
            return {"sup": ce(logits, batch.label), "unsup": ce(logits_u, label)}

    def recipe(self, run, fit):
        """Train the teacher and the first student; leave a pseudo-label of every unlabeled image.

        Raises:
            ValueError: too few epochs or unlabeled images to tell reliable ones.
        """
        config, unlabeled, early = run.config, run.split.unlabeled, ()
        if self.selective:
            early = {config.epochs * k // self.checkpoints for k in range(1, self.checkpoints)}
            early = tuple(sorted(early - {0}))
            if not early or int(len(unlabeled) * self.reliable) < 1:
                few = f"epochs={config.epochs}, reliable={self.reliable} of {len(unlabeled)} images"
                raise ValueError(f"{few}: st_plus_plus needs 2 epochs and 1 reliable image or more")
        plain = replace(config, method="supervised", preset="paper", method_args={})
        teacher = fit("teacher", replace(plain, snapshots=early))
        if not self.selective:
            return self.label(run, teacher, unlabeled)
        scores = self.scores(run, teacher, [*early, "last"])
        parts = ranked(scores, self.reliable)
        reliable, rest = ([unlabeled[place] for place in part] for part in parts)
        self.label(run, teacher, reliable)
        labels = replace(run.labels, indices=tuple(sorted(reliable)))
        student = fit("student", replace(config, snapshots=()), labels)
        self.label(run, student, rest)

    @torch.no_grad()
    def scores(self, run, load, checkpoints) -> list[float]:
        """`reliability` of every unlabeled image, kept in reliability.json by image id."""
        path, images = run.folder.path / "reliability.json", run.images
        indices = run.split.unlabeled
        if distributed.any_process(not path.is_file(), run.device):
            nets = [load(checkpoint) for checkpoint in checkpoints]
            found = torch.zeros(len(indices), dtype=torch.float64, device=run.device)
            for place in range(len(indices))[distributed.rank() :: distributed.world()]:
                image = run.normalise(images[indices[place]][0][None])
                labels = [predict(net, image, Evaluation())[0].argmax(0) for net in nets]
                found[place] = reliability(labels, len(images.classes))
            found = distributed.total(found).tolist()
            kept = {images.ids[i]: score for i, score in zip(indices, found, strict=True)}
            if run.main:
                write_atomically(path, lambda file: file.write(json.dumps(kept).encode()))
            distributed.barrier()
        kept = json.loads(path.read_text())
        return [kept[images.ids[i]] for i in indices]

    @torch.no_grad()
    def label(self, run, load, indices) -> None:
        """Pseudo-label these images, one by one, so that none depends on what was done before."""
        mine = indices[distributed.rank() :: distributed.world()]
        missing = [index for index in mine if not run.labels.path(index).is_file()]
        net = load(self.label_by) if missing else None
        how = Evaluation(average="probs", scales=self.scales, flip=self.flip)
        for index in missing:
            image = run.normalise(run.images[index][0][None])
            run.labels.write(index, predict(net, image, how)[0].argmax(0))
        distributed.barrier()


def cutout(
    image: Tensor,
    label: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    p: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) normalised by `mean` and `std`, and labels (B, H, W), in part hidden.

    With probability `p` a box of `cutmix_small` shows uniform noise and is labeled IGNORE
    (ST-PlusPlus@f4e7a571, dataset/transform.py cutout).
    """
    box = cutmix_small(image, p).mask
    noise = torch.rand(image.shape).to(image.device, non_blocking=True).unbind(1)
    noise = torch.stack([(x - m) / s for x, m, s in zip(noise, mean, std, strict=True)], 1)
    return torch.where(box[:, None], noise, image), torch.where(box, IGNORE, label)


def reliability(labels: Sequence[Tensor], classes: int) -> float:
    """Mean mIoU, in [0, 1], of an image's earlier label maps (H, W) with the last of them.

    Classes that neither map shows are left out (ST-PlusPlus@f4e7a571, main.py select_reliable).

    Raises:
        ValueError: fewer than two maps.
    """
    if len(labels) < 2:
        raise ValueError(f"{len(labels)} label maps: stability shows in two or more")
    *earlier, last = labels
    return sum(miou(confusion(label, last, classes)) / 100 for label in earlier) / len(earlier)


def ranked(scores: Sequence[float], share: float = 0.5) -> tuple[list[int], list[int]]:
    """Places of the `share` (rounded down) with the highest scores, and of the rest, best first.

    Of equal scores the first counts as higher.
    """
    order = sorted(range(len(scores)), key=lambda place: -scores[place])
    count = int(len(scores) * share)
    return order[:count], order[count:]
