"""Fused maps of a trained student with teachers, and what a step in them changes (PS-MT's figures).

maps = features.student_maps(model, images, indices)
for name, step in features.steps(maps).items():            # "noise, whole map", ...
    features.flipped(maps, step, [maps.method.student])    # share of right pixels, per image
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.images import Images
from ..losses import IGNORE
from ..method import Method
from ..perturb import adversarial
from ..trained import Trained


class Maps(NamedTuple):
    """What the classifiers of a method with `student` and `teachers` read, for N images."""

    method: Method
    picture: Tensor  # (N, 3, H, W) uint8
    truth: Tensor  # (N, H, W) uint8, IGNORE = void
    fused: Tensor  # of the student, (N, C, h, w), on the method's device


@torch.no_grad()
def student_maps(model: Trained, images: Images, indices: Sequence[int]) -> Maps:
    """The student's fused maps of whole images, which must be of one size."""
    picture, truth = map(torch.stack, zip(*(images[i] for i in indices), strict=True))
    student = model.method.student
    fused = student.fuse(student.encode(model.normalise(picture)))
    return Maps(model.method, picture, truth, fused)


def steps(maps: Maps, eps: float = 2.0) -> dict[str, Tensor]:
    """Changes of `maps.fused` of length `eps` by name, "T-VAT, whole map" for instance.

    "noise"; "VAT", the direction that misleads the student; "T-VAT", the teachers, all from the
    same noise. It is the "whole map" of an image that has the length, or "each place" of it:
    `norm` of `perturb.adversarial`.
    """
    student, teachers, size = maps.method.student, maps.method.teachers, maps.truth.shape[-2:]
    kinds = {"noise": (teachers, 0), "VAT": ([student], 1), "T-VAT": (teachers, 1)}
    found = {}
    for where, norm in (("whole map", "sample"), ("each place", "pixel")):
        for name, (nets, iters) in kinds.items():
            with torch.random.fork_rng(devices=[maps.fused.device] if maps.fused.is_cuda else []):
                torch.manual_seed(0)
                step = adversarial(maps.fused, nets, size, norm=norm, eps=eps, iters=iters)
            found[f"{name}, {where}"] = step
    return found


class Search(NamedTuple):
    """What one search for T-VAT's step finds; means over images."""

    length: float
    cosine: float  # with the step of the defaults (PS-MT, eq. 1 and 2) in 64 bits
    flipped: float  # share of the student's right pixels


def searches(maps: Maps, settings: Mapping[str, dict]) -> dict[tuple[str, int], Search]:
    """{(name, bits): Search} of `perturb.adversarial` with some settings, in 32 and in 64 bits.

    All begin at the same uniform noise, which is handed over in place of a draw: the generator
    would give other numbers in 64 bits.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.rand(maps.fused.shape, generator=generator).to(maps.fused.device)

    def search(bits: int, changes: Mapping) -> Tensor:
        kind = {32: torch.float32, 64: torch.float64}[bits]
        nets = [copy.deepcopy(net).to(kind) for net in maps.method.teachers]
        size = maps.truth.shape[-2:]
        with mock.patch.object(torch, "rand_like", start.to):
            return adversarial(maps.fused.to(kind), nets, size, **{"noise": "uniform", **changes})

    truth, found = search(64, {}).flatten(1), {}
    for name, changes in settings.items():
        for bits in (32, 64):
            step = search(bits, changes)
            long = step.flatten(1).double()
            flips = flipped(maps, step.float(), [maps.method.student])
            means = long.norm(dim=1), F.cosine_similarity(long, truth), flips
            found[name, bits] = Search(*(float(mean.mean()) for mean in means))
    return found


@torch.no_grad()
def flipped(maps: Maps, step: Tensor, nets: Sequence[nn.Module]) -> Tensor:
    """(N,) shares of each image's pixels that `nets`, by their mean logits, label rightly before
    the step and wrongly after it, among those labelled rightly before."""

    def right(fused: Tensor) -> Tensor:
        logits = sum(net.classify(fused, maps.truth.shape[-2:]) for net in nets)
        return (logits.argmax(1).cpu() == maps.truth) & (maps.truth != IGNORE)

    before, after = right(maps.fused), right(maps.fused + step)
    return (before & ~after).sum((1, 2)) / before.sum((1, 2)).clamp(min=1)


@torch.no_grad()
def cloud(
    maps: Maps,
    steps: Mapping[str, Tensor],
    classes: int = 5,
    each: int = 300,
    neighbours: bool = False,
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]], float]:
    """Places the student labels rightly, as points in a plane, after each step (`plots.clouds`).

    A point is what the last convolution reads at a place of the map, shown on the two principal
    components of what it reads before any step: an exact linear picture, in which a short way is a
    small change. With `neighbours` it is one `tsne` of all steps' points together: who is near whom
    is kept, lengths are not. Up to `each` places of the `classes` most frequent classes are drawn
    at random.

    Returns:
        {step's name: (points (M, 2), class (M,), whether it is labelled wrongly now (M,))}, and the
        share of the variance that the two components hold.
    """
    classifier = maps.method.student.classifier
    truth = F.interpolate(maps.truth[:, None].float(), maps.fused.shape[-2:])[:, 0].flatten().long()

    def read(fused: Tensor) -> tuple[Tensor, Tensor]:
        hidden = classifier[:-1](fused)
        label = classifier[-1](hidden).argmax(1).flatten().cpu()
        return hidden.movedim(1, -1).flatten(0, -2).cpu().double(), label

    clean, label = read(maps.fused)
    order = torch.randperm(len(truth), generator=torch.Generator().manual_seed(0))
    order = order[(label == truth)[order]]
    frequent = truth[order].bincount().argsort(descending=True)[:classes]
    at = torch.cat([order[truth[order] == k][:each] for k in frequent])
    centre = clean[at].mean(0)
    _, spread, axes = torch.linalg.svd(clean[at] - centre, full_matrices=False)
    moved = {name: read(maps.fused + step) for name, step in steps.items()}
    points = [(hidden[at] - centre) @ axes.T for hidden, _ in moved.values()]
    plane = (
        tsne(torch.cat(points).float()).split(len(at)) if neighbours else [x[:, :2] for x in points]
    )
    panels = {
        name: (xy.numpy(), truth[at].numpy(), (label != truth)[at].numpy())
        for xy, (name, (_, label)) in zip(plane, moved.items(), strict=True)
    }
    return panels, float(spread[:2].square().sum() / spread.square().sum())


def tsne(points: Tensor, perplexity: float = 30.0, steps: int = 400) -> Tensor:
    """Places (N, 2) of points (N, D) such that neighbours stay neighbours: t-SNE, exact.

    Van der Maaten and Hinton (JMLR 2008), from the first two columns of `points`, which should be
    principal components; `perplexity` is roughly the number of neighbours that count. Every pair is
    visited at every step: for some thousand points.
    """
    n, far = len(points), torch.cdist(points, points).square().fill_diagonal_(torch.inf)
    far = far - far.amin(1, keepdim=True)  # the nearest at 0: no row of exponentials vanishes
    wanted = math.log(min(perplexity, (n - 1) / 3))
    low, high = torch.zeros(n, 1).to(far), torch.full((n, 1), torch.inf).to(far)
    sharp = torch.ones(n, 1).to(far)
    for _ in range(60):  # the width of each point's kernel, by bisection
        p = torch.exp(-sharp * far)
        p /= p.sum(1, keepdim=True)
        wide = -torch.xlogy(p, p).sum(1, keepdim=True) > wanted
        low, high = torch.where(wide, sharp, low), torch.where(wide, high, sharp)
        sharp = torch.where(high.isinf(), 2 * sharp, (low + high) / 2)
    p = (p + p.T) / (2 * n)
    y = 1e-4 * points[:, :2] / points[:, 0].std()
    speed, gain = torch.zeros_like(y), torch.ones_like(y)
    for step in range(steps):
        early = step < steps // 4  # exaggerated, so that clusters form before they spread
        near = (1 / (1 + torch.cdist(y, y).square())).fill_diagonal_(0)
        pull = ((12 if early else 1) * p - near / near.sum()) * near
        slope = 4 * (pull.sum(1, keepdim=True) * y - pull @ y)
        gain = torch.where(slope.sign() == speed.sign(), 0.8 * gain, gain + 0.2).clamp(min=0.01)
        speed = (0.5 if early else 0.8) * speed - max(n / 48, 50) * gain * slope
        y = y + speed
    return y - y.mean(0)
