"""The words methods are written in: `Batch`, `Clock`, `Method`, `joint`, `ema` and others."""

from __future__ import annotations

import copy
import inspect
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .config import checked, one_of
from .losses import ce


class Crop(NamedTuple):
    """Another crop of a step's unlabeled images; its fields are as those of `Batch`."""

    weak: Tensor
    strong: tuple[Tensor, ...]
    valid: Tensor


class Batch(NamedTuple):
    """One step's data on the device: B labeled, U unlabeled images (0 if the method wants none)."""

    image: Tensor  # labeled, weak view              (B, 3, H, W) float, normalised
    label: Tensor  # its annotation, IGNORE = void   (B, H, W) int64
    weak: Tensor  # unlabeled, weak view             (U, 3, H, W)
    strong: tuple[Tensor, ...]  # the same crops, `strong_views` strong versions of each
    valid: Tensor  # False where `weak` is padding   (U, H, W) bool
    image_strong: Tensor | None = None  # strong view of `image`, for methods that want it
    weak_label: Tensor | None = None  # pseudo-label of `weak`, for `offline_labels`, as `label`
    second: Crop | None = None  # of the same unlabeled images, for `second_crop`


@dataclass(frozen=True)
class Clock:
    """Where training is. An epoch is one pass over the unlabeled list."""

    step: int
    steps_per_epoch: int
    epochs: int

    @property
    def steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    @property
    def epoch(self) -> int:
        return self.step // self.steps_per_epoch

    @property
    def progress(self) -> float:
        """Share of the training that lies behind, in [0, 1)."""
        return self.step / self.steps

    def phase(self, first: int) -> Clock:
        """The clock of a part of the training: of its `first` epochs, or after them of the rest."""
        if self.epoch < first:
            return Clock(self.step, self.steps_per_epoch, first)
        done = first * self.steps_per_epoch
        return Clock(self.step - done, self.steps_per_epoch, self.epochs - first)


# minimize(loss, *nets): one optimizer update of exactly these networks. Returns False while
# gradients are still being accumulated, so that what follows an update (EMA) happens once per
# update.
Minimize = Callable[..., bool]


class HyperParameter(NamedTuple):
    kind: object  # its type
    default: object  # the paper's value
    meaning: str


class Method(nn.Module):
    """Its children are its networks, `step` is how they learn, `forward` is what is deployed.

    Hyper-parameters are annotated class attributes, one line each: name, type, the paper's value,
    and a comment that says what it means and where it stands. `presets` hold other sets of values.
    Anything remembered between steps must be a buffer, so that `state_dict` is the whole state.

        class Example(Method):
            weight: float = 1.0  # of the unlabeled loss (eq. 3)
            cons: Literal["mse", "ce"] = "mse"  # between softmax maps, or with pseudo-labels

            def setup(self, build):
                self.student = build()
    """

    strong_views: int = 0  # strong versions wanted of each unlabeled crop
    labeled_strong: bool = False  # whether `Batch.image_strong` is wanted
    # What makes them strong, one word or one per view: "colour" (photometric, of the run's
    # `augment`), "noise" (Gaussian) or "normalised" (Dual Teacher's jitter of normalised images).
    family: str | tuple[str, ...] = "colour"
    second_crop: bool = False  # whether `Batch.second` is wanted
    unlabeled_order: str = "shuffled"  # or "fixed": the list's first images, as many as are labeled
    uses_unlabeled: ClassVar[bool] = True
    offline_labels: bool = False  # whether `Batch.weak_label` is wanted, which `recipe` has made
    stages: int = 1  # trainings, of which `recipe` does all but the last
    deployed: ClassVar[str] = "student"  # the child that `forward` runs
    batch_statistics: tuple[str, ...] = ()  # frozen children whose BN uses the batch's statistics
    presets: ClassVar[dict[str, dict]] = {"paper": {}}
    criterion: Callable[[Tensor, Tensor], Tensor] = staticmethod(ce)  # supervised loss: ce or ohem

    def __init__(self, build: Callable[..., nn.Module], **changes):
        """`build()` returns a fresh `SegNet`; `changes` are hyper-parameters.

        Raises:
            ValueError: unknown hyper-parameter, or a value that is none of its valid ones.
        """
        super().__init__()
        known = self.hyper_parameters()
        for name in changes.keys() - known.keys():
            has = ", ".join(known) or "none"
            raise ValueError(f"unknown hyper-parameter {name!r}: {type(self).__name__} has {has}")
        for name, given in known.items():
            setattr(self, name, checked(name, changes.get(name, given.default), given.kind))
        self.setup(build)

    def setup(self, build: Callable[..., nn.Module]) -> None:
        """Make the networks, as children."""
        raise TypeError(f"{type(self).__name__} does not define setup")

    @classmethod
    def hyper_parameters(cls) -> dict[str, HyperParameter]:
        """Of this class, by name, in their order."""
        kinds, found, above = typing.get_type_hints(cls, include_extras=True), {}, []
        for line in inspect.getsource(cls).splitlines():
            comment = re.fullmatch(r"    # (.*)", line)
            name = re.match(r"    (\w+): ", line)
            if name and name[1] in cls.__annotations__:
                after = re.search(r"  # (.*)", line)
                meaning = " ".join([*above, *([after[1]] if after else [])])
                found[name[1]] = HyperParameter(kinds[name[1]], getattr(cls, name[1]), meaning)
            above = [*above, comment[1]] if comment else []
        return found

    def recipe(self, run, fit: Callable) -> None:
        """What comes before the training `run` (trainer.Run), `fit` being its `stage`: nothing."""

    def step(self, batch: Batch, clock: Clock, minimize: Minimize) -> dict[str, Tensor]:
        """Learn from one batch; return detached 0-d tensors to log."""
        raise TypeError(f"{type(self).__name__} does not define step")

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, K, H, W) of the deployed network for normalised images (B, 3, H, W)."""
        return self.get_submodule(self.deployed)(image)

    def networks(self) -> dict[str, nn.Module]:
        """Every network by name (`student`, `students.0` ...): each is evaluated and recorded."""
        found = {}
        for name, child in self.named_children():
            if isinstance(child, nn.ModuleList):
                found |= {f"{name}.{i}": net for i, net in enumerate(child)}
            else:
                found[name] = child
        return found

    def schedule(self, child: str, clock: Clock) -> float:
        """Where a child's learning-rate schedule stands, in [0, 1); 0 keeps it constant."""
        return clock.progress

    def restarts(self, child: str, clock: Clock) -> bool:
        """Whether a child's optimizer forgets its state before this step, as a new one would."""
        return False

    def train(self, mode: bool = True):
        """As in torch, but frozen children stay in eval mode unless in `batch_statistics`."""
        super().train(mode)
        for name, child in self.named_children():
            if name not in self.batch_statistics and not trainable(child):
                child.eval()
        return self


def train_step(
    method: Method, batch: Batch, clock: Clock, minimize: Minimize, warmup: int = 0
) -> dict[str, Tensor]:
    """The method's step; in the first `warmup` epochs, before its own clock starts, one on labels
    alone, of every trainable network, while frozen ones become copies of the first.

    For networks that do not start from pretrained weights, as those of the papers do.
    """
    if clock.epoch >= warmup:
        return method.step(batch, clock.phase(warmup), minimize)
    networks = list(method.networks().values())
    nets = [net for net in networks if trainable(net)]
    sup = [method.criterion(net(batch.image), batch.label) for net in nets]
    if minimize(sum(sup), *(child for child in method.children() if trainable(child))):
        for net in networks:
            if not trainable(net):
                ema(net, networks[0], 0.0)
    return {"sup": sup[0].detach()}


def trainable(net: nn.Module) -> bool:
    return any(p.requires_grad for p in net.parameters())


def frozen_copy(net: nn.Module) -> nn.Module:
    """A copy that shares no storage with `net` and takes no gradient."""
    return copy.deepcopy(net).requires_grad_(False)


def joint(net: nn.Module, *images: Tensor) -> tuple[Tensor, ...]:
    """Logits of several batches from one forward pass, so that BN sees them together."""
    return net(torch.cat(images)).split([len(x) for x in images])


@torch.no_grad()
def ema(target: nn.Module, source: nn.Module, decay: float, buffers: str = "copy") -> None:
    """target <- decay * target + (1 - decay) * source, in place (Tarvainen and Valpola, eq. 3).

    `buffers` says what becomes of BN statistics, on which released codes differ: "copy" takes the
    source's, "ema" averages floating-point ones like parameters and copies counters, "keep" leaves
    the target's own.
    """
    one_of("buffers", buffers, "copy", "ema", "keep")
    average, copied = list(zip(target.parameters(), source.parameters(), strict=True)), []
    for t, s in zip(target.buffers(), source.buffers(), strict=True):
        if buffers == "ema" and t.is_floating_point():
            average.append((t, s))
        elif buffers != "keep":
            copied.append((t, s))
    for floating in (True, False):  # of one type, they are one kernel on a GPU
        pairs = [(t, s) for t, s in copied if t.is_floating_point() is floating]
        if pairs:
            torch._foreach_copy_([t for t, _ in pairs], [s for _, s in pairs])
    if average:
        torch._foreach_lerp_([t for t, _ in average], [s for _, s in average], 1 - decay)
