"""What every method promises, whatever it does: checked over METHODS and their presets."""

from __future__ import annotations

import inspect
import sys

import pytest
import torch
from conftest import equal
from torch import nn

from s4lib import trainer
from s4lib.build import build_method
from s4lib.losses import IGNORE
from s4lib.method import Batch, Clock, trainable
from s4lib.methods import METHODS
from s4lib.minimizer import Minimizer
from s4lib.trainer import fit

CPU = torch.device("cpu")
CLASSES = 8
PRESETS = [(name, preset) for name, kind in METHODS.items() for preset in kind.presets]
every_preset = pytest.mark.parametrize(("name", "preset"), PRESETS)


class World:
    """A method with its minimizer and random batches to feed it."""

    def __init__(self, config, classes: int = CLASSES):
        self.config = config
        self.method = build_method(config, classes)
        self.minimizer = Minimizer(self.method, config, CPU)

    def batch(self, step: int = 0, size: int = 4, classes: int = CLASSES) -> Batch:
        g = torch.Generator().manual_seed(step)
        images = [torch.randn(size, 3, 32, 32, generator=g) for _ in range(3)]
        label = torch.randint(0, classes, (size, 4, 4), generator=g)
        label = label.repeat_interleave(8, 1).repeat_interleave(8, 2)
        valid = torch.ones(size, 32, 32, dtype=torch.bool)
        unlabeled = size if self.method.uses_unlabeled else 0
        strong = (images[2],) * self.method.strong_views
        return Batch(images[0], label, images[1][:unlabeled], strong, valid[:unlabeled])

    def step(self, batch: Batch, step: int = 0) -> dict[str, torch.Tensor]:
        torch.manual_seed(step)
        clock = Clock(step, 3, 2)
        self.minimizer.begin(clock)
        return self.method.step(batch, clock, self.minimizer)

    def steps(self, count: int = 3) -> list[dict[str, torch.Tensor]]:
        return [self.step(self.batch(i), i) for i in range(count)]


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
    before = {n: weights(net) for n, net in world.method.named_children() if trainable(net)}
    world.steps()
    assert before
    for name, old in before.items():
        net = world.method.get_submodule(name)
        moved = [k for k, p in net.named_parameters() if not torch.equal(p, old[k])]
        assert len(moved) > 0.9 * len(list(net.parameters())), name


@every_preset
def test_frozen_networks_are_moved_by_ema_alone(world, monkeypatch):
    module = sys.modules[type(world.method).__module__]
    frozen = {n: net for n, net in world.method.named_children() if not trainable(net)}
    if hasattr(module, "ema"):
        assert frozen
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

    for _ in range(2):
        networks = list(world.method.networks().values())
        assert len(list(world.method.named_children())) == len(world.method._modules)
        union = set().union(*map(pointers, networks))
        assert len(union) == sum(len(pointers(net)) for net in networks)
        world.steps()


@every_preset
def test_forward_gives_logits_at_input_size(world):
    world.method.eval()
    logits = world.method(torch.randn(2, 3, 40, 24))
    assert logits.shape == (2, CLASSES, 40, 24)
    deployed = world.method.get_submodule(world.method.deployed)
    assert torch.equal(world.method(torch.ones(1, 3, 32, 32)), deployed(torch.ones(1, 3, 32, 32)))


class Killed(Exception):
    """Stands for a kill between two steps."""


@every_preset
def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(
    tiny, tmp_path, name, preset, monkeypatch
):
    monkeypatch.setattr(trainer, "LOG_EVERY", 2)
    config = tiny(method=name, preset=preset)

    def kill(done: int, total: int, text: str) -> None:
        if done == 4:  # one step after the checkpoint
            raise Killed

    fit(config, out=tmp_path / "whole")
    with pytest.raises(Killed):
        fit(config, out=tmp_path / "killed", progress=kill)
    fit(config, out=tmp_path / "killed", resume=True)
    folders = [tmp_path / where / config.run_id for where in ("whole", "killed")]
    states = [torch.load(f / "last.pt", weights_only=True) for f in folders]
    assert states[0]["step"] == states[1]["step"] == 6
    for part in ("method", "minimizer", "best", "last", "sums"):
        assert equal(states[0][part], states[1][part]), part
    assert len(states[0]["method"]) > 10
    lines = [(f / "metrics.jsonl").read_bytes() for f in folders]
    assert lines[0] == lines[1] and lines[0].count(b'"train"') == 3


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
    if "threshold" not in inspect.signature(METHODS[name]).parameters:
        pytest.skip(f"{name} has no threshold")
    world = World(tiny(method=name, preset=preset, method_args={"threshold": 1.1}))
    losses = world.step(world.batch())
    assert losses["kept"] == 0
    assert losses.get("cons", losses.get("unsup")) == 0
    assert torch.isfinite(losses["sup"]) and losses["sup"] > 0


@every_preset
def test_padding_enters_no_loss(tiny, name, preset):
    """With networks that look at one pixel at a time, what padding shows must not matter at all."""
    kind = METHODS[name]
    if not kind.uses_unlabeled:
        pytest.skip(f"{name} sees no unlabeled image")
    config = tiny(method=name, preset=preset)
    results = []
    for value in (0.0, 1e4):
        torch.manual_seed(0)
        world = World.__new__(World)
        world.method = kind(lambda: nn.Conv2d(3, CLASSES, 1), **kind.presets[preset]).train()
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
            strong=tuple(x.masked_fill(padding, value) for x in batch.strong),
            valid=valid,
        )
        losses = [world.step(batch, step) for step in (3, 4)]  # the ramp-up has begun
        results.append((losses, world.method.state_dict()))
    assert equal(*results)
    assert all(torch.isfinite(v) for losses in results[0][0] for v in losses.values())


@pytest.mark.parametrize("name", METHODS)
def test_hyper_parameters_are_keyword_only_typed_explained_and_have_defaults(name):
    kind = METHODS[name]
    build, *rest = inspect.signature(kind).parameters.values()
    assert build.name == "build"
    for p in rest:
        assert p.kind is p.KEYWORD_ONLY and p.default is not p.empty, p
        assert p.annotation is not p.empty, p
        assert p.name in inspect.getdoc(kind), f"{p.name} is not explained"
    assert {key for values in kind.presets.values() for key in values} <= {p.name for p in rest}
    assert "paper" in kind.presets


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_remembers_is_in_its_state_dict(tiny, name):
    """Attributes must not change in a step, unless they are parameters and buffers."""
    world = World(tiny(method=name))

    def plain() -> dict:
        return {k: repr(v) for k, v in vars(world.method).items() if not k.startswith("_")}

    before = plain()
    world.steps()
    assert plain() == before
