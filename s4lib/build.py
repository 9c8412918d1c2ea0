"""From a `Config` to what it names: the method with its networks, the data with its split."""

from __future__ import annotations

import functools

import torch

from .config import Config
from .data import DATASETS, open_dataset
from .data.images import Images
from .data.splits import Split, split
from .fingerprint import fingerprint
from .losses import ohem
from .method import Method
from .methods import METHODS
from .nets import SegNet, build_net


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
    if "weights" in config.net_args:
        raise ValueError("net_args has key 'weights', which is an option of its own: weights=FILE")
    torch.manual_seed(config.seed)

    def build(**changes) -> SegNet:
        given = {"weights": config.weights, **config.net_args, **changes}
        return build_net(config.net, classes, **given)

    method = kind(build, **arguments)
    if config.sup_loss == "ohem":
        limits = {"threshold": config.ohem_threshold, "min_kept": config.ohem_min_kept}
        method.criterion = functools.partial(ohem, **limits)
    return method.to(memory_format=torch.channels_last).train()  # puts teachers into their mode


def network_of(method: Method) -> torch.nn.Module:
    return next(iter(method.networks().values()))


def open_data(config: Config) -> tuple[Images, Split, Images, range]:
    """(training images, split, evaluation images, their indices) of a config."""
    size = config.size or None
    images = open_dataset(config.dataset, "train", root=config.data_root, size=size)
    wanted = config.labeled, config.draw, config.unlabeled, config.split
    chosen = split(images, config.dataset, *wanted, root=config.data_root)
    held_out = open_dataset(config.dataset, config.eval_part, root=config.data_root, size=size)
    indices = range(len(held_out))[: config.eval_images or None]
    held_out.require_annotations(indices)
    return images, chosen, held_out, indices


def method_source(name: str, dataset: str) -> str:
    """Fingerprint of the code that decides the numbers of a run: training, method and dataset.

    A record made by other code is stale.
    """
    kinds = METHODS[name], DATASETS[dataset]
    own = [(kind.__module__.partition(".")[2], kind.__name__) for kind in kinds]
    return fingerprint(("trainer", "fit"), *own)
