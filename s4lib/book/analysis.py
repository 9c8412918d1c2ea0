"""What chapters measure on trained networks: confidence, mistakes that stay, distance to a teacher.

Pure functions of `Predictions` (what a network says about some images, beside the truth), of
networks, or of EMA decays. Shares lie between 0 and 1; pixels whose truth is void do not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from ..data.images import Images
from ..evaluate import _groups
from ..losses import IGNORE
from ..perturb import stochastic_depth
from ..records import Difference, difference
from ..schedules import warm_decay
from ..trained import Trained

Curve = np.ndarray  # (points,)


class Predictions(NamedTuple):
    """What one network says about N images of one size."""

    label: Tensor  # most likely class          (N, H, W) uint8
    confidence: Tensor  # its probability       (N, H, W) float
    truth: Tensor  # annotation, IGNORE = void  (N, H, W) uint8

    @property
    def valid(self) -> Tensor:
        return self.truth != IGNORE

    @property
    def wrong(self) -> Tensor:
        return self.valid & (self.label != self.truth)

    @property
    def accuracy(self) -> float:
        return 1 - float(self.wrong.sum() / self.valid.sum())


def predictions(
    model: Trained, images: Images, indices: Sequence[int], network: str = ""
) -> Predictions:
    """Whole images through a trained network, the deployed one unless another is named.

    Images of several sizes are padded to the largest, with a truth of IGNORE.
    """
    parts = []
    for _, image, truth in _groups(images, indices, range(len(indices))):
        confidence, label = model.probs(image, network).max(1)
        parts.append((label.byte(), confidence, truth))
    height, width = (max(truth.shape[side] for *_, truth in parts) for side in (1, 2))
    pad = lambda x, value: F.pad(x, (0, width - x.shape[2], 0, height - x.shape[1]), value=value)  # noqa: E731
    columns = zip(zip(*parts, strict=True), (0, 0.0, IGNORE), strict=True)
    return Predictions(*(torch.cat([pad(x, value) for x in column]) for column, value in columns))


def precision_coverage(given: Predictions, thresholds: Iterable[float]) -> tuple[Curve, Curve]:
    """(share of pixels kept, share of these that are right) per threshold; NaN if none is kept."""
    confidence, right = given.confidence[given.valid], ~given.wrong[given.valid]
    kept = [confidence >= threshold for threshold in thresholds]
    coverage = [float(keep.float().mean()) for keep in kept]
    return np.array(coverage), np.array([float(right[keep].float().mean()) for keep in kept])


def strictness(given: Predictions, threshold: float) -> tuple[float, float, float]:
    """Shares: of pixels kept, of wrong ones among these, and of wrong ones by confidence.

    The last is what remains of the second where each kept pixel counts by its confidence (PS-MT).
    """
    keep = given.valid & (given.confidence >= threshold)
    weight, count = given.confidence[keep], keep.sum()
    wrong = given.wrong[keep]
    shares = count / given.valid.sum(), wrong.float().mean(), weight[wrong].sum() / weight.sum()
    return tuple(map(float, shares))


def kept_by_class(given: Predictions, threshold: float, classes: int) -> dict[str, np.ndarray]:
    """Shares (K,): a class's in the "truth", among "kept" labels, and kept with the right label."""
    truth, label = given.truth[given.valid], given.label[given.valid]
    keep = given.confidence[given.valid] >= threshold
    there = np.bincount(truth, minlength=classes)
    right = np.bincount(truth[keep & (label == truth)], minlength=classes)
    kept = np.bincount(label[keep], minlength=classes)
    with np.errstate(invalid="ignore"):
        return {"truth": there / there.sum(), "kept": kept / kept.sum(), "recall": right / there}


def reliability_bins(given: Predictions, count: int = 15) -> tuple[Curve, Curve, Curve]:
    """(mean confidence, accuracy, share of pixels) of bins of equal width, empty ones left out."""
    confidence = given.confidence[given.valid].double().numpy()
    right = (~given.wrong[given.valid]).numpy()
    place = np.minimum((confidence * count).astype(int), count - 1)
    size = np.bincount(place, minlength=count)
    used = size > 0
    means = [np.bincount(place, v, count)[used] / size[used] for v in (confidence, right)]
    return means[0], means[1], size[used] / size.sum()


def calibration_error(given: Predictions, count: int = 15) -> float:
    """Expected calibration error: mean |accuracy - confidence| of bins (Guo et al. 2017, eq. 3)."""
    confidence, accuracy, share = reliability_bins(given, count)
    return float((share * np.abs(accuracy - confidence)).sum())


class Fate(NamedTuple):
    """What became of an earlier network's confident mistakes."""

    mistakes: float  # as a share of all pixels
    kept: float  # of these: the later network gives the same wrong label
    corrected: float  # it gives the right one; what is left to 1 got another wrong one


def fate(before: Predictions, after: Predictions, threshold: float) -> Fate:
    """What a later network says where `before` was wrong with at least `threshold` confidence."""
    chosen = before.wrong & (before.confidence >= threshold)
    label, truth = after.label[chosen], after.truth[chosen]
    count = chosen.sum().clamp(min=1)  # without any mistake, all shares are 0
    kept, corrected = (label == before.label[chosen]).sum(), (label == truth).sum()
    shares = chosen.sum() / before.valid.sum(), kept / count, corrected / count
    return Fate(*map(float, shares))


def near_border(truth: Tensor, pixels: int) -> Tensor:
    """(N, H, W) bool: another class lies within `pixels` rows and columns. Void is a class here."""
    value = truth.float()[:, None]
    pool = lambda x: F.max_pool2d(x, 2 * pixels + 1, 1, pixels)  # noqa: E731
    return (pool(value) != -pool(-value))[:, 0]


def disagreement(one: Predictions, other: Predictions) -> float:
    """Share of pixels to which two networks give different labels."""
    return float((one.label != other.label)[one.valid].float().mean())


def weight_distance(net: nn.Module, other: nn.Module) -> float:
    """|net - other| / |other|, Euclidean, over all parameters together; buffers do not count."""
    ours, theirs = (torch.cat([p.detach().flatten() for p in n.parameters()]) for n in (net, other))
    return float((ours - theirs).norm() / theirs.norm())


def past_weights(decays: Sequence[float]) -> np.ndarray:
    """(S,) shares of each step's student in a teacher; what is missing to 1 is its beginning."""
    decays = np.asarray(decays, dtype=float)
    remains = np.append(np.cumprod(decays[::-1])[::-1][1:], 1.0)  # of what came in at each step
    return (1 - decays) * remains


def memory_age(decays: Sequence[float]) -> np.ndarray:
    """(S,) mean age in steps, after each step, of all that the teacher has averaged so far."""
    age, ages = 0.0, []
    for decay in decays:
        age = decay * (age + 1)
        ages.append(age)
    return np.array(ages)


def labelling_ages(steps: int, turn: int, decay: float) -> dict[str, np.ndarray]:
    """`memory_age` (S,) of the teacher that labels, in three schemes of Dual Teacher.

    One teacher; two that take turns of `turn` steps, where the one that waits grows old; and two
    whose warm-up of the decay counts the updates of the turn ("ema_reset"), not the teacher's own.
    """
    number, since = divmod(np.arange(steps), turn)
    ages = {}
    for scheme, count in (("single_teacher", 1), ("dual_teacher", 2), ("ema_reset", 2)):
        updates = since if scheme == "ema_reset" else number // count * turn + since
        own = np.array([warm_decay(decay, k) for k in updates.tolist()])
        each = [memory_age(np.where(number % count == i, own, 1.0)) for i in range(count)]
        ages[scheme] = np.choose(number % count, each)
    return ages


@torch.no_grad()
def sub_models(net: nn.Module, image: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """A sub-model per normalised image (B, 3, H, W), see `stochastic_depth`, which drops at `rate`.

    Returns:
        (blocks that survive (B, blocks) bool in the network's order, share of pixels (B,) to which
        sub-model and network give the same label).
    """
    kept = [torch.ones(len(image), 0, dtype=torch.bool)]

    def note(part: nn.Module, inputs: tuple[Tensor], out: Tensor) -> None:
        before, after = (x.flatten(1).any(1, keepdim=True).cpu() for x in (inputs[0], out))
        kept.append(after | ~before)  # a branch that says nothing anyhow is not skipped

    full = net(image).argmax(1)
    with stochastic_depth(net, rate):
        for part in net.modules():
            if isinstance(part, DropPath):  # lives as long as this context, and its hook with it
                part.register_forward_hook(note)
        same = net(image).argmax(1) == full
    return torch.cat(kept, 1), same.float().mean((1, 2)).cpu()


def by_turn(pairs: Iterable, period: int = 1, first: int = 0) -> tuple[list, list]:
    """Of `probe.coupling`: (student and the teacher that has just labeled, student and the others).

    `teachers.0` and so on take turns of `period` epochs, the first one after `first` epochs. What
    has had no turn yet is left out.
    """
    pairs = [p for p in pairs if p.one == "student" and p.epoch > first]
    count, parts = len({p.other for p in pairs}), ([], [])
    for p in pairs:
        turn, number = (p.epoch - 1 - first) // period, int(p.other.partition(".")[2])
        if turn >= number:
            parts[turn % count != number].append(p)
    return parts


def coupling_curves(pairs: Mapping[str, Sequence]) -> dict[str, dict[str, list]]:
    """For `plots.panels`, from {name: pairs of `probe.coupling`}: three quantities by epoch."""
    quantities = {
        "weights apart (%)": lambda p: 100 * p.distance,
        "labels differ (%)": lambda p: 100 * p.disagreement,
        "teacher minus student (mIoU)": lambda p: -p.gap,
    }
    return {
        title: {k: [([p.epoch for p in ps], list(map(f, ps)))] for k, ps in pairs.items()}
        for title, f in quantities.items()
    }


def paired_values(ours: Sequence[float], base: Sequence[float]) -> Difference:
    """As `records.paired`, for any quantity measured once per label draw, in the same order.

    Raises:
        ValueError: lists of different lengths.
    """
    return difference([a - b for a, b in zip(ours, base, strict=True)])
