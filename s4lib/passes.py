"""What a step costs, counted rather than claimed: passes of batches through encoders."""

from __future__ import annotations

import functools
import inspect
import re
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .method import Batch, Clock, Crop
from .methods import METHODS
from .nets import SegNet, build_net

IMAGES, SIZE, CLASSES, EPOCHS = 4, 32, 4, 10


class Passes(NamedTuple):
    """Of one step, in units of a batch: supervised-only is (1, 0, 1). Passes that begin at features
    (further decoders, adversarial directions) come on top."""

    forward: float  # with a gradient
    teaching: float  # forward, without a gradient
    backward: float

    def __str__(self) -> str:
        return " + ".join(f"{n:g} {what}" for n, what in zip(self, self._fields, strict=True) if n)


@functools.cache
def passes(name: str, preset: str = "paper") -> Passes:
    """Count the passes of a late step (after warm-ups) of a method, by running one on tensors that
    have shapes and no values.

    As many unlabeled as labeled images; of a method of several stages, its last.
    """
    kind = METHODS[name]
    counts = dict.fromkeys(Passes._fields, 0)
    with torch.device("meta"):
        build = lambda **changes: build_net("tiny", CLASSES, **changes)  # noqa: E731
        method = kind(build, **kind.presets[preset]).train()
        image = torch.empty(IMAGES, 3, SIZE, SIZE)
        label = torch.empty(IMAGES, SIZE, SIZE, dtype=torch.long)
        unlabeled = IMAGES if method.uses_unlabeled else 0
        valid = torch.empty(unlabeled, SIZE, SIZE, dtype=torch.bool)
    views = (image[:unlabeled],) * method.strong_views
    strong = image if method.labeled_strong else None
    crop = Crop(image[:unlabeled], views, valid)
    batch = Batch(
        image, label, *crop, strong, label[:unlabeled], crop if method.second_crop else None
    )
    for net in method.modules():
        if isinstance(net, SegNet):
            net.encoder.register_forward_hook(functools.partial(_count, counts))
    with torch.random.fork_rng(devices=[]):
        for step in (EPOCHS - 2, EPOCHS - 1):  # the first may only set things up
            counts.update(dict.fromkeys(counts, 0))
            method.step(batch, Clock(step, 1, EPOCHS), _minimize)
    return Passes(**{what: count / IMAGES for what, count in counts.items()})


def citation(name: str) -> str:
    """Authors, venue and year of a method, as the first line of its file has them in brackets."""
    first = inspect.getdoc(inspect.getmodule(METHODS[name])).splitlines()[0]
    found = re.search(r"\((.+?, .+? \d{4})\)", first)
    return found[1] if found else ""


def _count(counts: dict[str, int], encoder: nn.Module, inputs: tuple[Tensor], features) -> None:
    images, last = len(inputs[0]), list(features)[-1]
    counts["forward" if last.requires_grad else "teaching"] += images
    if last.requires_grad:
        last.register_hook(lambda gradient: counts.update(backward=counts["backward"] + images))


def _minimize(loss: Tensor, *nets: nn.Module) -> bool:
    loss.backward(inputs=[p for net in nets for p in net.parameters() if p.requires_grad])
    return True
