"""Shared pieces: tiny configs, a synthetic CamVid in both layouts, one tiny trained run."""

from __future__ import annotations

import copy
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: one thread adds in one order

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from s4lib import build
from s4lib.config import Config
from s4lib.data.camvid import CamVid
from s4lib.data.mosaic import Mosaic
from s4lib.methods import METHODS
from s4lib.protocols import PROTOCOLS

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"

torch.set_num_threads(1)


# A run of a second: 3 steps an epoch, 2 epochs, mosaic at 32 x 32, evaluated on 6 images.
TINY = {
    "net": "tiny",
    "size": [32, 32],
    "labeled": 8,
    "unlabeled": 12,
    "eval_images": 6,
    "epochs": 2,
    "eval_every": 1,
    "batch": 4,
    "unlabeled_batch": 4,
    "device": "cpu",
}


# What makes a method of many or large parts small enough for tests.
SMALL = {
    "cct": dict.fromkeys(["dropout", "cutout", "context", "objects", "drop", "noise"], 1),
    "gct": {"detector_width": 2},
}


# By default each method's `paper` and all presets of the four papers; `make slow` adds the rest.
FOUR = "gta_seg", "ps_mt", "dual_teacher", "gps"
PRESETS = [
    pytest.param(name, preset, marks=[] if preset == "paper" or name in FOUR else pytest.mark.slow)
    for name, kind in METHODS.items()
    for i, (preset, values) in enumerate(kind.presets.items())
    if values not in list(kind.presets.values())[:i]  # another name of the same
]


def tiny_config(**changes) -> Config:
    small = SMALL.get(changes.get("method"))
    if small:
        changes["method_args"] = {**small, **changes.get("method_args", {})}
    return Config.from_dict({"protocol": "mosaic-32", **PROTOCOLS["mosaic-32"], **TINY, **changes})


@pytest.fixture
def tiny():
    return tiny_config


@pytest.fixture(autouse=True)
def mosaic_drawn_once(monkeypatch):
    """Draw each mosaic image once per test process: most tests want the same ones."""
    monkeypatch.setattr(Mosaic, "read", read_once)


DRAWN: dict[tuple, tuple[np.ndarray, np.ndarray]] = {}
DRAW = Mosaic.read


def read_once(images: Mosaic, index: int) -> tuple[np.ndarray, np.ndarray]:
    key = images.part, index, images.size
    if key not in DRAWN:
        DRAWN[key] = DRAW(images, index)
    return DRAWN[key]


@pytest.fixture(autouse=True)
def networks_built_once(monkeypatch):
    """Build each tiny network once per test process; later ones are copies of it."""
    monkeypatch.setattr(build, "build_net", build_once)


BUILT: dict[tuple, tuple[nn.Module, torch.Tensor]] = {}
BUILD = build.build_net


def build_once(name: str, classes: int, *, weights: str | None = None, **changes) -> nn.Module:
    """The weights, and what is left of the generator, that building it would give."""
    if name != "tiny" or weights:
        return BUILD(name, classes, weights=weights, **changes)
    before = torch.get_rng_state()
    key = classes, repr(sorted(changes.items())), before.numpy().tobytes()
    if key not in BUILT:
        net = BUILD(name, classes, **changes)
        BUILT[key] = net, torch.get_rng_state()
    net, after = BUILT[key]
    torch.set_rng_state(after)
    return copy.deepcopy(net)


@pytest.fixture
def shared():
    """The folder of reference data beside the checkout; tests that need it are skipped without."""

    def find(*parts: str) -> Path:
        path = SHARED.joinpath(*parts)
        if not path.exists():
            pytest.skip(
                f"needs ../shared/{'/'.join(parts)}, which does not lie beside this checkout"
            )
        return path

    return find


@pytest.fixture
def golden(shared):
    """Numeric arrays of a file of ../shared/reference/golden, as tensors."""

    def load(name: str) -> dict:
        with np.load(shared("reference", "golden", name)) as arrays:
            return {
                key: torch.from_numpy(np.asarray(arrays[key]))
                for key in arrays.files
                if arrays[key].dtype.kind in "iufb"
            }

    return load


# Tolerances of the golden arrays' README, of losses and of gradients.
LOSS = {"rtol": 1e-5, "atol": 1e-6}
GRADIENT = {"rtol": 1e-4, "atol": 1e-7}


class Pixelwise(nn.Module):
    """A SegNet of 1 x 1 convolutions: what it says of a pixel depends on that pixel alone."""

    mean = std = (0.5, 0.5, 0.5)
    align_corners = False

    def __init__(self, classes: int = 2, **changes):
        super().__init__()
        self.encoder, self.decoder = nn.Conv2d(3, 3, 1), nn.Identity()
        self.classifier = nn.Conv2d(3, classes, 1)
        self.changes = changes

    def encode(self, image):
        return (self.encoder(image),)

    def fuse(self, features):
        return self.decoder(*features)

    def classify(self, fused, size):
        return self.classifier(fused)

    def forward(self, image):
        return self.classify(self.fuse(self.encode(image)), image.shape[-2:])


def assert_refused(words: list[str], call, *arguments: object, **options: object) -> None:
    """The call raises a ValueError of one line that has all the words."""
    with pytest.raises(ValueError) as error:
        call(*arguments, **options)
    said = str(error.value)
    assert "\n" not in said
    assert all(word in said for word in words), said


def equal(a: object, b: object) -> bool:
    """Bit-equality of nested containers of tensors."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def weights(net: nn.Module) -> dict[str, torch.Tensor]:
    """A copy that later steps leave alone."""
    return {key: value.clone() for key, value in net.state_dict().items()}


def write_camvid(root: Path, *, ending: str = ".png", prefix: str = "", count: int = 6) -> Path:
    """A folder in CamVid's layout: `count` frames of 24 x 18 pixels per part, all classes, void."""
    for number, part in enumerate(("train", "val", "test")):
        (root / part).mkdir(parents=True)
        (root / f"{part}annot").mkdir()
        lines = []
        for i in range(count):
            rng = np.random.default_rng([number, i])
            label = np.kron(rng.permutation(12).reshape(3, 4), np.ones((6, 6))).astype(np.uint8)
            image = Image.fromarray(
                np.append(CamVid.colors, [[0, 0, 0]], 0).astype(np.uint8)[label]
            )
            name = f"frame_{i:03d}"
            image.save(root / part / f"{name}{ending}", **JPEG.get(ending, {}))
            Image.fromarray(label).save(root / f"{part}annot" / f"{name}.png")
            lines.append(f"{prefix}{part}/{name}{ending} {prefix}{part}annot/{name}.png")
        (root / f"{part}.txt").write_text("\n".join(lines) + "\n")
    return root


JPEG = {".jpg": {"quality": 100, "subsampling": 0}}


@pytest.fixture
def camvid(tmp_path) -> Path:
    """A synthetic CamVid, .jpg frames and plain list files."""
    return write_camvid(tmp_path / "camvid", ending=".jpg")


@pytest.fixture
def tutorial_camvid(tmp_path) -> Path:
    """A synthetic CamVid as the SegNet tutorial ships it: .png, paths of its author's machine."""
    return write_camvid(tmp_path / "tutorial", prefix="/SegNet/CamVid/")


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory) -> Path:
    """The folder of one finished tiny run of mean_teacher (do not write into it)."""
    from s4lib.trainer import fit

    out = tmp_path_factory.mktemp("trained")
    config = tiny_config(method="mean_teacher")
    fit(config, out=out)
    return out / config.run_id


@pytest.fixture
def refused(capsys):
    """Run `s4 ...` in this process; assert exit code 2 and one line on stderr; return that line.

    A run that has `begun` may have shown its progress before.
    """
    from s4lib.cli import main

    def run(*arguments: str, begun: bool = False) -> str:
        capsys.readouterr()
        assert main([str(a) for a in arguments]) == 2
        error = capsys.readouterr().err
        *before, last = error.splitlines()
        assert last.startswith("s4: "), error
        assert len(before) <= begun and not any(line.startswith("s4: ") for line in before), error
        return last

    return run
