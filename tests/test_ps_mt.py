"""PS-MT: its losses and ensemble against hand-made and measured numbers, its turns and phases."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import GRADIENT, LOSS, Pixelwise, equal, weights
from torch import nn

from s4lib.build import build_method
from s4lib.evaluate import evaluated
from s4lib.losses import IGNORE, ce, pseudo_label
from s4lib.method import Batch, Clock
from s4lib.methods import ps_mt
from s4lib.methods.ps_mt import PSMT, ensemble
from s4lib.trainer import fit


def blank(**changes) -> Pixelwise:
    """Its features are the image, its logits zero."""
    net = Pixelwise(**changes)
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    net.encoder.weight.data[:, :, 0, 0] = torch.eye(3)
    return net


def batch_of(weak: torch.Tensor, classes: int = 2) -> Batch:
    """The labeled images are of class 0; all views are the weak one."""
    valid = torch.ones(len(weak), *weak.shape[-2:], dtype=torch.bool)
    return Batch(weak, torch.zeros_like(valid, dtype=torch.int64), weak, (weak,), valid, weak)


def random_batch(size: int = 4, classes: int = 8) -> Batch:
    g = torch.Generator().manual_seed(0)
    images = [torch.randn(size, 3, 32, 32, generator=g) for _ in range(4)]
    label = torch.randint(0, classes, (size, 32, 32), generator=g)
    valid = torch.ones(size, 32, 32, dtype=torch.bool)
    return Batch(images[0], label, images[1], (images[2],), valid, images[3])


class Update:
    """A `minimize` that updates by gradient descent and remembers losses and gradients."""

    def __init__(self, lr: float = 0.1):
        self.lr, self.losses, self.grads = lr, [], []

    def __call__(self, loss, *nets):
        parameters = [p for net in nets for p in net.parameters()]
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        for p, g in zip(parameters, grads, strict=True):
            p.data -= 0 if g is None else self.lr * g
        self.losses.append(loss.detach())
        self.grads.append(grads)
        return True


@pytest.fixture
def method(tiny):
    """A method on the tiny network, by preset and hyper-parameters."""

    def build(preset: str = "paper", **arguments) -> PSMT:
        return build_method(tiny(method="ps_mt", preset=preset, method_args=arguments), 8)

    return build


# What the paper says


def hand_made(**arguments) -> PSMT:
    """Logits of the teachers ln 3 and 3 ln 3 times the first channel, of the student zero."""
    method = PSMT(blank, cutmix=False, **arguments).train()
    for net, factor in zip(method.teachers, (1, 3), strict=True):
        net.classifier.weight.data[0, 0] = factor * math.log(3)
    return method


def test_eq_conf_ce_weighs_by_confidence_and_divides_by_the_number_kept():
    """One half is black (0.5, below 0.6), the other has mean logit 2 ln 3, probability 0.9."""
    weak = torch.zeros(2, 3, 4, 4)
    weak[..., 2:] = 1
    losses = hand_made().step(batch_of(weak), Clock(0, 10, 20), Update())
    assert losses["kept"] == 0.5
    assert float(losses["unsup"]) == pytest.approx(0.9 * math.log(2), rel=1e-6)
    assert float(losses["sup"]) == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize("ramp", ["gaussian", "cosine"])
def test_eq_total_loss_ramps_up_over_twelve_epochs_after_the_warm_up(golden, ramp):
    """psmt_rampup.npz: 1.5 times the curve; sigmoid_rampup is the supplementary's Gaussian."""
    g = golden("psmt_rampup.npz")
    curve = g[{"gaussian": "sigmoid_rampup_f64", "cosine": "cosine_rampup_f64"}[ramp]]
    weak = torch.ones(1, 3, 2, 2)
    for i in (0, 1, 37, 60, 119, 120, 149):
        update = Update()
        method = hand_made(ramp=ramp, warmup_epochs=3)
        losses = method.step(batch_of(weak), Clock(30 + i, 10, 40), update)
        weight = (update.losses[0] - losses["sup"]) / losses["unsup"]
        assert float(weight) == pytest.approx(float(curve[i]), abs=1e-6)


def test_conf_ce_is_that_of_ps_mt(golden):
    """psmt_semi_ce.npz: loss 1e-5, gradient 1e-4; three thresholds; nothing kept gives zero."""
    g = golden("psmt_semi_ce.npz")

    def conf_ce(case: str, threshold: float):
        logits = g[f"{case}_student_logits"].clone().requires_grad_()
        label, confidence = pseudo_label(g[f"{case}_target_logits"])
        keep = confidence >= threshold
        loss = ce(logits, label, keep=keep, weight=confidence)
        return loss.detach(), torch.autograd.grad(loss, logits)[0], keep.sum()

    for case in ("mix", "none"):
        loss, grad, passed = conf_ce(case, float(g["threshold"]))
        torch.testing.assert_close(loss, g[f"{case}_loss"], **LOSS)
        torch.testing.assert_close(grad, g[f"{case}_grad"], **GRADIENT)
        assert passed == g[f"{case}_n_pass"]
    for percent in ("00", "60", "90"):
        loss, _, _ = conf_ce("sweep", int(percent) / 100)
        torch.testing.assert_close(loss, g[f"sweep_loss_{percent}"], **LOSS)


def test_eq_ensemble_is_the_mean_of_logits():
    core, assist = (torch.tensor(x).view(1, 3, 1, 1) for x in ([5.0, 1, 0], [0.0, 2, 3]))
    assert ensemble(core, assist).flatten().tolist() == [2.5, 1.5, 1.5]


def test_seven_classes_of_the_assistant_count_in_code():
    """Nine classes: the assistant's two lowest, 0 and 1, are replaced by the core's logits."""
    core = torch.tensor([8.0, -2, 0, 0, 0, 0, 0, 0, 4]).view(1, 9, 1, 1)
    assist = torch.tensor([-4.0, -6, 2, 4, 6, 8, 10, 12, 14]).view(1, 9, 1, 1)
    assert ensemble(core, assist, 7).flatten().tolist() == [8, -2, 1, 2, 3, 4, 5, 6, 9]
    assert ensemble(core, assist).flatten().tolist() == [2, -4, 1, 2, 3, 4, 5, 6, 9]
    few = slice(0, 5)  # with fewer classes than that, all of them count
    assert equal(ensemble(core[:, few], assist[:, few], 7), ensemble(core, assist)[:, few])


@pytest.mark.parametrize(("alternate", "turns"), [("step", "010101"), ("epoch", "000111")])
def test_eq_ema_of_the_teacher_whose_turn_it_is(method, alternate, turns):
    """t <- 0.9 t + 0.1 s, BN statistics too; the idle teacher stays as it is, to the bit."""
    net = method(alternate=alternate, decay=0.9)
    for step, turn in enumerate(map(int, turns)):
        before = [weights(teacher) for teacher in net.teachers]
        net.step(random_batch(), Clock(step, 3, 4), Update())
        student = net.student.state_dict()
        assert equal(before[1 - turn], weights(net.teachers[1 - turn]))
        for key, value in net.teachers[turn].state_dict().items():
            if value.is_floating_point():
                torch.testing.assert_close(value, 0.9 * before[turn][key] + 0.1 * student[key])
        assert not equal(before[turn], weights(net.teachers[turn]))


def test_core_teacher_is_the_one_that_is_updated(method, monkeypatch):
    net = method("code", teacher_init="student", warmup_epochs=0, threshold=0.0)
    seen = []
    monkeypatch.setattr(ps_mt, "ensemble", lambda core, *rest: seen.append(core) or core)
    with torch.no_grad():
        for p in net.teachers[1].parameters():
            p.add_(0.1)
    batch = random_batch()
    for step in (0, 2):  # an epoch has two steps
        expected = [net.teachers[i](batch.weak) for i in (0, 1)]
        net.step(batch, Clock(step, 2, 2), Update(lr=0))
        assert torch.equal(seen[-1], expected[step // 2])
        assert not torch.equal(*expected)


def test_deployed_is_the_mean_of_the_teachers_and_has_its_own_place_in_the_record(tiny, tmp_path):
    config = tiny(method="ps_mt", epochs=1, method_args={"decay": 0.5})
    record = fit(config, out=tmp_path)
    assert record["deployed"] == "ensemble"
    assert list(record["networks"]) == ["student", "teachers.0", "teachers.1", "ensemble"]
    net = build_method(config, 8)
    state = torch.load(tmp_path / config.run_id / "last.pt", weights_only=True)["method"]
    net.load_state_dict(state)
    net.eval()
    image = torch.randn(2, 3, 32, 32)
    one, two = (teacher(image) for teacher in net.teachers)
    assert not torch.equal(one, two)
    assert evaluated(net)["ensemble"] is net
    torch.testing.assert_close(net(image), (one + two) / 2)


# Adversarial features


@pytest.fixture
def moves(monkeypatch) -> list[torch.Tensor]:
    """The perturbations of the steps to come."""
    found, real = [], ps_mt.adversarial

    def adversarial(*arguments, **search):
        found.append(real(*arguments, **search))
        return found[-1]

    monkeypatch.setattr(ps_mt, "adversarial", adversarial)
    return found


def test_perturbation_has_length_eps_in_paper_and_far_from_it_in_code(method, moves):
    lengths = {}
    for preset in ("paper", "code"):
        torch.manual_seed(1)
        net = method(preset)
        moves.clear()
        net.step(random_batch(), Clock(1, 1, 3), Update())
        assert len(moves) == (1 if preset == "paper" else 2)  # unlabeled; labeled too
        lengths[preset] = torch.cat(moves).flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths["paper"], torch.full((4,), 2.0), rtol=0, atol=1e-3)
    assert 0 < lengths["code"].max() < 0.2


PASSES = {  # encoder of student and teachers; classifier of student and teachers, in one step
    "paper": ({}, (2, 1, 2, 3)),
    "code": ({"warmup_epochs": 1}, (2, 1, 2, 5)),
    "two gradients": ({"iters": 2}, (2, 1, 2, 4)),
    "vat": ({"perturbation": "vat"}, (2, 1, 4, 1)),
    "none": ({"perturbation": "none"}, (2, 1, 2, 1)),
}


@pytest.mark.parametrize("name", PASSES)
def test_forward_passes_of_a_step(method, name):
    arguments, expected = PASSES[name]
    net = method("code" if name == "code" else "paper", **arguments)
    counts = dict.fromkeys(["student", "teachers.0", "teachers.1"], (0, 0))

    def count(who: str, part: int):
        def add(*_):
            counts[who] = tuple(n + (i == part) for i, n in enumerate(counts[who]))

        return add

    for who, child in net.networks().items():
        child.encoder.register_forward_hook(count(who, 0))
        child.classifier.register_forward_hook(count(who, 1))
    net.step(random_batch(), Clock(1, 1, 3), Update())
    encodings, encodings_t, classifications, classifications_t = expected
    assert counts["student"] == (encodings, classifications)
    assert counts["teachers.0"] == counts["teachers.1"] == (encodings_t, classifications_t)


def test_teachers_see_weak_and_the_student_strong_views(method):
    net, batch, seen = method(cutmix=False), random_batch(), []
    for name, child in net.networks().items():
        child.encoder.register_forward_pre_hook(
            lambda module, inputs, name=name: seen.append((name, inputs[0]))
        )
    net.step(batch, Clock(0, 1, 3), Update())
    assert [name for name, _ in seen] == ["teachers.0", "teachers.1", "student", "student"]
    for (_, image), view in zip(
        seen, (batch.weak, batch.weak, batch.image_strong, batch.strong[0]), strict=True
    ):
        assert image is view


def test_search_leaves_no_trace_in_the_teachers(method, monkeypatch):
    """Modes are as before, BN statistics moved by the one pass that labels, gradients none."""
    monkeypatch.setattr(ps_mt, "ema", lambda *arguments: None)
    net = method("code", warmup_epochs=1)
    before = {name: m.training for name, m in net.named_modules()}
    net.step(random_batch(), Clock(1, 1, 3), Update())
    assert before == {name: m.training for name, m in net.named_modules()}
    for teacher in net.teachers:
        counters = [b for k, b in teacher.named_buffers() if k.endswith("num_batches_tracked")]
        assert counters and all(counter == 1 for counter in counters)
        assert all(p.grad is None for p in teacher.parameters())


def test_trained_teachers_label_in_evaluation_mode_if_told_to(method):
    net = method("code", teacher_mode="eval")
    assert net.teachers.training
    net.step(random_batch(), Clock(0, 1, 3), Update())
    assert net.teachers.training
    net.step(random_batch(), Clock(1, 1, 3), Update())
    assert not any(m.training for m in net.teachers.modules()) and net.student.training


def drawn(**arguments) -> PSMT:
    torch.manual_seed(0)
    return PSMT(lambda **_: Pixelwise(), threshold=0.0, **arguments).train()


@pytest.mark.parametrize(
    ("arguments", "counts"),
    [
        ({}, False),
        ({"norm": "pixel"}, False),
        ({"perturb_labeled": True}, False),
        ({"perturbation": "vat", "assist_topk": 1}, False),
        ({"padding": True}, True),
    ],
)
def test_padding_counts_only_if_told_to(arguments, counts):
    """Networks that see one pixel at a time: what padding shows must not matter, to the bit."""
    found = []
    for value in (0.0, 100.0):
        batch = random_batch(classes=2)
        valid = batch.valid.clone()
        valid[:2, :20, 5:] = False
        valid[2, 8:] = False
        fill = lambda x, valid=valid, value=value: x.masked_fill(~valid[:, None], value)  # noqa: E731
        batch = Batch(
            fill(batch.image),
            torch.where(valid, batch.label, IGNORE),
            fill(batch.weak),
            (fill(batch.strong[0]),),
            valid,
            fill(batch.image_strong),
        )
        net = drawn(ramp_epochs=0.1, **arguments)
        torch.manual_seed(1)
        losses = [net.step(batch, Clock(i, 2, 4), Update()) for i in range(3)]
        found.append((losses, net.state_dict()))
        assert losses[-1]["unsup"] > 0
    assert equal(*found) != counts


def test_no_confident_pixel_gives_zero_loss_and_zero_gradient(method):
    grads = []
    for arguments in ({"threshold": 1.1}, {"weight": 0.0}):
        net, update = method(**arguments), Update()
        torch.manual_seed(1)
        losses = net.step(random_batch(), Clock(5, 1, 6), update)
        grads += update.grads
        assert torch.isfinite(update.losses[0])
        if "threshold" in arguments:
            assert losses["unsup"] == 0 and losses["kept"] == 0
    assert equal(*grads) and any(g.abs().max() > 0 for g in grads[0])


# Warm-up


def test_copies_follow_the_student_through_the_warm_up(method):
    net = method(warmup_epochs=2)
    start = weights(net.student)
    for step in range(4):
        assert net.step(random_batch(), Clock(step, 2, 4), Update()).keys() == {"sup"}
        for teacher in net.teachers:
            assert equal(weights(teacher), weights(net.student))
    assert not equal(start, weights(net.student))
    assert "unsup" in net.step(random_batch(), Clock(4, 2, 4), Update())


def test_random_teachers_learn_in_the_warm_up_from_weak_views(method):
    net, batch, seen = method("code"), random_batch(), {}
    for name, child in net.networks().items():
        child.encoder.register_forward_pre_hook(
            lambda module, inputs, name=name: seen.setdefault(name, inputs[0])
        )
    before = {name: weights(child) for name, child in net.networks().items()}
    assert not equal(before["teachers.0"], before["teachers.1"])
    for step in range(3):
        net.step(batch, Clock(step, 3, 3), Update())
    assert seen["student"] is batch.image_strong
    assert seen["teachers.0"] is seen["teachers.1"] is batch.image
    for name, child in net.networks().items():
        moved = [not torch.equal(p, before[name][key]) for key, p in child.named_parameters()]
        assert sum(moved) > 0.9 * len(moved), name


def test_random_teachers_take_no_pretrained_weights(tiny, tmp_path):
    pretrained = build_method(tiny(seed=5), 8).student.encoder.state_dict()
    torch.save(pretrained, tmp_path / "encoder.pt")
    file = str(tmp_path / "encoder.pt")
    for preset, taken in (("paper", True), ("code", False)):
        net = build_method(tiny(method="ps_mt", preset=preset, weights=file), 8)
        assert equal(dict(net.student.encoder.state_dict()), dict(pretrained))
        for teacher in net.teachers:
            same = [torch.equal(v, pretrained[k]) for k, v in teacher.encoder.named_parameters()]
            assert all(same) if taken else sum(same) < len(same)
    assert drawn(teacher_init="random", warmup_epochs=1).teachers[0].changes == {}
    net = PSMT(Pixelwise, teacher_init="random", warmup_epochs=1)
    assert net.teachers[0].changes == {"weights": None, "pretrained": False}


def test_learning_rate_is_constant_in_the_warm_up_and_then_falls_from_the_start(method):
    net = method("code")
    clocks = [Clock(i, 4, 3) for i in range(12)]
    progress = [net.schedule("student", clock) for clock in clocks]
    assert progress == [0] * 4 + [i / 8 for i in range(8)]
    assert [net.restarts("teachers", clock) for clock in clocks[1:]] == [False] * 3 + [True] + [
        False
    ] * 7
    assert not any(net.restarts("student", clock) for clock in clocks)
    paper = method()
    assert [paper.schedule("student", clock) for clock in clocks] == [i / 12 for i in range(12)]
    longer = Clock(2, 1, 3)  # a training that ends in its warm-up
    assert method(warmup_epochs=5).schedule("student", longer) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"teacher_init": "random"}, "warmup_epochs=0: choose 1 or more"),
        ({"warmup_epochs": -1}, "warmup_epochs=-1: choose 0 or more"),
        ({"noise": "salt"}, "noise='salt': choose one of gaussian, uniform"),
        ({"norm": "class"}, "norm='class': choose one of sample, pixel"),
        ({"perturbation": "cct"}, "perturbation='cct': choose one of none, vat, tvat"),
    ],
)
def test_wrong_hyper_parameters_are_refused(method, arguments, message):
    with pytest.raises(ValueError, match=message):
        method(**arguments)
