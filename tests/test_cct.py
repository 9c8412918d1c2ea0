"""CCT: perturbations of features, its losses and its step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import GRADIENT, LOSS, Pixelwise, equal, tiny_config
from torch import nn

from s4lib import guided
from s4lib.build import build_method
from s4lib.guided import (
    Outlines,
    components,
    context_mask,
    feature_drop,
    feature_noise,
    foreground,
    guided_cutout,
    object_boxes,
    object_mask,
    outlines,
)
from s4lib.losses import IGNORE, abce, ce, js, kl, mse
from s4lib.method import Batch, Clock
from s4lib.methods import cct
from s4lib.methods.cct import CCT, annealed

# Losses


@pytest.mark.parametrize("masked", [0, 1])
@pytest.mark.parametrize("name", ["mse", "kl", "js"])
def test_distances_are_those_of_cct(golden, name, masked):
    """cct_losses.npz: softmax_mse_loss, softmax_kl_loss, softmax_js_loss; with a mask at 0.5."""
    g = golden("cct_losses.npz")
    if f"{name}_confmask{masked}" not in g:
        pytest.skip("js knows no mask")
    logits, probs = g["student_logits"].requires_grad_(), g["target_probs"]
    sure = probs.amax(1) > (float(g["conf_threshold"]) if masked else 0.0)
    assert 0 < sure.float().mean() < 1 if masked else sure.all()
    loss = {
        "mse": lambda: mse(logits, probs, valid=sure),
        "kl": lambda: kl(logits, probs, keep=sure, classes="sum" if masked else "mean"),
        "js": lambda: js(logits, probs),
    }[name]()
    torch.testing.assert_close(loss.detach(), g[f"{name}_confmask{masked}"], **LOSS)
    loss.backward()
    torch.testing.assert_close(logits.grad, g[f"{name}_confmask{masked}_grad"], **GRADIENT)


def test_the_method_measures_by_these_distances(golden):
    """The same numbers through `CCT.distance`, threshold 0 for none."""
    g = golden("cct_losses.npz")
    logits, probs = g["student_logits"], g["target_probs"]
    valid = torch.ones_like(probs[:, 0], dtype=torch.bool)
    for name in ("mse", "kl"):
        for masked, threshold in enumerate((0.0, float(g["conf_threshold"]))):
            net = CCT(Pixelwise, cons=name, threshold=threshold)
            loss = net.distance(logits, probs, valid, probs.amax(1) > threshold)
            torch.testing.assert_close(loss, g[f"{name}_confmask{masked}"], **LOSS)
    net = CCT(Pixelwise, cons="js")
    torch.testing.assert_close(net.distance(logits, probs, valid, valid), g["js_confmask0"], **LOSS)


def test_annealed_cross_entropy_is_that_of_torchsemiseg(golden):
    """cct_losses.npz: abCE_loss at seven (epoch, iteration) pairs of 34 x 100, 21 classes; 1e-5."""
    g = golden("cct_losses.npz")
    kept = set()
    for (epoch, i), threshold, loss in zip(
        g["abce_epoch_iter"], g["abce_threshold_f64"], g["abce_loss"], strict=True
    ):
        ours = annealed(Clock(int(100 * epoch + i), 100, 34), 21, 0.99)
        assert ours == pytest.approx(float(threshold), abs=1e-9)
        found = abce(g["abce_logits"], g["abce_target"], ours)
        torch.testing.assert_close(found, loss, **LOSS)
        kept.add(round(float(loss), 4))
    assert len(kept) > 3  # the threshold matters


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.9])
def test_annealed_cross_entropy_by_sorting(threshold):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 5, 6, generator=g, dtype=torch.float64)
    label = torch.randint(0, 4, (3, 5, 6), generator=g)
    label[:, 0] = IGNORE
    for least in (1, 7, 100):
        valid = label != IGNORE
        each = ce_each(logits, label)[valid]
        true = (-each).exp()
        order = true.argsort()
        cut = max(float(true[order[min(3 * least, len(true) - 1)]]), threshold)
        expected = each[true < cut].mean().float()
        torch.testing.assert_close(abce(logits, label, threshold, least), expected)
    assert abce(logits, torch.full_like(label, IGNORE), 0.5) == 0


def ce_each(logits, label):
    return nn.functional.cross_entropy(logits, label, ignore_index=IGNORE, reduction="none")


def test_kl_and_js_by_hand_and_without_padding():
    """Two classes: p = (1/4, 3/4) against q = (1/2, 1/2) has KL = ln 2 - H(p) = 0.1308."""
    probs = torch.tensor([0.25, 0.75]).view(1, 2, 1, 1).repeat(1, 1, 1, 2)
    logits = torch.zeros(1, 2, 1, 2)
    logits[..., 1] = torch.tensor([50.0, -50])[:, None]
    valid = torch.tensor([[[True, False]]])
    assert float(kl(logits, probs, valid=valid)) == pytest.approx(0.130812, abs=1e-5)
    assert float(kl(logits, probs, valid=valid, classes="mean")) == pytest.approx(
        0.065406, abs=1e-5
    )
    assert kl(logits, probs, keep=~valid, valid=valid) == 0
    middle, q = np.array([0.375, 0.625]), np.array([0.5, 0.5])
    p = np.array([0.25, 0.75])
    expected = sum((middle * np.log(middle / other)).sum() for other in (q, p)) / 4
    assert float(js(logits, probs, valid=valid)) == pytest.approx(expected, abs=1e-4)


# Perturbations


def test_noise_is_one_for_the_batch_and_within_its_bound():
    x = torch.rand(3, 5, 4, 4) + 0.5
    relative = feature_noise(x) / x - 1
    torch.testing.assert_close(relative, relative[:1].expand(3, -1, -1, -1), atol=1e-5, rtol=0)
    assert relative.abs().max() <= 0.3 + 1e-5 and relative.min() < -0.1 and relative.max() > 0.1
    noise = torch.full((5, 4, 4), -0.25)
    torch.testing.assert_close(feature_noise(x, noise=noise), 0.75 * x)


def test_drop_loses_the_most_active_places():
    """Means over channels 1, 2, 3, 4: at 0.75 of the largest what reaches 3 goes."""
    x = torch.tensor([1.0, 2, 3, 4]).view(1, 1, 2, 2) * torch.tensor([0.5, 1.5]).view(1, 2, 1, 1)
    expected = x * torch.tensor([1.0, 1, 0, 0]).view(1, 1, 2, 2)
    assert torch.equal(feature_drop(x, share=0.75), expected)
    valid = torch.tensor([True, True, True, False]).view(1, 1, 2, 2)  # 4 is padding, so 2.25 counts
    assert torch.equal(feature_drop(x, valid, share=0.75), expected)
    assert torch.equal(feature_drop(x, valid, share=0.7), x * (x.mean(1, keepdim=True) < 2.1))
    torch.manual_seed(0)
    steps = torch.linspace(0, 1, 1001).view(1, 1, 1, -1)
    cuts = torch.tensor([float(feature_drop(steps).max()) for _ in range(200)])
    assert 0.7 - 2e-3 <= cuts.min() < 0.72 and 0.88 < cuts.max() <= 0.9


def test_masks_show_objects_or_all_else():
    logits = torch.zeros(1, 3, 4, 4)
    logits[:, 2, :2] = 1  # an object in the upper half
    x = torch.rand(1, 5, 2, 2) + 1
    thing = foreground(logits)
    assert torch.equal(context_mask(x, thing)[:, :, 0], x[:, :, 0])
    assert torch.equal(object_mask(x, thing)[:, :, 1], x[:, :, 1])
    assert not context_mask(x, thing)[:, :, 1].any() and not object_mask(x, thing)[:, :, 0].any()
    assert torch.equal(foreground(logits, 2), ~thing) and foreground(logits, None).all()


# Drawn at random, outlined by OpenCV 5.0: (points, top, left, bottom, right); the two pixels inside
# the ring are in a hole, and are not outlined.
DRAWING = """
........##..............
........###.............
........####....#.......
.........##.............
#........#############.#
#........######......###
.###......#####......###
.####.......###..##..###
.####........##......###
.#######......#......##.
.###..##......########..
.##.....#........####...
........######....####..
........######......##.."""
OPENCV = {(22, 4, 0, 13, 13), (1, 2, 16, 2, 16), (23, 0, 8, 13, 23)}


def drawn(text: str) -> torch.Tensor:
    return torch.tensor([[c == "#" for c in line] for line in text.split()])[None]


def rows(found: Outlines) -> set[tuple[int, ...]]:
    return {tuple(row) for row in torch.stack(list(found), 2)[0].tolist() if row[0]}


def test_outlines_are_those_of_opencv():
    assert rows(outlines(drawn(DRAWING))) == OPENCV
    both = outlines(torch.cat([drawn(DRAWING), torch.ones(1, 14, 24, dtype=torch.bool)]))
    assert rows(Outlines(*(v[1:] for v in both))) == {(4, 0, 0, 13, 23)}  # a rectangle's corners
    assert rows(outlines(torch.zeros(1, 3, 3, dtype=torch.bool))) == set()


def spiral(size: int) -> torch.Tensor:
    """A corridor one pixel wide that winds to the centre."""
    mask, y, x, dy, dx = torch.zeros(size, size, dtype=torch.bool), 0, 0, 0, 1
    mask[0, 0] = True
    while True:
        moved = 0
        while 0 <= y + dy < size and 0 <= x + dx < size:
            ahead = y + 2 * dy, x + 2 * dx
            if 0 <= ahead[0] < size and 0 <= ahead[1] < size and mask[ahead]:
                break
            y, x, moved = y + dy, x + dx, moved + 1
            mask[y, x] = True
        if not moved:
            return mask
        dy, dx = dx, -dy


def flooded(mask: torch.Tensor, diagonal: bool) -> torch.Tensor:
    h, w = mask.shape
    label = torch.full((h, w), h * w)
    near = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if diagonal or abs(y) + abs(x) == 1]
    for first in mask.flatten().nonzero()[:, 0].tolist():
        stack = [divmod(first, w)]
        while stack:
            y, x = stack.pop()
            if 0 <= y < h and 0 <= x < w and mask[y, x] and label[y, x] == h * w:
                label[y, x] = first
                stack += [(y + dy, x + dx) for dy, dx in near]
    return label


@pytest.mark.parametrize("diagonal", [True, False])
def test_components_are_those_of_a_flood_fill(diagonal):
    g = torch.Generator().manual_seed(0)
    masks = [torch.rand(21, 21, generator=g) < p for p in (0.3, 0.41, 0.5, 0.6, 0.7)]
    masks += [spiral(21), spiral(21).flip(0, 1), torch.ones(21, 21, dtype=torch.bool)]
    found = components(torch.stack(masks), diagonal)
    for mask, label in zip(masks, found, strict=True):
        assert torch.equal(label, flooded(mask, diagonal))


def test_boxes_are_those_of_cct():
    """A loop over regions, as guided_cutout has it: room and side are rounded down."""
    g = torch.Generator().manual_seed(1)
    noise = torch.rand(3, 1, 40, 56, generator=g)
    mask = nn.functional.avg_pool2d(noise, 5, 1, 2)[:, 0] > 0.5
    found, u = outlines(mask), torch.rand(3, 2, 40 * 56, generator=g)
    erased = object_boxes(found, (40, 56), 0.4, 10, u)
    expected, boxes = torch.zeros_like(mask), 0
    for i in range(3):
        for j in (found.points[i] > 10).nonzero()[:, 0].tolist():
            edges = []
            for low, high, draw in ((found.top, found.bottom, 0), (found.left, found.right, 1)):
                low, length = int(low[i, j]), int(high[i, j] - low[i, j])
                start = low + int(float(u[i, draw, j]) * (int(length * (1 - 0.4)) + 1))
                edges.append(slice(start, start + int(length * 0.4)))
            expected[i][tuple(edges)] = True
            boxes += 1
    assert boxes > 5 and torch.equal(erased, expected)
    assert not object_boxes(found, (40, 56), least=10_000).any()
    x = torch.ones(3, 2, 40, 56)
    assert torch.equal(guided_cutout(x, erased)[:, 0] == 0, erased)


# The method


def batch_of(size: int = 2, side: int = 8) -> Batch:
    g = torch.Generator().manual_seed(0)
    image, weak = torch.randn(2, size, 3, side, side, generator=g)
    label = torch.randint(0, 2, (size, side, side), generator=g)
    return Batch(image, label, weak, (), torch.ones_like(label, dtype=torch.bool))


class Update:
    """Stands for the minimizer: keeps the loss and gradients by child."""

    def __call__(self, loss, *nets):
        self.loss, self.nets = loss.detach(), nets
        parts = [list(net.parameters()) for net in nets]
        grads = torch.autograd.grad(loss, sum(parts, []), allow_unused=True)
        self.grads = [[grads[len(sum(parts[:i], [])) + j] for j in range(len(p))]
                      for i, p in enumerate(parts)]  # fmt: skip
        return True


def test_loss_is_the_mean_over_auxiliary_classifiers(monkeypatch):
    """With the maps unperturbed it is the mean distance to the main classifier's softmax."""
    net = CCT(Pixelwise, vat=0, dropout=2, cutout=0, context=0, objects=1, drop=0, noise=1).train()
    assert net.kinds == ("dropout", "dropout", "objects", "noise") and len(net.auxiliary) == 4
    monkeypatch.setattr(CCT, "perturbed", lambda self, fused, *_: [fused] * 4)
    batch, update = batch_of(), Update()
    losses = net.step(batch, Clock(5, 10, 10), update)
    fused = net.student.encoder(batch.weak)
    probs = net.student.classifier(fused).softmax(1)
    each = [(aux.classifier(fused).softmax(1) - probs).square().mean() for aux in net.auxiliary]
    torch.testing.assert_close(losses["cons"], sum(each).detach() / 4)
    torch.testing.assert_close(losses["sup"], ce(net.student(batch.image), batch.label).detach())
    ramp = np.exp(-5 * (1 - 5 / 10) ** 2)  # 10 of 100 steps
    torch.testing.assert_close(update.loss, losses["sup"] + 30 * ramp * losses["cons"])
    assert update.nets == (net.student, net.auxiliary) and losses["kept"] == 1
    assert list(net.networks()) == ["student"]


def test_consistency_trains_encoder_and_auxiliary_classifiers_alone():
    net, grads = CCT(Pixelwise, ramp=0.0).train(), []
    void = batch_of()._replace(label=torch.full((2, 8, 8), IGNORE))
    for batch in (void, batch_of()):
        update = Update()
        net.step(batch, Clock(0, 1, 1), update)
        grads.append(update.grads)
    encoder, main = grads[0][0][:2], grads[0][0][2:]
    assert all(g.abs().max() > 0 for g in encoder) and all(not g.any() for g in main)
    assert all(g.abs().max() > 0 for g in grads[0][1])
    assert all(g.any() for g in grads[1][0][2:])  # which the labels train


def test_each_classifier_sees_its_own_perturbation():
    torch.manual_seed(0)
    net = CCT(Pixelwise, dropout=1, cutout=1, drop=1, noise=2, vat=1, context=1, objects=1).train()
    fused, valid = torch.rand(2, 3, 32, 32) + 1, torch.ones(2, 32, 32, dtype=torch.bool)
    logits = torch.zeros(2, 2, 32, 32)
    logits[:, 1, 4:28, 4:28] = torch.eye(2).repeat(12, 12)  # a net, whose outline zigzags
    seen = list(net.perturbed(fused, logits, valid))
    names = dict(zip(net.kinds, seen, strict=True))
    assert net.kinds == ("vat", "dropout", "cutout", "context", "objects", "drop", "noise", "noise")
    length = (names["vat"] - fused).flatten(1).norm(dim=1)
    torch.testing.assert_close(length, torch.full((2,), 2.0), rtol=0, atol=1e-3)
    channels = (names["dropout"] / fused).flatten(2)
    assert all(set(c.unique().tolist()) <= {0.0, 2.0} for image in channels for c in image)
    hole = names["cutout"][:, 0] == 0
    assert hole.sum((1, 2)).tolist() == [9 * 9] * 2  # 0.4 of 23 and of 23, rounded down
    assert torch.equal(names["context"] + names["objects"], fused)
    assert torch.equal(names["context"][:, 0] > 0, logits.argmax(1) > 0)
    assert 0 < (names["drop"] == 0).float().mean() < 1
    assert not torch.equal(seen[-2], seen[-1])


def test_misleading_perturbation_is_short_in_code(monkeypatch):
    lengths, real = [], cct.adversarial

    def adversarial(*arguments, **search):
        found = real(*arguments, **search)
        lengths.append(float(found.flatten(1).norm(dim=1).max()))
        return found

    monkeypatch.setattr(cct, "adversarial", adversarial)
    for preset in ("paper", "code"):
        torch.manual_seed(0)
        net = build_method(tiny_config(method="cct", preset=preset), 8)
        assert net.kinds.count("vat") == 2
        image = torch.randn(2, 3, 32, 32)
        valid = torch.ones(2, 32, 32, dtype=torch.bool)
        net.step(Batch(image, valid.long(), image, (), valid), Clock(1, 1, 3), Update())
    assert min(lengths[:2]) > 1.99 and max(lengths[2:]) < 0.5


def test_presets_have_the_released_numbers_of_classifiers():
    counts = {}
    for preset, values in CCT.presets.items():
        net = CCT(Pixelwise, **values)
        counts[preset] = [net.kinds.count(kind) for kind in cct.KINDS]
    released = [2, 6, 6, 2, 2, 6, 6]
    assert counts == {"paper": released, "code": released, "torchsemiseg": [0] + [2] * 6}
    assert [k for k in cct.KINDS if k not in CCT(Pixelwise, background=None).kinds] == [
        "cutout",
        "context",
        "objects",
    ]


def test_auxiliary_classifiers_start_differently_and_are_not_outlined_for_nothing(monkeypatch):
    net = CCT(Pixelwise)
    starts = [aux.classifier.weight for aux in net.auxiliary] + [net.student.classifier.weight]
    assert not any(equal(a, b) for i, a in enumerate(starts) for b in starts[:i])
    monkeypatch.setattr(guided, "components", None)
    net = CCT(Pixelwise, cutout=0).train()
    net.step(batch_of(), Clock(0, 1, 1), Update())


def test_annealed_cross_entropy_is_the_supervised_loss_of_torchsemiseg():
    batch, found = batch_of(), {}
    for preset in ("paper", "torchsemiseg"):
        torch.manual_seed(0)
        net = CCT(Pixelwise, **CCT.presets[preset]).train()
        logits = net.student(batch.image)
        found[preset] = net.step(batch, Clock(1, 10, 10), Update())["sup"]
        threshold = 0.5 + 0.49 * (1 - np.exp(-5 * 1 / 40))
        expected = ce(logits, batch.label)
        if preset == "torchsemiseg":
            expected = abce(logits, batch.label, threshold)
        torch.testing.assert_close(found[preset], expected.detach())
    assert found["paper"] != found["torchsemiseg"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict.fromkeys(cct.KINDS, 0), "no auxiliary classifier: choose 1 or more of vat, dropout"),
        ({"vat": -1}, "vat=-1: choose 0 or more"),
        ({"cons": "ce"}, "cons='ce': choose one of mse, kl, js"),
    ],
)
def test_wrong_hyper_parameters_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        CCT(Pixelwise, **arguments)
