"""Trained runs, to evaluate, to look at and to use: load, predict maps, write them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from . import distributed
from .build import build_method, network_of
from .config import Config, one_of
from .data import DATASETS
from .data.images import SUFFIXES, open_image
from .evaluate import evaluated, normaliser
from .method import Method
from .run_folder import snapshot
from .weights import read_tensors


@dataclass(frozen=True)
class Trained:
    """A trained method, in evaluation mode, with what is needed to show it images."""

    config: Config
    method: Method
    device: torch.device
    classes: tuple[str, ...]
    colors: np.ndarray
    training: dict = field(default_factory=dict)  # step, steps in all, optimizers; none in "best"

    def normalise(self, image: Tensor) -> Tensor:
        net = network_of(self.method)
        return normaliser(net.mean, net.std, self.device)(image)

    @torch.no_grad()
    def probs(self, image: Tensor, network: str = "") -> Tensor:
        """Softmax (B, K, H, W) of uint8 images (B, 3, H, W), by the deployed or a named network."""
        net = evaluated(self.method)[network] if network else self.method
        return net(self.normalise(image)).float().softmax(1).cpu()

    def predict(self, file: Path) -> np.ndarray:
        """Class indices (H, W) uint8 of an image file at its size, computed at the trained one."""
        image = open_image(file)
        height, width = image.height, image.width
        if self.config.size:
            image = image.resize(self.config.size[::-1], Image.Resampling.BOX)
        probs = self.probs(torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())[None])
        return (
            F.interpolate(probs, (height, width), mode="bilinear")[0]
            .argmax(0)
            .numpy()
            .astype(np.uint8)
        )


def load(folder: str | Path, checkpoint: str | int = "last", device: str = "auto") -> Trained:
    """The trained method of a run's folder.

    Args:
        checkpoint: "last", "best", or an epoch of which the run kept a snapshot.

    Raises:
        ValueError: no such run, or a checkpoint that is corrupt or does not fit.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: not the folder of a run (no config.json in it)")
    try:
        config = Config.from_dict(json.loads((folder / "config.json").read_text()))
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / 'config.json'}: not JSON ({error})") from error
    if isinstance(checkpoint, int):
        file = snapshot(folder, checkpoint)
    else:
        file = folder / f"{one_of('checkpoint', checkpoint, 'last', 'best')}.pt"
    state = read_tensors(file)
    if checkpoint == "best":
        state = {"method": state}  # the weights alone
    # Its own weights come from the checkpoint, so none are fetched to begin with.
    net_args = {key: value for key, value in config.net_args.items() if key != "pretrained"}
    bare = replace(config, weights="", net_args=net_args)
    classes, colors = _classes(folder, config.dataset)
    method = build_method(bare, len(classes))
    try:
        method.load_state_dict(state["method"])
    except (RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file}: does not fit {config.method} ({str(error).splitlines()[0]})"
        ) from error
    where = distributed.start(device)
    training = {key: state[key] for key in ("step", "of", "minimizer") if key in state}
    return Trained(config, method.to(where).eval(), where, classes, colors, training)


def _classes(folder: Path, dataset: str) -> tuple[tuple[str, ...], np.ndarray]:
    if not (folder / "classes.json").is_file():  # a run of before there was one
        return DATASETS[dataset].classes, DATASETS[dataset].colors
    found = json.loads((folder / "classes.json").read_text())
    return tuple(found["classes"]), np.array(found["colors"], dtype=np.uint8)


def image_files(inputs: Sequence[str]) -> list[Path]:
    """Files, and images in folders. Raises ValueError if one is missing or none is found."""
    files: list[Path] = []
    for path in map(Path, inputs):
        if not path.exists():
            raise ValueError(f"{path}: no such file or folder")
        files += (
            sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
            if path.is_dir()
            else [path]
        )
    if not files:
        endings = " ".join(sorted(SUFFIXES))
        raise ValueError(f"{', '.join(inputs)}: no image found; valid endings: {endings}")
    return files


def write_maps(label: np.ndarray, colors: np.ndarray, out: Path, stem: str) -> None:
    """Write `stem`.png (class indices, with the palette) and `stem`_color.png (RGB)."""
    out.mkdir(parents=True, exist_ok=True)
    index = Image.fromarray(label)
    index.putpalette(colors.flatten().tolist())
    index.save(out / f"{stem}.png")
    Image.fromarray(colors[label]).save(out / f"{stem}_color.png")
