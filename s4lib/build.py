"""From a `Config` to what it names: the method with its networks, the data with its split."""

from __future__ import annotations

import hashlib
import inspect
import typing
from pathlib import Path

import torch

from .config import Config, checked
from .data import open_dataset
from .data.images import Images
from .data.splits import Split, split
from .method import Method
from .methods import METHODS
from .nets import build_net


def build_method(config: Config, classes: int) -> Method:
    """The config's method with its networks, initialised by the seed alone.

    Raises:
        ValueError: unknown method, preset, hyper-parameter or network.
    """
    if config.method not in METHODS:
        raise ValueError(f"method={config.method!r}: choose one of {', '.join(METHODS)}")
    kind = METHODS[config.method]
    if config.preset not in kind.presets:
        raise ValueError(f"preset={config.preset!r}: {config.method} has {', '.join(kind.presets)}")
    arguments = {**kind.presets[config.preset], **config.method_args}
    valid = [
        p.name for p in inspect.signature(kind).parameters.values() if p.kind is p.KEYWORD_ONLY
    ]
    unknown = [name for name in arguments if name not in valid]
    if unknown:
        has = ", ".join(valid) or "none"
        raise ValueError(f"method_args has unknown key {unknown[0]!r}: {config.method} has {has}")
    kinds = typing.get_type_hints(kind.__init__)
    arguments = {name: checked(name, value, kinds[name]) for name, value in arguments.items()}
    torch.manual_seed(config.seed)
    method = kind(
        lambda: build_net(config.net, classes, weights=config.weights, **config.net_args),
        **arguments,
    )
    return method.to(memory_format=torch.channels_last).train()  # puts teachers into their mode


def network_of(method: Method) -> torch.nn.Module:
    return next(iter(method.networks().values()))


def open_data(config: Config) -> tuple[Images, Split, Images, range]:
    """(training images, split, evaluation images, their indices) of a config."""
    size = config.size or None
    images = open_dataset(config.dataset, "train", root=config.data_root, size=size)
    chosen = split(images, config.dataset, config.labeled, config.draw)
    if config.unlabeled:
        chosen = Split(chosen.labeled, chosen.unlabeled[: config.unlabeled], chosen.sha256)
    held_out = open_dataset(config.dataset, config.eval_part, root=config.data_root, size=size)
    return images, chosen, held_out, range(len(held_out))[: config.eval_images or None]


def method_source(name: str) -> str:
    """Hash of the method's file: a record made by another version of it is stale."""
    source = Path(inspect.getsourcefile(METHODS[name])).read_bytes()
    return hashlib.sha256(source).hexdigest()[:12]
