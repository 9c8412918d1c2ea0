"""From a `Config` to what it names: the method with its networks, the data with its split."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import re
from pathlib import Path

import torch

from .config import Config
from .data import DATASETS, open_dataset
from .data.images import Images
from .data.splits import Split, split
from .losses import ohem
from .method import Method
from .methods import METHODS
from .nets import SegNet, build_net

HERE = Path(__file__).resolve().parent
DATA = "images splits views families colour loader".split()
CORE = "method losses mixing perturb schedules minimizer trainer evaluate metrics".split()
CORE += "nets architectures encoders decoders".split()


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
    """Fingerprint of the code that decides a run's numbers: the method's file, the dataset's, and
    the core they stand on.

    A record made by other code is stale. Comments, docstrings and white space do not count.
    """
    own = Path(inspect.getsourcefile(METHODS[name]))
    core = (path for path in HERE.glob("*.py") if path.stem in CORE)
    data = (HERE / "data" / f"{stem}.py" for stem in DATA)
    reader = Path(inspect.getsourcefile(DATASETS[dataset]))
    files = [own, *sorted(core), *data, reader]
    return hashlib.sha256("".join(map(_code, files)).encode()).hexdigest()[:12]


@functools.cache
def _code(path: Path) -> str:
    source = path.read_text("utf8")
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):  # a docstring
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return "".join("".join(re.sub(r"(^|\s)#.*", "", line).split()) for line in lines)
