"""Evaluation of every network of a method in one pass over the images, shared among processes.

What counts as *the* prediction for an image, and what it is compared with, differs among papers by
up to four points of mIoU; `EVALUATIONS` names their rules.
"""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import distributed
from .config import checked
from .data.images import Images
from .losses import IGNORE
from .method import Method
from .metrics import boundary, calibration_bins, confusion, iou, miou, miou_of

BATCH = 32  # images read at a time
PIXELS = 32 * 240 * 320  # of images in one forward pass, at most (or a single image)


@dataclass(frozen=True)
class Evaluation:
    """How an image becomes a prediction, and the prediction a score.

    Args:
        mode: "whole" image; its "centre", cropped or padded to `crop`; or windows that "slide".
        crop: height and width of the crop or of a window.
        stride: of windows, in pixels; 0 is two thirds of `crop`, rounded up.
        border: a window over the far border is shifted back ("shift"), or cut off ("shrink").
        average: what overlapping windows, scales and flips average: "logits" or "probs".
        pad_label: label of the padding of a "centre"; 255 does not count, the released U2PL and
            GTA-Seg count it as class 0.
        absent: a class in neither truth nor prediction is left out of the mean ("skip") or 0.
        multiple: the image is resized so that its sides are multiples of this, the logits back.
        scales: factors at which the image is predicted; flip: and mirrored.
    """

    mode: typing.Literal["whole", "centre", "slide"] = "whole"
    crop: tuple[int, ...] = ()
    stride: int = 0
    border: typing.Literal["shift", "shrink"] = "shift"
    average: typing.Literal["logits", "probs"] = "logits"
    pad_label: int = IGNORE
    absent: typing.Literal["skip", "zero"] = "skip"
    multiple: int = 1
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False

    def __post_init__(self):
        for f, kind in zip(fields(self), typing.get_type_hints(type(self)).values(), strict=True):
            object.__setattr__(self, f.name, checked(f.name, getattr(self, f.name), kind))
        if len(self.crop) != (0 if self.mode == "whole" else 2) or any(c < 1 for c in self.crop):
            needs = "no crop" if self.mode == "whole" else "a crop of two positive numbers"
            raise ValueError(f"crop={list(self.crop)}: evaluation mode {self.mode} takes {needs}")
        if not self.scales or any(s <= 0 for s in self.scales):
            raise ValueError(f"scales={list(self.scales)}: give positive numbers")
        if self.multiple < 1 or self.stride < 0:
            raise ValueError("multiple must be 1 or more and stride 0 or more")

    def to_dict(self) -> dict:
        """As JSON has it, with lists for tuples."""
        return json.loads(json.dumps(asdict(self)))

    def strides(self) -> tuple[int, ...]:
        return tuple(self.stride or math.ceil(2 * c / 3) for c in self.crop)


# The published rules (../book says where each was read). Summed and averaged windows have the same
# argmax, so that TorchSemiSeg's sum needs no rule of its own.
EVALUATIONS: types.MappingProxyType[str, dict] = types.MappingProxyType(
    {
        "whole": {},
        "centre": {"mode": "centre", "crop": [513, 513]},
        "u2pl-centre": {"mode": "centre", "crop": [513, 513], "pad_label": 0, "absent": "zero"},
        "u2pl-slide": {"mode": "slide", "crop": [769, 769], "absent": "zero"},
        "ael-slide": {"mode": "slide", "crop": [769, 769], "average": "probs", "absent": "zero"},
        "cps-slide": {"mode": "slide", "crop": [512, 512]},
        "unimatch-whole": {"absent": "zero"},
        "unimatch-slide": {
            "mode": "slide",
            "crop": [801, 801],
            "stride": 534,
            "border": "shrink",
            "average": "probs",
            "absent": "zero",
        },
        "ps_mt-whole": {"multiple": 8, "absent": "zero"},
        "ps_mt-slide": {"mode": "slide", "crop": [800, 800], "stride": 534, "absent": "zero"},
    }
)


def evaluation(name: str = "whole", changes: dict | None = None) -> Evaluation:
    """The named rule with some fields changed. Raises ValueError, naming what is valid."""
    if name not in EVALUATIONS:
        raise ValueError(f"evaluation={name!r}: choose one of {', '.join(EVALUATIONS)}")
    valid = [f.name for f in fields(Evaluation)]
    unknown = [key for key in changes or {} if key not in valid]
    if unknown:
        raise ValueError(f"eval_args has unknown key {unknown[0]!r}: choose from {valid}")
    return Evaluation(**{**EVALUATIONS[name], **(changes or {})})


def predict(net: nn.Module, image: Tensor, how: Evaluation) -> Tensor:
    """Averaged logits or probs (B, K, H, W) for normalised images (B, 3, H, W) of one size.

    In mode "centre" the image is predicted as it is given: `centred` crops it.
    """
    size, total = image.shape[-2:], 0
    for scale in how.scales:
        sides = [max(1, round(s * scale / how.multiple)) * how.multiple for s in size]
        scaled = image
        if tuple(sides) != tuple(size):
            scaled = F.interpolate(image, sides, mode="bilinear", align_corners=True)
        for mirrored in (False, True)[: 1 + how.flip]:
            scores = _windows(net, scaled.flip(-1) if mirrored else scaled, how)
            scores = scores.flip(-1) if mirrored else scores
            if scores.shape[-2:] != size:
                scores = F.interpolate(scores, size, mode="bilinear", align_corners=True)
            total = total + scores
    return total / (len(how.scales) * (1 + how.flip))


def _windows(net: nn.Module, image: Tensor, how: Evaluation) -> Tensor:
    def scores(x: Tensor) -> Tensor:
        logits = net(x).float()
        return logits.softmax(1) if how.average == "probs" else logits

    if how.mode != "slide":
        return scores(image)
    size = image.shape[-2:]
    if how.border == "shift":  # a window is always whole, so the image must be as large
        image = _pad(image, how.crop, 0.0)
    height, width = image.shape[-2:]
    total, count = None, image.new_zeros(1, 1, height, width)
    for top, bottom in _starts(height, how.crop[0], how.strides()[0], how.border):
        for left, right in _starts(width, how.crop[1], how.strides()[1], how.border):
            found = scores(image[..., top:bottom, left:right])
            if total is None:
                total = found.new_zeros(*found.shape[:2], height, width)
            total[..., top:bottom, left:right] += found
            count[..., top:bottom, left:right] += 1
    return _centre(total / count, size)


def _starts(length: int, crop: int, stride: int, border: str) -> Iterator[tuple[int, int]]:
    """(first, end) of the windows along one side."""
    if border == "shrink":
        yield from ((first, min(first + crop, length)) for first in range(0, length, stride))
    else:
        count = max(0, math.ceil((length - crop) / stride)) + 1
        firsts = (min(i * stride, length - crop) for i in range(count))
        yield from ((first, first + crop) for first in firsts)


def _pad(x: Tensor, crop: Sequence[int], value: float) -> Tensor:
    """(..., H, W) padded to at least `crop`, the smaller half of the padding first."""
    missing = [max(0, c - s) for c, s in zip(crop, x.shape[-2:], strict=True)]
    (top, left), (bottom, right) = [m // 2 for m in missing], [m - m // 2 for m in missing]
    return F.pad(x, (left, right, top, bottom), value=value) if any(missing) else x


def _centre(x: Tensor, crop: Sequence[int]) -> Tensor:
    top, left = ((s - c) // 2 for s, c in zip(x.shape[-2:], crop, strict=True))
    return x[..., top : top + crop[0], left : left + crop[1]]


def centred(image: Tensor, label: Tensor, how: Evaluation) -> tuple[Tensor, Tensor]:
    """(normalised image, label), cropped or padded to the middle if the rule says so."""
    if how.mode != "centre":
        return image, label
    image, label = _pad(image, how.crop, 0.0), _pad(label, how.crop, how.pad_label)
    return _centre(image, how.crop), _centre(label, how.crop)


def normaliser(
    mean: Sequence[float], std: Sequence[float], device: torch.device
) -> Callable[[Tensor], Tensor]:
    """A function from uint8 RGB (B, 3, H, W) to what a network with this mean and std expects."""
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (mean, std))
    return lambda image: ((image.to(device).float() / 255 - mean) / std).contiguous(
        memory_format=torch.channels_last
    )


def evaluated(method: Method) -> dict[str, nn.Module]:
    """Networks to evaluate by name; what is deployed too, if it is none of them (an ensemble)."""
    networks = method.networks()
    return networks if method.deployed in networks else {**networks, method.deployed: method}


class Counts(typing.NamedTuple):
    """What one network got right and wrong, for each of N images, so that they can be resampled."""

    confusion: Tensor  # (N, K, K) int64, rows truth, columns prediction
    boundary: Tensor | None = None  # (N, 2, K) intersection and union of bands along boundaries
    bins: Tensor | None = None  # (N, 3, 15) pixels, confidence, right ones by confidence


@torch.no_grad()
def count(
    networks: dict[str, nn.Module],
    images: Images,
    indices: Sequence[int],
    normalise: Callable[[Tensor], Tensor],
    device: torch.device,
    how: Evaluation | None = None,
    *,
    thorough: bool = False,
) -> dict[str, Counts]:
    """Counts of each network, in the order of `indices` and equal on every process.

    Process r takes every world-th image from the r-th on, so that each image counts exactly once.
    `thorough` also measures boundaries and calibration.
    """
    images.require_annotations(indices)
    how, classes, n = how or Evaluation(), len(images.classes), len(indices)
    modes = {name: net.training for name, net in networks.items()}
    found = {
        name: Counts(
            torch.zeros(n, classes, classes, dtype=torch.int64, device=device),
            torch.zeros(n, 2, classes, device=device) if thorough else None,
            torch.zeros(n, 3, 15, device=device) if thorough else None,
        )
        for name in networks
    }
    for net in networks.values():
        net.eval()
    mine = range(n)[distributed.rank() :: distributed.world()]
    for places, image, label in _groups(images, indices, mine):
        image, label = centred(normalise(image), label.to(device), how)
        for name, net in networks.items():
            scores = predict(net, image, how)
            guess = scores.argmax(1)
            for i, place in enumerate(places):
                found[name].confusion[place] = confusion(guess[i], label[i], classes)
            if thorough:
                probs = scores if how.average == "probs" else scores.softmax(1)
                found[name].boundary[places] = boundary(guess, label, classes)
                found[name].bins[places] = calibration_bins(probs.amax(1), guess == label, label)
    for name, net in networks.items():
        net.train(modes[name])
    share = lambda x: None if x is None else distributed.total(x)  # noqa: E731
    return {name: Counts(*map(share, counts)) for name, counts in found.items()}


def _groups(
    images: Images, indices: Sequence[int], places: Sequence[int]
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """(places, images, labels) of one size, few enough for one forward pass."""
    for first in range(0, len(places), BATCH):
        samples = [(place, *images[indices[place]]) for place in places[first : first + BATCH]]
        for _, group in groupby(samples, key=lambda sample: sample[1].shape):
            group = list(group)
            step = max(1, PIXELS // group[0][2].numel())
            for start in range(0, len(group), step):
                part, image, label = zip(*group[start : start + step], strict=True)
                yield list(part), torch.stack(image), torch.stack(label)


def scores(counts: dict[str, Counts], absent: str = "skip") -> dict[str, dict]:
    """{network: {"miou": %, "iou": [% per class, None where absent]}} over all images.

    Thorough counts also give "boundary_miou" (%) and "ece", the expected calibration error.
    """
    found = {}
    for name, (matrices, bands, bins) in counts.items():
        matrix = matrices.sum(0)
        found[name] = {
            "miou": round(miou(matrix, absent), 4),
            "iou": [None if v != v else round(v, 4) for v in iou(matrix).tolist()],
        }
        if bands is not None:
            inside, union = bands.sum(0).double()
            found[name]["boundary_miou"] = round(float(miou_of(100 * inside / union, absent)), 4)
            size, confidence, right = bins.sum(0).double()
            found[name]["ece"] = round(float((confidence - right).abs().sum() / size.sum()), 6)
    return found
