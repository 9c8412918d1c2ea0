"""What every method promises, whatever it does: checked over METHODS and their presets."""

from __future__ import annotations

import copy
import functools
import sys
from contextlib import contextmanager

import pytest
import torch
from conftest import PRESETS, SMALL, Pixelwise, equal, tiny_config, weights
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from s4lib import trainer
from s4lib.build import build_method
from s4lib.config import checked
from s4lib.evaluate import evaluated
from s4lib.losses import IGNORE
from s4lib.method import Batch, Clock, Crop, Method, trainable
from s4lib.methods import METHODS
from s4lib.minimizer import Minimizer
from s4lib.trainer import fit

CPU = torch.device("cpu")
CLASSES = 8
EPOCHS = 6  # of one step each: warm-ups and turns last an epoch, GCT's ramp 5
LAST = EPOCHS - 1
RESUMED = 1, 4  # epochs after which a training is gone on with: of the warm-up, and of later ones
# Of a module's scope, so that a preset's tests come one after the other and share its `training`.
every_preset = pytest.mark.parametrize(("name", "preset"), PRESETS, scope="module")


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

    def state(self) -> dict:
        """What a checkpoint keeps of them."""
        state = {"method": self.method.state_dict(), "minimizer": self.minimizer.state_dict()}
        return copy.deepcopy(state)

    def step(self, batch: Batch, step: int = LAST) -> dict[str, torch.Tensor]:
        torch.manual_seed(step)
        clock = Clock(step, 1, EPOCHS)
        self.minimizer.begin(clock)
        return self.method.step(batch, clock, self.minimizer)


@functools.cache
def base_name(func) -> str:
    """`add` of aten.add_.Tensor."""
    return func.__name__.split(".")[0].rstrip("_")


class Waits(TorchDispatchMode):
    """Notes whatever makes Python wait for a device to tell it a value."""

    WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "equal"}

    def __init__(self):
        super().__init__()
        self.found: list[str] = []
        self.watching = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.watching:
            name = base_name(func)
            if name in self.WAITS or name.startswith("_unique"):
                self.found.append(f"{func} waits for the device")
            if name.startswith("index") and any(
                isinstance(i, torch.Tensor) and i.dtype == torch.bool
                for arg in args[1:]
                if isinstance(arg, list | tuple)
                for i in arg
            ):
                self.found.append(f"{func} with a boolean index waits for the device")
        return func(*args, **(kwargs or {}))

    @contextmanager
    def looking_away(self):
        self.watching, before = False, self.watching
        try:
            yield
        finally:
            self.watching = before

    @contextmanager
    def patched(self):
        """Tensors that are handed to Python as arrays or lists are noted too."""

        def noting(way, real):
            def note(*arguments, **options):
                if self.watching:
                    self.found.append(f"{way} hands a tensor to Python")
                return real(*arguments, **options)

            return note

        with self, pytest.MonkeyPatch.context() as patch:
            for way in ("numpy", "tolist", "__array__"):
                patch.setattr(torch.Tensor, way, noting(way, getattr(torch.Tensor, way)))
            yield


class Training:
    """A whole training of a preset, one step an epoch, so that every phase has its turn; and what
    the tests below ask about it, noted meanwhile."""

    def __init__(self, name: str, preset: str):
        self.world = world = World(tiny_config(method=name, preset=preset))
        self.method, self.waits = world.method, Waits()
        children = dict(world.method.named_children())
        self.trained = [n for n, net in children.items() if trainable(net)]
        self.frozen = [n for n in children if n not in self.trained]
        self.modes = {n: net.training for n, net in children.items()}
        self.statistics = world.method.batch_statistics
        self.before = {n: weights(net) for n, net in children.items()}
        self.attributes = [plain(world.method)]
        self.storages = [storages(world.method)]
        self.losses: list[dict[str, torch.Tensor]] = []
        self.states: dict[int, dict] = {}
        self.strays: set[str] = set()  # frozen networks that moved beside `ema`
        self.seen = self.look()
        self.module = sys.modules[type(world.method).__module__]
        with pytest.MonkeyPatch.context() as patch:
            if hasattr(self.module, "ema"):
                patch.setattr(self.module, "ema", self.between_looks(self.module.ema))
            for optimizer in world.minimizer.optimizers.values():  # it waits on a CPU alone
                optimizer.register_step_pre_hook(lambda *_: setattr(self.waits, "watching", False))
                optimizer.register_step_post_hook(lambda *_: setattr(self.waits, "watching", True))
            for step in range(EPOCHS):
                batch = world.batch(step)
                with self.waits.patched():
                    self.losses.append(world.step(batch, step))
                self.compare()
                self.storages.append(storages(world.method))
                self.attributes.append(plain(world.method))
                if step + 1 in (*RESUMED, EPOCHS):
                    self.states[step + 1] = world.state()
        self.after = {n: weights(net) for n, net in children.items()}

    def look(self) -> dict[str, dict[str, torch.Tensor]]:
        """What of each frozen network rests: all, in training mode all but BN statistics."""
        found = {}
        for name in self.frozen:
            net = self.method.get_submodule(name)
            moving = [key for key, _ in net.named_buffers()] if name in self.statistics else []
            found[name] = {k: v for k, v in weights(net).items() if k not in moving}
        return found

    def compare(self) -> None:
        now = self.look()
        self.strays |= {name for name in self.frozen if not equal(self.seen[name], now[name])}

    def between_looks(self, ema):
        def watched(*arguments, **options):
            with self.waits.looking_away():
                self.compare()
            ema(*arguments, **options)
            with self.waits.looking_away():
                self.seen = self.look()

        return watched


def plain(method: Method) -> dict[str, str]:
    """Attributes that are no parameters and no buffers."""
    return {k: repr(v) for k, v in vars(method).items() if not k.startswith("_")}


def storages(method: Method) -> list[set[int]]:
    """Of each network, where its weights lie."""
    networks = method.networks().values()
    return [{value.data_ptr() for value in net.state_dict().values()} for net in networks]


@pytest.fixture(scope="module")
def training(name, preset):
    return Training(name, preset)


@pytest.fixture
def world(tiny, name, preset):
    return World(tiny(method=name, preset=preset))


@every_preset
def test_losses_are_finite_detached_scalars(training):
    assert len(training.losses) == EPOCHS
    for losses in training.losses:
        assert losses
        for name, value in losses.items():
            assert value.ndim == 0 and not value.requires_grad and torch.isfinite(value), name


@every_preset
def test_every_trainable_network_moves(training):
    after = training.after
    if getattr(training.method, "threshold", None):
        # A head of pseudo-labels alone learns where one is sure: one more step, of a copy.
        world = copy.deepcopy(training.world)
        world.method.threshold = 0.0
        world.step(world.batch(LAST))
        after = {name: net.state_dict() for name, net in world.method.named_children()}
    assert training.trained
    for name in training.trained:
        old, new = training.before[name], after[name]
        keys = [key for key, _ in training.method.get_submodule(name).named_parameters()]
        moved = [key for key in keys if not torch.equal(old[key], new[key])]
        assert len(moved) > 0.9 * len(keys), name


@every_preset
def test_frozen_networks_are_moved_by_ema_alone(training, name, preset):
    if METHODS[name].presets[preset].get("teacher_init") == "random":
        pytest.skip(f"{name}, {preset}: teachers are trained before they are averaged")
    if hasattr(training.module, "ema"):
        assert training.frozen or preset != "paper"  # a control may train what else is averaged
        for name in training.frozen:
            assert name not in training.strays, name
            old, new = training.before[name], training.after[name]
            keys = [key for key, _ in training.method.get_submodule(name).named_parameters()]
            assert any(not torch.equal(old[key], new[key]) for key in keys), f"{name} rests"
    for name in training.frozen:
        assert name not in training.world.minimizer.optimizers
        net = training.method.get_submodule(name)
        assert all(p.grad is None and not p.requires_grad for p in net.parameters())


@every_preset
def test_a_training_resumed_in_every_phase_is_bit_equal_to_an_uninterrupted_one(
    training, tiny, name, preset
):
    for start, end in zip(RESUMED, (*RESUMED[1:], EPOCHS), strict=True):
        world = World(tiny(method=name, preset=preset, seed=1))
        world.method.load_state_dict(training.states[start]["method"])
        world.minimizer.load_state_dict(training.states[start]["minimizer"])
        losses = [world.step(world.batch(step), step) for step in range(start, end)]
        assert equal(losses, training.losses[start:end]), f"losses from step {start}"
        found, wanted = world.state(), training.states[end]
        for part in wanted:
            assert equal(found[part], wanted[part]), f"{part} from step {start}"


@every_preset
def test_a_teacher_normalises_as_its_preset_says(training):
    for name, on in training.modes.items():
        assert on == (name in training.trained or name in training.statistics), name


@every_preset
def test_networks_share_no_storage(training):
    assert len(training.before) == len(training.method._modules)
    for step, networks in enumerate(training.storages):
        assert len(set().union(*networks)) == sum(map(len, networks)), f"after {step} steps"


@every_preset
def test_forward_gives_logits_at_input_size(training):
    method = copy.deepcopy(training.method).eval()
    logits = method(torch.randn(2, 3, 40, 24))
    assert logits.shape == (2, CLASSES, 40, 24)
    deployed = evaluated(method)[method.deployed]
    assert torch.equal(method(torch.ones(1, 3, 32, 32)), deployed(torch.ones(1, 3, 32, 32)))


@every_preset
def test_a_step_never_waits_for_the_device(training):
    assert training.waits.found == []


@pytest.mark.parametrize(
    ("wait", "words"),
    [
        (lambda x: float(x.sum()), "_local_scalar_dense"),
        (lambda x: x[x > 0], "boolean index"),
        (lambda x: x.tolist(), "tolist"),
    ],
)
def test_what_waits_is_noted(wait, words):
    waits, x = Waits(), torch.ones(3)
    with waits.patched():
        x.add(x).sum()
        with waits.looking_away():
            wait(x)
        assert waits.found == []
        wait(x)
    assert any(words in found for found in waits.found)


@every_preset
def test_what_a_method_remembers_is_in_its_state_dict(training):
    """Attributes must not change in a step, unless they are parameters and buffers."""
    for step, attributes in enumerate(training.attributes):
        assert attributes == training.attributes[0], f"after {step} steps"


@every_preset
def test_an_all_ignored_label_gives_no_nan(world):
    batch = world.batch()
    losses = world.step(batch._replace(label=torch.full_like(batch.label, IGNORE)))
    assert losses["sup"] == 0
    assert all(torch.isfinite(v) for v in losses.values())
    assert all(torch.isfinite(v).all() for v in world.method.state_dict().values())


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


class Residuals(Pixelwise):
    """Its encoder has residual blocks, and it may have a representation head."""

    def __init__(self, **changes):
        super().__init__(CLASSES)
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 1), Residual(), Residual())
        self.decoder = nn.Conv2d(4, 4, 1)
        self.classifier = nn.Conv2d(4, CLASSES, 1)
        self.representation = nn.Conv2d(4, 4, 1) if changes.get("representation") else None


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
        world.method = kind(Residuals, **{**kind.presets[preset], **SMALL.get(name, {})}).train()
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
    for values in ({}, *kind.presets.values()):
        for key in {"warmup", "warmup_epochs", "copy_epochs", "period"} & known.keys():
            assert values.get(key, known[key].default) < EPOCHS / 2, "let EPOCHS see its end"


class Killed(Exception):
    """Stands for a kill between two steps."""


@pytest.mark.slow  # resumed from memory they are above
@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_a_run_killed_in_every_phase_is_bit_equal_to_an_uninterrupted_one(
    tiny, tmp_path, name, preset, monkeypatch
):
    monkeypatch.setattr(trainer, "LOG_EVERY", 4)
    small = dict(size=[16, 16], batch=2, unlabeled_batch=2, unlabeled=4)
    config = tiny(method=name, preset=preset, epochs=5, eval_every=5, **small)
    deaths = {3, 9}  # one step after the checkpoints of the first and the fourth of five epochs

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
    assert states[0]["step"] == states[1]["step"] == 10
    for part in ("method", "minimizer", "best", "last", "sums"):
        assert equal(states[0][part], states[1][part]), part
    assert len(states[0]["method"]) > 10
    lines = [(f / "metrics.jsonl").read_bytes() for f in folders]
    assert lines[0] == lines[1] and lines[0].count(b'"train"') == 2
