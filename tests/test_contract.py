"""What every method promises, whatever it does: checked over METHODS and their presets."""

from __future__ import annotations

import sys

import pytest
import torch
from conftest import SMALL, equal
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from s4lib import trainer
from s4lib.build import build_method
from s4lib.config import checked
from s4lib.evaluate import evaluated
from s4lib.losses import IGNORE
from s4lib.method import Batch, Clock, Crop, trainable
from s4lib.methods import METHODS
from s4lib.minimizer import Minimizer
from s4lib.trainer import fit

CPU = torch.device("cpu")
CLASSES = 8
EPOCHS = 10  # of one step each, so that warm-ups counted in epochs (PS-MT's 5) come to their end
LAST = EPOCHS - 1
PRESETS = [
    (name, preset)
    for name, kind in METHODS.items()
    for i, (preset, values) in enumerate(kind.presets.items())
    if values not in list(kind.presets.values())[:i]  # another name of the same
]
every_preset = pytest.mark.parametrize(("name", "preset"), PRESETS)


# Whole trainings: one preset of each method, all of the four papers; `make slow` adds the rest.
FOUR = "gta_seg", "ps_mt", "dual_teacher", "gps"
trained_preset = pytest.mark.parametrize(
    ("name", "preset"),
    [
        pytest.param(n, p, marks=() if p == "paper" or n in FOUR else pytest.mark.slow)
        for n, p in PRESETS
    ],
)


class World:
    """A method with its minimizer and random batches to feed it."""

    def __init__(self, config, classes: int = CLASSES):
        self.config = config
        self.method = build_method(config, classes)
        self.minimizer = Minimizer(self.method, config, CPU)

    def batch(self, step: int = 0, size: int = 4, classes: int = CLASSES) -> Batch:
        g = torch.Generator().manual_seed(step)
        images = [torch.randn(size, 3, 32, 32, generator=g) for _ in range(4)]
        label = torch.randint(0, classes, (size, 4, 4), generator=g)
        label = label.repeat_interleave(8, 1).repeat_interleave(8, 2)
        valid = torch.ones(size, 32, 32, dtype=torch.bool)
        unlabeled = size if self.method.uses_unlabeled else 0
        strong = (images[2],) * self.method.strong_views
        strong_view = images[3] if self.method.labeled_strong else None
        batch = images[0], label, images[1][:unlabeled], strong, valid[:unlabeled], strong_view
        weak_label = label.flip(1) if self.method.offline_labels else None
        second = Crop(images[3], strong, valid) if self.method.second_crop else None
        return Batch(*batch, weak_label, second)

    def step(self, batch: Batch, step: int = LAST) -> dict[str, torch.Tensor]:
        torch.manual_seed(step)
        clock = Clock(step, 1, EPOCHS)
        self.minimizer.begin(clock)
        return self.method.step(batch, clock, self.minimizer)

    def steps(self) -> list[dict[str, torch.Tensor]]:
        """A whole training, one step an epoch: every phase of a method has its turn."""
        return [self.step(self.batch(i), i) for i in range(EPOCHS)]


@pytest.fixture
def world(tiny, name, preset):
    return World(tiny(method=name, preset=preset))


def weights(net: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in net.state_dict().items()}


@every_preset
def test_losses_are_finite_detached_scalars(world):
    for losses in world.steps():
        assert losses
        for name, value in losses.items():
            assert value.ndim == 0 and not value.requires_grad and torch.isfinite(value), name


@every_preset
def test_every_trainable_network_moves(world):
    if getattr(world.method, "threshold", None):
        world.method.threshold = 0.0  # a head of pseudo-labels alone learns where one is sure
    before = {n: weights(net) for n, net in world.method.named_children() if trainable(net)}
    world.steps()
    assert before
    for name, old in before.items():
        net = world.method.get_submodule(name)
        moved = [k for k, p in net.named_parameters() if not torch.equal(p, old[k])]
        assert len(moved) > 0.9 * len(list(net.parameters())), name


@every_preset
def test_frozen_networks_are_moved_by_ema_alone(world, name, preset, monkeypatch):
    if METHODS[name].presets[preset].get("teacher_init") == "random":
        pytest.skip(f"{name}, {preset}: teachers are trained before they are averaged")
    module = sys.modules[type(world.method).__module__]
    frozen = {n: net for n, net in world.method.named_children() if not trainable(net)}
    if hasattr(module, "ema"):
        assert frozen or world.config.preset != "paper"  # a control may train what else is averaged
        with monkeypatch.context() as without:
            without.setattr(module, "ema", lambda *arguments: None)
            before = {n: weights(net) for n, net in frozen.items()}
            world.steps()
        for name, net in frozen.items():
            still = dict(net.named_parameters()).keys()
            if name not in world.method.batch_statistics:
                still = before[name].keys()  # in evaluation mode BN statistics rest too
            now = net.state_dict()
            assert all(torch.equal(before[name][key], now[key]) for key in still), name
        before = {n: weights(net) for n, net in frozen.items()}
        world.steps()
        for name, net in frozen.items():
            assert not equal(before[name], weights(net)), name
    for name, net in frozen.items():
        assert name not in world.minimizer.optimizers
        assert all(p.grad is None and not p.requires_grad for p in net.parameters())


@every_preset
def test_a_teacher_normalises_as_its_preset_says(world):
    for name, net in world.method.named_children():
        assert net.training == (trainable(net) or name in world.method.batch_statistics), name


@every_preset
def test_networks_share_no_storage(world):
    def pointers(net: nn.Module) -> set[int]:
        return {value.data_ptr() for value in net.state_dict().values()}

    for step in range(EPOCHS):
        networks = list(world.method.networks().values())
        assert len(list(world.method.named_children())) == len(world.method._modules)
        union = set().union(*map(pointers, networks))
        assert len(union) == sum(len(pointers(net)) for net in networks)
        world.step(world.batch(step), step)


@every_preset
def test_forward_gives_logits_at_input_size(world):
    world.method.eval()
    logits = world.method(torch.randn(2, 3, 40, 24))
    assert logits.shape == (2, CLASSES, 40, 24)
    deployed = evaluated(world.method)[world.method.deployed]
    assert torch.equal(world.method(torch.ones(1, 3, 32, 32)), deployed(torch.ones(1, 3, 32, 32)))


class Killed(Exception):
    """Stands for a kill between two steps."""


@trained_preset
def test_a_run_killed_in_every_phase_is_bit_equal_to_an_uninterrupted_one(
    tiny, tmp_path, name, preset, monkeypatch
):
    monkeypatch.setattr(trainer, "LOG_EVERY", 4)
    config = tiny(method=name, preset=preset, unlabeled=8, epochs=8, eval_every=8)
    deaths = {3, 7, 13}  # each one step after a checkpoint, of sixteen

    def kill(done: int, total: int, text: str) -> None:
        if done in deaths:
            deaths.remove(done)
            raise Killed

    fit(config, out=tmp_path / "whole")
    while deaths:
        with pytest.raises(Killed):
            fit(config, out=tmp_path / "killed", resume=True, progress=kill)
    fit(config, out=tmp_path / "killed", resume=True)
    folders = [tmp_path / where / config.run_id for where in ("whole", "killed")]
    states = [torch.load(f / "last.pt", weights_only=True) for f in folders]
    assert states[0]["step"] == states[1]["step"] == 16
    for part in ("method", "minimizer", "best", "last", "sums"):
        assert equal(states[0][part], states[1][part]), part
    assert len(states[0]["method"]) > 10
    lines = [(f / "metrics.jsonl").read_bytes() for f in folders]
    assert lines[0] == lines[1] and lines[0].count(b'"train"') == 4


@every_preset
def test_an_all_ignored_label_gives_no_nan(world):
    batch = world.batch()
    losses = world.step(batch._replace(label=torch.full_like(batch.label, IGNORE)))
    assert losses["sup"] == 0
    assert all(torch.isfinite(v) for v in losses.values())
    assert all(torch.isfinite(v).all() for v in world.method.state_dict().values())


class NoWaiting(TorchDispatchMode):
    """Raises at whatever makes Python wait for a device to tell it a value."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0].rstrip("_")
        if name in (wait.rstrip("_") for wait in self.WAITS) or name.startswith("_unique"):
            raise AssertionError(f"{func} waits for the device")
        if name.startswith("index") and any(
            isinstance(i, torch.Tensor) and i.dtype == torch.bool
            for arg in args[1:]
            if isinstance(arg, list | tuple)
            for i in arg
        ):
            raise AssertionError(f"{func} with a boolean index waits for the device")
        return func(*args, **(kwargs or {}))


@every_preset
def test_a_step_never_waits_for_the_device(world, monkeypatch):
    def minimize(loss, *nets):
        parameters = [p for net in nets for p in net.parameters()]
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        with torch.no_grad():
            for p, g in zip(parameters, grads, strict=True):
                p.sub_(0 if g is None else 0.01 * g)
        return True

    def forbidden(*arguments):
        raise AssertionError("a tensor is handed to Python")

    batches = [world.batch(i) for i in range(EPOCHS)]
    with monkeypatch.context() as patched:
        for way in ("numpy", "tolist", "__array__"):
            patched.setattr(torch.Tensor, way, forbidden)
        for i, batch in enumerate(batches):
            with NoWaiting():
                world.method.step(batch, Clock(i, 1, EPOCHS), minimize)
    with pytest.raises(AssertionError, match="waits"), NoWaiting():
        float(torch.ones(1).sum())
    with pytest.raises(AssertionError, match="waits"), NoWaiting():
        torch.ones(3)[torch.ones(3) > 0]


@every_preset
def test_a_batch_of_one_works(world):
    losses = world.step(world.batch(size=1))
    assert all(torch.isfinite(v) for v in losses.values())


@every_preset
def test_two_classes_work(tiny, name, preset):
    world = World(tiny(method=name, preset=preset), classes=2)
    losses = world.step(world.batch(classes=2))
    assert all(torch.isfinite(v) for v in losses.values())
    assert world.method(world.batch().image).shape[1] == 2


@every_preset
def test_no_confident_pixel_means_no_unlabeled_loss(tiny, name, preset):
    if "threshold" not in METHODS[name].hyper_parameters():
        pytest.skip(f"{name} has no threshold")
    world = World(tiny(method=name, preset=preset, method_args={"threshold": 1.1}))
    losses = world.step(world.batch())
    if "kept" not in losses:
        pytest.skip(f"{name}, {preset}: every pixel counts, however unsure")
    assert losses["kept"] == 0
    assert losses.get("cons", losses.get("unsup")) == 0
    assert torch.isfinite(losses["sup"]) and losses["sup"] > 0


class Residual(nn.Module):
    """A residual block as timm makes them: `stochastic_depth` skips its branch."""

    def __init__(self):
        super().__init__()
        self.conv, self.drop_path = nn.Conv2d(4, 4, 1), None

    def forward(self, x):
        branch = self.conv(x)
        return x + (self.drop_path(branch) if self.drop_path else branch)


class Pixelwise(nn.Module):
    """A SegNet that looks at one pixel at a time."""

    mean = std = (0.5, 0.5, 0.5)

    def __init__(self, **changes):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 1), Residual(), Residual())
        self.decoder = nn.Conv2d(4, 4, 1)
        self.classifier = nn.Conv2d(4, CLASSES, 1)
        self.representation = nn.Conv2d(4, 4, 1) if changes.get("representation") else None
        self.align_corners = False

    def encode(self, image):
        return (self.encoder(image),)

    def fuse(self, features):
        return self.decoder(*features)

    def classify(self, fused, size):
        return self.classifier(fused)

    def forward(self, image):
        return self.classify(self.fuse(self.encode(image)), image.shape[-2:])


@every_preset
def test_padding_enters_no_loss(tiny, name, preset):
    """With networks that look at one pixel at a time, what padding shows must not matter at all."""
    kind = METHODS[name]
    if not kind.uses_unlabeled:
        pytest.skip(f"{name} sees no unlabeled image")
    if kind.presets[preset].get("padding"):
        pytest.skip(f"{name}, {preset}: padding takes part, as in the released code")
    config = tiny(method=name, preset=preset)
    results = []
    for value in (0.0, 1e4):
        torch.manual_seed(0)
        world = World.__new__(World)
        world.method = kind(Pixelwise, **{**kind.presets[preset], **SMALL.get(name, {})}).train()
        world.minimizer = Minimizer(world.method, config, CPU)
        batch = world.batch()
        valid = batch.valid.clone()
        valid[:2, :20, 5:] = False  # not the same in every image: mixing must mix it too
        valid[2, 8:] = False
        padding = ~valid[:, None]
        batch = batch._replace(
            image=batch.image.masked_fill(padding, value),
            label=torch.where(valid, batch.label, IGNORE),
            weak=batch.weak.masked_fill(padding, value),
            image_strong=world.method.labeled_strong
            and batch.image_strong.masked_fill(padding, value),
            strong=tuple(x.masked_fill(padding, value) for x in batch.strong),
            valid=valid,
        )
        losses = [world.step(batch, step) for step in range(EPOCHS)]
        results.append((losses, world.method.state_dict()))
    assert equal(*results)
    assert all(torch.isfinite(v) for losses in results[0][0] for v in losses.values())


@pytest.mark.parametrize("name", METHODS)
def test_hyper_parameters_are_typed_explained_and_have_valid_defaults(name):
    kind = METHODS[name]
    known = kind.hyper_parameters()
    for key, (type_, default, meaning) in known.items():
        assert checked(key, default, type_) == default
        assert len(meaning.split()) >= 2, f"{key} is not explained"
    assert "paper" in kind.presets
    for values in kind.presets.values():
        for key, value in values.items():
            assert checked(key, value, known[key].kind) == value


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_remembers_is_in_its_state_dict(tiny, name):
    """Attributes must not change in a step, unless they are parameters and buffers."""
    world = World(tiny(method=name))

    def plain() -> dict:
        return {k: repr(v) for k, v in vars(world.method).items() if not k.startswith("_")}

    before = plain()
    world.steps()
    assert plain() == before
