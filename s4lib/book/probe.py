"""Inside one step, and along a training: what the networks say before and after each update.

model = trained.load(folder, 2)                    # the snapshot after epoch 2
batch = probe.plain_batch(model, images, labeled=[0, 1], unlabeled=[2, 3])
for look in probe.probe_step(model, batch):        # GPS: before students, after students, ...
    look.moment, look.network, look.label, look.confidence
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import Config, one_of
from ..data.images import Images
from ..evaluate import evaluated
from ..method import Batch, Clock, Crop, Method, Minimize, train_step
from ..metrics import confusion, miou
from ..minimizer import Minimizer
from ..run_folder import snapshots
from ..trained import Trained, load
from ..trainer import AMP, seed_noise
from .analysis import disagreement, predictions, weight_distance


def watch(minimize: Minimize, observe: Callable[[str, tuple[nn.Module, ...]], None]) -> Minimize:
    """`minimize`, with calls of `observe("before", nets)` and `observe("after", nets)` around it.

    "before" comes after the forward passes that the loss is made of.
    """

    def watched(loss: Tensor, *nets: nn.Module) -> bool:
        observe("before", nets)
        updated = minimize(loss, *nets)
        observe("after", nets)
        return updated

    return watched


class Look(NamedTuple):
    """What one network says about some images at one moment of a step."""

    moment: str  # "before students", "after students" ...: an update of these networks; "end"
    network: str
    probs: Tensor  # softmax (N, K, H, W), on the CPU

    @property
    def label(self) -> Tensor:
        return self.probs.argmax(1)

    @property
    def confidence(self) -> Tensor:
        return self.probs.amax(1)


def plain_batch(
    model: Trained, images: Images, labeled: Sequence[int], unlabeled: Sequence[int]
) -> Batch:
    """Whole images by their indices as a step's batch, without augmentation (all views are equal).

    So the annotations of the unlabeled images, which no step sees, fit what is drawn of them. Where
    pseudo-labels are made before the training, the model's own stand for them.

    Raises:
        ValueError: images of several sizes, which make no batch.
    """

    def whole(indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        image, label = zip(*(images[i] for i in indices), strict=True)
        if len(sizes := {tuple(x.shape[1:]) for x in image}) > 1:
            raise ValueError(f"images {list(indices)} have sizes {sorted(sizes)}: choose equals")
        return model.normalise(torch.stack(image)), torch.stack(label).long().to(model.device)

    (image, label), (weak, truth), method = whole(labeled), whole(unlabeled), model.method
    valid = torch.ones_like(truth, dtype=torch.bool)
    strong = (weak,) * method.strong_views
    with torch.no_grad():
        weak_label = method(weak).argmax(1) if method.offline_labels else None
    image_strong = image if method.labeled_strong else None
    second = Crop(weak, strong, valid) if method.second_crop else None
    return Batch(image, label, weak, strong, valid, image_strong, weak_label, second)


def probe_step(model: Trained, batch: Batch, image: Tensor | None = None) -> list[Look]:
    """Every network before and after each update of the step that training would take next.

    The step runs on a copy, with the optimizers, learning rates and noise of the checkpoint that
    `model` was loaded from; model and run stay as they are. Of a run that has ended it is the last
    step, once more. Networks look in evaluation mode, with their running BN statistics.

    Args:
        batch: what the step learns from.
        image: normalised images (N, 3, H, W) to look at; the batch's weak views if None.

    Returns:
        One Look per moment and network, in the order of time; "end" comes after what follows the
        last update (EMA).

    Raises:
        ValueError: `model` is of checkpoint "best", which holds weights alone.
    """
    if not {"step", "of", "minimizer"} <= model.training.keys():
        raise ValueError("no step can be taken from weights alone: load 'last' or a snapshot")
    config = replace(model.config, accumulate=1)  # this batch is the whole update
    method = copy.deepcopy(model.method).train()
    minimizer = Minimizer(method, config, model.device)
    minimizer.load_state_dict(copy.deepcopy(model.training["minimizer"]))  # or it would be shared
    steps = model.training["of"]
    clock = Clock(min(model.training["step"], steps - 1), steps // config.epochs, config.epochs)
    image, looks, kind = batch.weak if image is None else image, [], model.device.type

    @torch.no_grad()
    def look(moment: str) -> None:
        modes = {module: module.training for module in method.modules()}
        method.eval()
        with torch.autocast(kind, enabled=False):
            for name, net in evaluated(method).items():
                looks.append(Look(moment, name, net(image).float().softmax(1).cpu()))
        for module, mode in modes.items():
            module.training = mode

    def observe(when: str, nets: tuple[nn.Module, ...]) -> None:
        names = [n for n, child in method.named_children() if any(child is net for net in nets)]
        look(f"{when} {' and '.join(names)}")

    with torch.random.fork_rng(devices=[model.device] if kind == "cuda" else []):
        seed_noise(config, clock.step)
        minimizer.begin(clock)
        with torch.autocast(kind, AMP.get(config.amp), enabled=config.amp != "off"):
            train_step(method, batch, clock, watch(minimizer, observe), config.warmup)
    look("end")
    return looks


def reach(
    method: Method, config: Config, batch: Batch, clock: Clock, child: str
) -> dict[str, dict[str, float]]:
    """How far each part of each network moves in a step that updates one child alone.

    What the update of `child` reaches at once through averages and shared weights: the other
    children's losses are computed, but not minimised. The step changes `method`.

    Returns:
        {network: {part: analysis.weight_distance, after to before}}, parts being encoder, decoder,
        classifier.

    Raises:
        ValueError: `child` is no trainable child.
    """
    minimizer, before = Minimizer(method, config, batch.image.device), copy.deepcopy(method)
    chosen = method.get_submodule(one_of("child", child, *minimizer.nets))
    minimizer.begin(clock)
    method.step(batch, clock, lambda loss, *nets: nets == (chosen,) and minimizer(loss, chosen))
    found = {}
    for name, net in method.networks().items():
        old = before.get_submodule(name)
        parts = zip(net.named_children(), old.children(), strict=True)
        found[name] = {part: weight_distance(new, was) for (part, new), was in parts}
    return found


class Pair(NamedTuple):
    """Two networks of a run after an epoch."""

    epoch: int
    one: str
    other: str
    distance: float  # of their weights, relative to the other's (analysis.weight_distance)
    disagreement: float  # share of pixels with different labels
    gap: float  # mIoU of one minus that of the other, in points


def coupling(
    folder: str | Path, images: Images, indices: Sequence[int], device: str = "auto"
) -> list[Pair]:
    """How far apart a run's networks are at its snapshots: a row per epoch and pair of networks.

    Raises:
        ValueError: the run kept no snapshot.
    """
    rows = []
    for epoch in snapshots(folder):
        model = load(folder, epoch, device)
        nets = model.method.networks()
        seen = {name: predictions(model, images, indices, name) for name in nets}
        matrices = {n: confusion(s.label, s.truth, len(model.classes)) for n, s in seen.items()}
        for one, other in combinations(nets, 2):
            distance = weight_distance(nets[one], nets[other])
            differ = disagreement(seen[one], seen[other])
            gap = miou(matrices[one]) - miou(matrices[other])
            rows.append(Pair(epoch, one, other, distance, differ, gap))
    return rows
