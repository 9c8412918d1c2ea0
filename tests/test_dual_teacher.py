"""Dual Teacher: the slides' equations by hand, a naive reference of whole steps, sub-models."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from conftest import LOSS, equal
from timm.layers import DropPath
from torch import nn

from s4lib.build import build_method
from s4lib.losses import IGNORE, weighted_ce
from s4lib.method import Batch, Clock
from s4lib.methods.dual_teacher import DualTeacher
from s4lib.mixing import classmix, cutmix_beta
from s4lib.perturb import stochastic_depth

K, LR, DROP = 3, 0.05, 0.4
PRESETS = pytest.mark.parametrize("preset", DualTeacher.presets)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.drop_path = nn.Conv2d(4, 4, 3, padding=1), None

    def forward(self, x):
        branch = self.conv(x).tanh()
        return x + (branch if self.drop_path is None else self.drop_path(branch))


class Net(nn.Sequential):
    """Three residual blocks without BN and dropout, so that a step is a plain function."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 1), Block(), Block(), Block(), nn.Conv2d(4, K, 1))
        self.double()[-1].weight.data *= 4  # confidences between 0.35 and 0.99


def method(preset: str = "paper", **changes) -> DualTeacher:
    torch.manual_seed(1)
    return DualTeacher(Net, **{**DualTeacher.presets[preset], **changes}).train()


def images(g: torch.Generator, size: int = 4) -> torch.Tensor:
    return torch.randn(size, 3, 6, 5, generator=g, dtype=torch.double)


def batch(seed: int = 0, labeled: int = 4, views: int = 2) -> Batch:
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(0, K, (labeled, 6, 5), generator=g)
    label[0, :2] = IGNORE
    valid = torch.ones(4, 6, 5, dtype=torch.bool)
    valid[1, 3:] = False
    strong = tuple(images(g) for _ in range(views))
    return Batch(images(g, labeled), label, images(g), strong, valid)


def descend(loss, *nets) -> bool:
    """theta <- theta - eta dL/dtheta; the slides print a plus, which would climb."""
    parameters = [p for net in nets for p in net.parameters()]
    with torch.no_grad():
        for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            p -= LR * g
    return True


def run(method: DualTeacher, steps: range, per_epoch: int = 3, data=batch) -> list[dict]:
    logs = []
    for i in steps:
        torch.manual_seed(i)
        b = data(i)
        b = b._replace(strong=b.strong[: method.strong_views])
        logs.append(method.step(b, Clock(i, per_epoch, 9), descend))
    return logs


# The slides' equations


@pytest.fixture
def four_pixels():
    """Two images of 1 x 2 pixels; -log p of the label is ln 2, ln 4 and ln 2, ln 8."""
    probs = torch.tensor([[0.5, 0.25], [0.5, 0.125]])
    logits = torch.stack([probs, 1 - probs], 1).log()[:, :, None]
    confidence = torch.tensor([[[0.99, 0.96]], [[0.95, 0.2]]])
    return logits, torch.zeros(2, 1, 2, dtype=torch.long), confidence


def test_unsup_of_the_slides_is_the_mean_over_images_of_the_mean_over_pixels(four_pixels):
    mean = (math.log(2) + math.log(4)) / 2 / 2 + (math.log(2) + math.log(8)) / 2 / 2
    assert float(weighted_ce(*four_pixels, 0.95, "none")) == pytest.approx(mean)


def test_the_four_weightings_by_hand(four_pixels):
    two, four, eight = math.log(2), math.log(4), math.log(8)
    expected = {
        "none": (two + four + two + eight) / 4,
        "pixel": (two + four + two) / 4,
        "batch": (two + four + two + eight) / 4 * 3 / 4,
        "image": ((two + four) * 1 + (two + eight) * 1 / 2) / 4,
    }
    found = {how: float(weighted_ce(*four_pixels, 0.95, how)) for how in expected}
    assert found == pytest.approx(expected)
    assert len({round(value, 4) for value in found.values()}) == 4


@pytest.mark.parametrize("how", ["none", "pixel", "batch", "image"])
def test_ignored_pixels_are_in_no_share_and_no_mean(four_pixels, how):
    logits, label, confidence = four_pixels
    wide = torch.cat([logits, torch.full((2, 2, 1, 3), 50.0)], 3)
    wider = torch.cat([label, torch.full((2, 1, 3), IGNORE)], 2)
    sure = torch.cat([confidence, torch.ones(2, 1, 3)], 2)
    left = weighted_ce(wide, wider, sure, 0.95, how)
    torch.testing.assert_close(left, weighted_ce(*four_pixels, 0.95, how))
    assert (weighted_ce(wide, wider, sure, 1.1, how) == 0) == (how != "none")
    nothing = torch.full_like(wider, IGNORE)
    assert weighted_ce(wide, nothing, sure, 0.95, how) == 0


@pytest.mark.parametrize("variant", ["", "_b"])
def test_the_image_weighting_is_that_of_the_released_code(golden, variant):
    """dual_cutmix.npz: in variant b an image with a loss of exactly zero leaves the mean; 1e-5."""
    g = golden("dual_cutmix.npz")
    inputs = g[f"uloss_logits{variant}"], g["uloss_target"], g["uloss_conf"], float(g["threshold"])
    torch.testing.assert_close(weighted_ce(*inputs, "image"), g[f"uloss_value{variant}"], **LOSS)


def test_the_update_descends_sup_plus_weighted_unsup_and_cons():
    m = method(weight=0.5, cons_weight=0.25, drop_path=0.0)
    before = [p.detach().clone() for p in m.student.parameters()]
    seen = []

    def minimize(loss, *nets):
        seen.append(loss.detach())
        return descend(loss, *nets)

    losses = m.step(batch(), Clock(0, 3, 9), minimize)
    total = losses["sup"] + 0.5 * losses["unsup"] + 0.25 * losses["cons"]
    torch.testing.assert_close(seen, [total])
    assert any(not torch.equal(a, b) for a, b in zip(before, m.student.parameters(), strict=True))
    torch.manual_seed(0)
    m = method(drop_path=0.0, mixes=("cutmix",))
    totals = [sum(log.values()) for log in run(m, range(12), data=lambda i: batch(0))]
    assert totals[-1] < totals[0] - 0.1


def test_cons_asks_a_sub_model_on_weak_views_for_the_teachers_labels():
    """With a student that is its teacher and no drop path, cons is -log of its own confidence."""
    m = method(drop_path=0.0)
    b = batch()
    confidence = m.student(b.weak).softmax(1).amax(1)
    (log,) = run(m, range(1), data=lambda i: b)
    torch.testing.assert_close(
        log["cons"].double(), -confidence[b.valid].log().mean(), rtol=1e-6, atol=0
    )
    other = method(drop_path=0.9)
    (skipping,) = run(other, range(1), data=lambda i: b)
    assert skipping["cons"] > log["cons"] + 0.01 and torch.equal(skipping["unsup"], log["unsup"])


# Whole steps against a naive reference


def naive_net(net: Net, x: torch.Tensor, rate: float) -> torch.Tensor:
    x = net[0](x)
    for i in range(3):
        branch, keep = net[1 + i].conv(x).tanh(), 1 - rate * i / 2
        if rate and i:
            branch = branch * torch.empty(len(x), 1, 1, 1).double().bernoulli_(keep) / keep
        x = x + branch
    return net[4](x)


def naive_mean(logits, label, weight, count) -> torch.Tensor:
    """Sum of weight * -log p over pixels, one by one, by count."""
    total = torch.zeros((), dtype=torch.double)
    for b, k, w in zip(logits, label, weight, strict=True):
        for y in range(6):
            for x in range(5):
                if k[y, x] != IGNORE:
                    total = total - w[y, x] * (b[k[y, x], y, x] - b[:, y, x].exp().sum().log())
    return total / count


def naive_loss(student, teacher, b: Batch, cut: bool, code: bool, threshold: float):
    probs = teacher(b.weak).softmax(1).detach()
    confidence, label = probs.max(1)
    label[~b.valid] = IGNORE
    sure = (confidence >= threshold) & b.valid
    mix = cutmix_beta(label) if cut else classmix(label, "random")
    view, strong = torch.empty_like(b.weak), b.strong[1 if code and not cut else 0]
    label_u, sure_u = torch.empty_like(label), torch.empty_like(sure)
    for i in range(4):
        for y in range(6):
            for x in range(5):
                shown = int(mix.partner[i]) if mix.mask[i, y, x] else i
                view[i, :, y, x] = strong[shown, :, y, x]
                label_u[i, y, x], sure_u[i, y, x] = label[shown, y, x], sure[shown, y, x]
    logits = naive_net(student, torch.cat([b.image, view]), DROP if code else 0)
    logits_c = naive_net(student, b.strong[1] if code else b.weak, DROP)
    valid = label_u != IGNORE
    weight = torch.ones(4, 6, 5, dtype=torch.double)
    if code and cut:  # the share of the image before mixing
        share = torch.stack([(sure[i] & valid[i]).sum() / valid[i].sum() for i in range(4)])
        weight = weight * share[:, None, None]
    elif code:
        weight = weight * sure_u.sum() / valid.sum()
    unsup = naive_mean(logits[len(b.image) :], label_u, weight, valid.sum())
    label_c = label.clone()
    if code:
        label_c[b.label == IGNORE] = IGNORE
    weight = sure.double() if code else torch.ones(4, 6, 5)
    cons = naive_mean(logits_c, label_c, weight, (label_c != IGNORE).sum())
    ones = torch.ones(b.label.shape)
    sup = naive_mean(logits[: len(b.image)], b.label, ones, (b.label != IGNORE).sum())
    return sup + unsup + 0.2 * cons


@pytest.mark.parametrize("preset", ["paper", "code", "single_teacher", "dual_student"])
def test_steps_over_two_switches_are_those_of_a_naive_reference(preset):
    threshold = 0.5
    m = method(preset, threshold=threshold, drop_path=DROP)
    r = method(preset, drop_path=DROP)  # its networks alone are used
    assert equal(m.state_dict(), r.state_dict())
    code, updates = preset == "code", [0, 0]
    for step in range(8):  # three steps an epoch
        b, epoch = batch(step), step // 3
        which = epoch % 2 if preset in ("paper", "code") else 0
        teacher, cut = r.teachers[which], epoch % 2 == 0
        torch.manual_seed(step)
        loss = naive_loss(r.student, teacher, b, cut, code, threshold)
        if preset == "dual_student":
            other = naive_loss(teacher, r.student, b, cut, code, threshold)
            descend(loss + other, r.student, teacher)
        else:
            descend(loss, r.student)
            alpha = min(1 - 1 / ((step % 3 if code else updates[which]) + 1), 0.99)
            updates[which] += 1
            with torch.no_grad():
                for t, s in zip(teacher.parameters(), r.student.parameters(), strict=True):
                    t.copy_(alpha * t + (1 - alpha) * s)
        (log,) = run(m, range(step, step + 1))
        for key, value in r.state_dict().items():
            torch.testing.assert_close(m.state_dict()[key], value, rtol=1e-6, atol=1e-7, msg=key)
        if code:
            assert 0.1 < log["kept"] < 0.9
    start = method(preset).state_dict()
    assert all(not torch.equal(start[key], value) for key, value in m.state_dict().items())


# Teachers


@pytest.mark.parametrize("preset", ["paper", "code"])
def test_only_the_active_teacher_moves(preset):
    m = method(preset)
    for epoch in range(4):
        active, idle = (m.teachers[(epoch + i) % 2] for i in range(2))
        for step in range(3 * epoch, 3 * epoch + 3):
            before = [{k: v.clone() for k, v in t.state_dict().items()} for t in (active, idle)]
            run(m, range(step, step + 1))
            assert equal(idle.state_dict(), before[1]), step
            assert not equal(active.state_dict(), before[0]), step


@pytest.mark.parametrize("preset", ["paper", "code"])
def test_in_code_every_turn_restarts_its_teacher_in_paper_only_the_first(preset):
    m = method(preset)
    copies = []
    for step in range(12):
        run(m, range(step, step + 1))
        copies.append(equal(m.teachers[step // 3 % 2].state_dict(), m.student.state_dict()))
    starts = {"paper": [0, 3], "code": [0, 3, 6, 9]}[preset]
    assert [step for step, copied in enumerate(copies) if copied] == starts


class Weight(nn.Module):
    """The network of dual_ema.npz: two parameters, and two buffers that nothing averages."""

    def __init__(self, start: torch.Tensor, buffer: torch.Tensor):
        super().__init__()
        self.w = nn.Parameter(start.clone())
        self.register_buffer("b", buffer.clone())

    def forward(self, image):
        return self.w[:, None, None].expand(len(image), 2, *image.shape[2:])


def test_an_epoch_of_code_is_the_released_ema(golden):
    """dual_ema.npz: update_ema over 160 steps of one epoch; 1e-5."""
    g = golden("dual_ema.npz")
    wanted = g["teacher_w_and_buffer_traj"]
    m = DualTeacher(
        lambda: Weight(g["student_init"], g["student_init"]),
        **{**DualTeacher.presets["code"], "drop_path": 0.0},
    )
    m.teachers[0].load_state_dict({"w": g["teacher_init"], "b": wanted[0, 2:]})

    def minimize(loss, *nets):
        with torch.no_grad():
            m.student.w += g["student_step"]
        return True

    b = batch()
    b = Batch(*(x.float() for x in (b.image,)), b.label % 2, b.weak, b.strong, b.valid)
    for step, values in enumerate(wanted):
        m.step(b, Clock(step, len(wanted), 2), minimize)
        ours = torch.cat([m.teachers[0].w.detach(), m.teachers[0].b])
        torch.testing.assert_close(ours, values, rtol=1e-5, atol=1e-5)
    assert len(wanted) == 160


def test_an_update_that_is_not_made_moves_no_teacher():
    m = method()
    run(m, range(5))
    assert not equal(m.teachers[1].state_dict(), m.student.state_dict())
    before = {k: v.clone() for k, v in m.state_dict().items()}
    m.step(batch(), Clock(5, 3, 9), lambda loss, *nets: False)
    assert equal(m.state_dict(), before)


@pytest.mark.parametrize(
    ("period", "expected"), [(1, "01010101"), (2, "00110011"), (3, "00011100")]
)
def test_a_turn_lasts_as_many_epochs_as_asked(period, expected):
    m = method(period=period)
    for epoch, active in enumerate(expected):
        before = [t[0].weight.clone() for t in m.teachers]
        run(m, range(epoch, epoch + 1), per_epoch=1)
        moved = [not torch.equal(t[0].weight, b) for t, b in zip(m.teachers, before, strict=True)]
        assert moved == [active == "0", active == "1"], epoch


# Views, forwards, sub-models of the student


def watch(m: DualTeacher) -> list[tuple[str, torch.Tensor, int]]:
    """(network, input, number of drop paths) of each forward from here on."""
    seen = []
    for name, net in m.networks().items():

        def note(net, inputs, name=name):
            paths = sum(isinstance(x, DropPath) for x in net.modules())
            seen.append((name, inputs[0].detach().clone(), paths))

        net.register_forward_pre_hook(note)
    return seen


@PRESETS
def test_forwards_of_a_step(preset):
    m = method(preset)
    seen = watch(m)
    for step in (0, 1):
        torch.manual_seed(0)
        m.step(batch(), Clock(step, 1, 4), descend)
    two = preset in ("paper", "slides", "code")
    for active, step in (
        ("teachers.0", seen[: len(seen) // 2]),
        ("teachers.1", seen[len(seen) // 2 :]),
    ):
        active = active if two else "teachers.0"
        expected = [(active, 4), ("student", 8), ("student", 4)]
        if preset == "dual_student":
            expected += [("student", 4), (active, 8), (active, 4)]
        assert [(name, len(x)) for name, x, _ in step] == expected
        paths = [0, 3 if preset == "code" else 0, 3]
        assert [n for *_, n in step] == paths * (len(expected) // 3)


@PRESETS
def test_what_each_forward_sees(preset):
    m, b = method(preset), batch()
    code, seen = preset == "code", watch(m)
    assert (m.strong_views, m.unlabeled_order) == ((2, "fixed") if code else (1, "shuffled"))
    assert m.teachers.training == (preset in ("code", "dual_student"))
    assert m.family == (("colour", "normalised") if code else ("colour",))
    b = b._replace(strong=b.strong[: m.strong_views])
    for step in (0, 1):
        seen.clear()
        m.step(b, Clock(step, 1, 4), descend)
        (_, teacher_sees, _), (_, joint, _), (_, cons, _) = seen[:3]
        assert torch.equal(teacher_sees, b.weak) and torch.equal(joint[:4], b.image)
        assert torch.equal(cons, b.strong[1] if code else b.weak)
        strong, mixed = b.strong[step if code else 0], joint[4:]  # code: RGB for CutMix alone
        own = (mixed == strong).all(1)
        candidates = [(mixed == strong[i]).all(1) for i in range(4)]
        assert 0.2 < own.double().mean() < 1
        assert torch.stack(candidates).any(0).all()  # each pixel is one of that view


@pytest.mark.parametrize("mixes", [("cutmix",), ("classmix",), ("classmix", "cutmix")])
def test_turns_mix_as_asked(mixes, monkeypatch):
    import s4lib.methods.dual_teacher as module

    m, drawn = method(mixes=mixes), []
    for name, real in (("cutmix", cutmix_beta), ("classmix", classmix)):

        def draw(*arguments, name=name, real=real):
            drawn.append(name)
            return real(*arguments)

        monkeypatch.setattr(module, {"cutmix": "cutmix_beta"}.get(name, name), draw)
    run(m, range(4), per_epoch=1)
    assert drawn == list(mixes * 4)[:4]


def test_the_labeled_batchs_void_masks_cons_only_where_sizes_agree():
    logs = {}
    for mask in ("pixel", "labeled"):
        for labeled in (4, 2):
            m = method(drop_path=0.0, cons_mask=mask, threshold=0.0)
            (log,) = run(m, range(1), data=lambda i, n=labeled: batch(i, labeled=n))
            logs[mask, labeled] = log["cons"]
    assert torch.equal(logs["pixel", 2], logs["labeled", 2])
    assert not torch.equal(logs["pixel", 4], logs["labeled", 4])


def test_whole_epochs_are_the_same_for_both_names_of_the_slides():
    assert DualTeacher.presets["paper"] == DualTeacher.presets["slides"] == {}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"period": 0}, "period=0: choose 1 epoch or more"),
        ({"mixes": []}, "choose at least one of cutmix, classmix"),
        ({"mixes": ["cutout"]}, "mixes='cutout': choose one of cutmix, classmix"),
        ({"mixes": "cutmix"}, "mixes='cutmix': expected a list"),
        ({"deploy": "teachers.2"}, "deploy='teachers.2': choose student or .* teachers.1"),
        ({"scheme": "three"}, "scheme='three': choose one of dual_teacher, single_teacher"),
        ({"unsup_weight": "sure"}, "unsup_weight='sure': choose one of none, pixel"),
        ({"drop_path": 1.0}, "rate=1.0.*0 <= rate < 1"),
    ],
)
def test_bad_settings_are_refused_in_one_line(tiny, changes, says):
    with pytest.raises(ValueError, match=says) as error:
        build_method(tiny(method="dual_teacher", method_args=changes), K)
    assert "\n" not in str(error.value)


def test_a_teacher_can_be_deployed():
    m = method(deploy="teachers.1")
    run(m, range(5))
    assert torch.equal(m(batch().weak), m.teachers[1](batch().weak))
    assert not torch.equal(m(batch().weak), m.student(batch().weak))


# Stochastic depth of timm's encoders

ENCODERS = {
    "test_resnet": 32,
    "resnet10t": 32,
    "test_vit": 160,
    "pvt_v2_b0": 64,
    "test_convnext": 64,
}
encoders = pytest.mark.parametrize("name", ENCODERS)


def encoder(name: str, **arguments) -> nn.Module:
    torch.manual_seed(0)
    net = timm.create_model(name, features_only=True, **arguments).eval()
    for p in net.parameters():  # timm begins some branches at zero: nothing to skip
        nn.init.normal_(p, std=0.2) if p.ndim == 1 else None
    return net


def paths(net: nn.Module) -> list[DropPath]:
    return [x for x in net.modules() if isinstance(x, DropPath)]


def structure(net: nn.Module) -> list:
    return [(name, id(x), sorted(vars(x))) for name, x in net.named_modules()]


@encoders
def test_blocks_are_skipped_by_timms_linear_rule_and_put_back(name):
    net = encoder(name)
    image = torch.randn(3, 3, ENCODERS[name], ENCODERS[name])
    before, plain = structure(net), net(image)
    reference = timm.create_model(name, features_only=True, drop_path_rate=0.3)
    with stochastic_depth(net, 0.3):
        rates = [x.drop_prob for x in paths(net) if x.drop_prob]
        assert rates == pytest.approx([x.drop_prob for x in paths(reference)])
        torch.manual_seed(0)
        one = net(image)
        torch.manual_seed(0)
        assert all(map(torch.equal, net(image), one))
    assert structure(net) == before
    assert all(map(torch.equal, net(image), plain))
    with stochastic_depth(net, 0.9):
        torch.manual_seed(0)
        deep = [net(image)[-1] for _ in range(4)]
    assert all(not torch.allclose(x, plain[-1]) for x in deep)
    assert not torch.allclose(deep[0], deep[1])


@encoders
def test_a_branch_is_skipped_per_image_or_scaled_so_that_its_expectation_stays(name):
    net, size, copies = encoder(name), ENCODERS[name], 64
    image = torch.randn(1, 3, size, size).expand(copies, -1, -1, -1)
    seen = []
    with stochastic_depth(net, 0.5):
        for path in paths(net):

            def note(path, x, y):
                seen.append((path.drop_prob, x[0].clone(), y.clone()))  # ResNets add in place

            path.register_forward_hook(note)
        with torch.no_grad():
            net(image)
    assert max(p for p, *_ in seen) == 0.5 and len({p for p, *_ in seen}) > 1
    first = seen[0][1] / (1 - seen[0][0])
    assert torch.equal(seen[0][2], first)  # the first block is never skipped
    for p, x, y in seen:
        factor = y.flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)
        kept = factor > 0
        torch.testing.assert_close(y[kept], x[kept] / (1 - p))
        assert not y[~kept].any()
        share = kept.float().mean()
        assert share == 1 if p == 0 else abs(share - (1 - p)) < 4 * math.sqrt(p * (1 - p) / copies)


def test_a_skipped_block_of_a_resnet_passes_its_shortcut_on():
    net = encoder("resnet18")
    block = net.layer4[1]
    seen = []
    block.register_forward_hook(lambda block, x, y: seen.append((x[0].clone(), y.clone())))
    torch.manual_seed(0)
    with stochastic_depth(net, 0.5), torch.no_grad():
        net(torch.randn(32, 3, 32, 32))
    ((x, y),) = seen
    skipped = (y == x.relu()).flatten(1).all(1)
    assert 8 < skipped.sum() < 24


def test_a_network_is_put_back_after_an_error_and_keeps_its_own_drop_paths():
    for arguments in ({}, {"drop_path_rate": 0.2}):
        net = encoder("test_resnet", **arguments).train()
        before = structure(net)
        with pytest.raises(ZeroDivisionError), stochastic_depth(net, 0.5):
            assert structure(net) != before
            raise ZeroDivisionError
        assert structure(net) == before
        with stochastic_depth(net, 0.0):
            assert structure(net) == before


def test_a_network_without_residual_blocks_is_refused(tiny):
    with pytest.raises(ValueError, match="rate=0.1: this network has no residual block"):
        build_method(tiny(method="dual_teacher", net="mobilenetv1"), K)
    plain = build_method(
        tiny(method="dual_teacher", net="mobilenetv1", method_args={"drop_path": 0.0}), K
    )
    assert len(plain.teachers) == 2
    with stochastic_depth(nn.Conv2d(3, 3, 1), 0.0):
        pass
    for rate in (-0.1, 1.0):
        with pytest.raises(ValueError, match="0 <= rate < 1"), stochastic_depth(plain, rate):
            pass
