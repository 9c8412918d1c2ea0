"""One frozen `Config` decides a run's numbers.

config = protocols.protocol("mosaic-32", method="mean_teacher", draw=1)
config.run_id            # mosaic-32-mean_teacher-d1-s0-5f3c01aa: names the run's folder
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import types
import typing
from dataclasses import dataclass, field, fields

# Fields that change no number of a run: they may differ when it is resumed or looked up.
NO_NUMBER = ("data_root", "device", "tensorboard", "snapshots")


@functools.cache  # it evaluates each annotation, and tables make thousands of Configs
def _kinds(config: type) -> dict[str, object]:
    return typing.get_type_hints(config, include_extras=True)


@dataclass(frozen=True)
class Config:
    """Everything that decides a run's numbers.

    Args:
        protocol: the named starting point (s4lib.protocols) that these values came from.
        dataset: mosaic (embedded), camvid, voc, cityscapes or folder (your own images).
        data_root: folder of the dataset; mosaic needs none.
        size: working resolution, height and width; empty keeps the files' own.
        labeled: number of labeled training images; 0 labels all.
        draw: which of the fixed label draws.
        split: how labels are drawn (s4lib.data.splits.RULES; empty is the dataset's own rule), or
            the name of an imported list, for instance u2pl-662 (`s4 data splits`).
        unlabeled: use only this many of the other images; 0 uses all.
        eval_images: evaluate on only this many images; 0 on all.
        evaluation: rule by which images are predicted and scored (s4lib.evaluate.EVALUATIONS).
        eval_args: changes to that rule, for instance {"crop": [321, 321]}.
        eval_part: part of the dataset that is evaluated during training.
        net: network by name (s4lib.nets.NETS).
        net_args: changes to that network's arguments, for instance {"encoder": "resnet50"}.
        weights: file with encoder weights (.safetensors or torch) to start from.
        method: method by name; `s4 methods` lists them.
        preset: which of the method's presets, for instance paper.
        method_args: changes to the method's hyper-parameters.
        warmup: epochs at the beginning in which every network learns from labels alone, at a
            constant learning rate; the method's own training is what follows.
        epochs: passes over the unlabeled images.
        batch: labeled images per step, over all processes.
        unlabeled_batch: unlabeled images per step, over all processes.
        crop: height and width of a training view; empty takes `size`.
        augment: whose views: s4 (ours, as the next four say) or those of a published code
            (s4lib.data.families.FAMILIES), which brings its own zoom, padding and colours.
        resize_base: size that a published resizing refers to; 0 takes the image's own. ps_mt
            has 600 and augseg 500 for VOC (longer side), dual_teacher 512 for ADE20K (shorter).
        pad_label: label of padding in published views: 255 (void), or 0 as U2PL and GTA-Seg have.
        scale: bounds of the random zoom.
        outside: what a view shows beyond the image: reflect or void.
        jitter: strength of brightness, contrast and saturation changes in strong views.
        hue: largest hue shift in strong views, as a share of the colour circle.
        noise: standard deviation of Gaussian noise, on normalised images, in noisy views.
        sup_loss: ce, or ohem (online hard example mining: only pixels the network is unsure of).
        ohem_threshold: probability of the true class below which a pixel is hard.
        ohem_min_kept: pixels per process that are kept at least.
        optimizer: adamw or sgd (momentum 0.9).
        lr: learning rate at the start; it falls by the poly rule.
        encoder_lr: factor on `lr` for the encoder.
        weight_decay: of the optimizer.
        decay_all: weight decay on biases and normalisation too, or only on convolutions.
        power: of the poly rule.
        lr_warmup: share of the training over which the learning rate first rises from zero.
        clip: largest gradient norm; 0 does not clip.
        accumulate: batches whose gradients make one update.
        amp: off, bf16 or fp16 (with loss scaling).
        compile: networks through torch.compile, which pays on a GPU; warns where it does not work.
        sync_bn: batch normalisation over all processes.
        eval_every: epochs between evaluations.
        seed: of initial weights, data order, views and noise.
        device: auto, cpu, cuda or cuda:N.
        tensorboard: also write TensorBoard event files.
        snapshots: epochs after which the checkpoint is kept, for figures of the training's course.
    """

    protocol: str = "mosaic-32"
    dataset: str = "mosaic"
    data_root: str = ""
    size: tuple[int, ...] = ()
    labeled: int = 32
    draw: int = 0
    split: str = ""
    unlabeled: int = 0
    eval_images: int = 0
    evaluation: str = "whole"
    eval_args: dict = field(default_factory=dict)
    eval_part: typing.Literal["val", "test"] = "val"
    net: str = "light"
    net_args: dict = field(default_factory=dict)
    weights: str = ""
    method: str = "supervised"
    preset: str = "paper"
    method_args: dict = field(default_factory=dict)
    warmup: Count = 0
    epochs: int = 9
    batch: int = 8
    unlabeled_batch: int = 8
    crop: tuple[int, ...] = ()
    augment: typing.Literal["s4", "u2pl", "cps", "ps_mt", "unimatch", "augseg", "dual_teacher"] = (
        "s4"
    )
    resize_base: int = 0
    pad_label: typing.Literal[255, 0] = 255
    scale: tuple[float, float] = (0.75, 1.5)
    outside: typing.Literal["reflect", "void"] = "reflect"
    jitter: float = 0.5
    hue: float = 0.05
    noise: float = 0.15
    sup_loss: typing.Literal["ce", "ohem"] = "ce"
    ohem_threshold: float = 0.7
    ohem_min_kept: int = 100_000
    optimizer: typing.Literal["adamw", "sgd"] = "adamw"
    lr: float = 5e-3
    encoder_lr: float = 1.0
    weight_decay: float = 1e-2
    decay_all: bool = True
    power: float = 0.9
    lr_warmup: float = 0.0
    clip: float = 0.0
    accumulate: int = 1
    amp: typing.Literal["off", "bf16", "fp16"] = "off"
    compile: bool = False
    sync_bn: bool = True
    eval_every: int = 1
    seed: int = 0
    device: str = "auto"
    tensorboard: bool = False
    snapshots: tuple[int, ...] = ()

    def __post_init__(self):
        for name, kind in _kinds(type(self)).items():
            object.__setattr__(self, name, checked(name, getattr(self, name), kind))
        for name, length in (("size", (0, 2)), ("crop", (0, 2)), ("scale", (2,))):
            value = getattr(self, name)
            if len(value) not in length or any(v <= 0 for v in value):
                raise ValueError(f"{name}={list(value)}: give two positive numbers")
        if any(not 1 <= epoch <= self.epochs for epoch in self.snapshots):
            raise ValueError(f"snapshots={list(self.snapshots)}: choose from 1 to {self.epochs}")
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale={list(self.scale)}: give the lower bound first")
        for name in ("epochs", "batch", "unlabeled_batch", "accumulate", "eval_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: choose 1 or more")
        for name in (
            "labeled",
            "draw",
            "unlabeled",
            "eval_images",
            "seed",
            "clip",
            "lr",
            "weight_decay",
            "jitter",
            "lr_warmup",
            "resize_base",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: choose 0 or more")
        own, published = ("scale", "outside", "jitter", "hue"), ("resize_base", "pad_label")
        for f in fields(self):
            if f.name in (published if self.augment == "s4" else own):
                if getattr(self, f.name) != f.default:
                    raise ValueError(
                        f"{f.name}={getattr(self, f.name)!r}: augment={self.augment!r} has no such "
                        f"setting, leave it at {f.default!r}"
                    )

    def to_dict(self) -> dict:
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: dict) -> Config:
        """The inverse of `to_dict`. Raises ValueError for a wrong key or value."""
        valid = [f.name for f in fields(cls)]
        unknown = [key for key in values if key not in valid]
        if unknown:
            raise ValueError(f"unknown key {unknown[0]!r}: choose from {', '.join(valid)}")
        return cls(**values)

    @functools.cached_property  # queues of hundreds of runs ask for it all the time
    def hash(self) -> str:
        """Of the fields that can change a number: not where files lie or what computes.

        Fields at their default do not count, so that a new one leaves older hashes as they are.
        """
        default = type(self)().to_dict()
        values = {k: v for k, v in self.to_dict().items() if k not in NO_NUMBER and v != default[k]}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]

    @property
    def run_id(self) -> str:
        preset = "" if self.preset == "paper" else f"-{self.preset}"
        return f"{self.protocol}-{self.method}{preset}-d{self.draw}-s{self.seed}-{self.hash}"


Share = typing.Annotated[float, (0, 1)]
Count = typing.Annotated[int, (0, math.inf)]


def one_of(name: str, value: str, *valid: str) -> str:
    """`value`, if it is valid. Raises ValueError, naming the valid ones, if not."""
    if value not in valid:
        raise ValueError(f"{name}={value!r}: choose {' or '.join(valid)}")
    return value


def checked(name: str, value: object, kind: object) -> object:
    """`value` as `kind`; int to float and list to tuple are the only conversions.

    A kind with alternatives (`int | None`) is not checked. Raises ValueError for another kind.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        value, (low, high) = checked(name, value, arguments[0]), arguments[1]
        if not low <= value <= high:
            valid = f"{low} or more" if high == math.inf else f"a number from {low} to {high}"
            raise ValueError(f"{name}={value}: choose {valid}")
        return value
    if origin is types.UnionType:
        return value
    if origin is typing.Literal:
        if value not in arguments:
            raise ValueError(f"{name}={value!r}: choose one of {', '.join(map(str, arguments))}")
        return value
    if origin in (tuple, list):
        if not isinstance(value, list | tuple):
            raise ValueError(f"{name}={value!r}: expected a list")
        return tuple(checked(name, v, arguments[0]) for v in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}={value!r}: expected a finite number")
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{name}={value!r}: expected {kind.__name__}, got {type(value).__name__}")
    return dict(value) if kind is dict else value
