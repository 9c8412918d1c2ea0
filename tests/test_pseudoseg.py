"""PseudoSeg: activation maps, attention and calibration against loops, who learns from what."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import tiny_config
from torch import nn

from s4lib.build import build_method
from s4lib.losses import IGNORE, ce
from s4lib.method import Batch, Clock
from s4lib.methods import pseudoseg
from s4lib.methods.pseudoseg import (
    PseudoSeg,
    Refiner,
    activation_maps,
    attend,
    calibrated,
    cutout_box,
    present,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def everywhere(b: int, h: int, w: int) -> torch.Tensor:
    return torch.ones(b, 1, h, w, dtype=torch.bool)


def test_activation_maps_are_grad_cam():
    """By autograd, as the released code takes them: mean gradients weigh channels, relu, max 1."""
    x = torch.randn(2, 6, 3, 4, generator=generator()).requires_grad_()
    linear, there = nn.Linear(6, 5), torch.tensor([[1.0, 1, 0, 1, 1], [1, 0, 1, 1, 1]])
    logits, expected = linear(x.mean((2, 3))), torch.zeros(2, 5, 3, 4)
    for c in range(5):
        (gradient,) = torch.autograd.grad(logits[:, c].sum(), x, retain_graph=True)
        cam = (gradient.mean((2, 3), keepdim=True) * x).sum(1).clamp(min=0).detach()
        cam = cam * there[:, c, None, None]
        expected[:, c] = cam / cam.amax((1, 2), keepdim=True).clamp(min=1e-12)
    found = activation_maps(x.detach(), linear.weight.detach(), there, everywhere(2, 3, 4))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert not found[0, 2].any() and found.amax() == pytest.approx(1)
    keep = everywhere(2, 3, 4)
    keep[..., 1:] = False
    part = activation_maps(x.detach(), linear.weight.detach(), there, keep)
    assert not part[..., 1:].any() and part[..., 0].amax() == pytest.approx(1)


def test_attention_by_a_loop():
    g = generator(1)
    q, k = torch.randn(2, 2, 7, 2, 3, generator=g)
    score, keep = torch.rand(2, 4, 2, 3, generator=g), everywhere(2, 2, 3)
    keep[1, :, :, 2] = False
    found = attend(q, k, score, keep)
    for b in range(2):
        for i in range(6):
            if not keep[b, 0].flatten()[i]:
                assert not found[b].flatten(1)[:, i].any()
                continue
            seen = [j for j in range(6) if keep[b, 0].flatten()[j]]
            alike = [q[b].flatten(1)[:, i] @ k[b].flatten(1)[:, j] / math.sqrt(7) for j in seen]
            weight = torch.stack(alike).softmax(0)
            value = score[b].flatten(1)
            expected = value[:, i] + sum(w * value[:, j] for w, j in zip(weight, seen, strict=True))
            torch.testing.assert_close(found[b].flatten(1)[:, i], expected)


def test_calibration_by_hand():
    """Logits (2, 0) and (0, 4): mean square 5. Two classes, one pixel."""
    one, two = torch.tensor([2.0, 0]).view(1, 2, 1, 1), torch.tensor([0.0, 4]).view(1, 2, 1, 1)
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    p = (sigmoid(2 / math.sqrt(5)) + sigmoid(-4 / math.sqrt(5))) / 2
    for t, expected in ((1.0, p), (0.5, p**2 / (p**2 + (1 - p) ** 2))):
        found = calibrated(one, two, t)
        assert float(found[0, 0]) == pytest.approx(expected, rel=1e-6)
        assert float(found.sum()) == pytest.approx(1)


def test_calibration_takes_the_scale_away_and_padding_with_it():
    g = generator(2)
    one, two = torch.randn(2, 3, 4, 5, 6, generator=g, dtype=torch.float64)
    both = torch.stack([one, two])
    scaled = both / (both.square().mean() + 1e-8).sqrt()
    mean = (scaled[0].softmax(1) + scaled[1].softmax(1)) / 2
    expected = mean.square() / mean.square().sum(1, keepdim=True)
    torch.testing.assert_close(calibrated(one, two).double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(calibrated(40 * one, 40 * two), calibrated(one, two))
    valid = torch.ones(3, 5, 6, dtype=torch.bool)
    valid[:, 2:] = False
    found = calibrated(one, two, 0.5, valid)[:, :, :2]
    torch.testing.assert_close(found, calibrated(one[:, :, :2], two[:, :, :2]))
    assert torch.isfinite(calibrated(one, two, 0.5, ~valid & valid)).all()


def test_classes_that_are_present():
    label = torch.tensor([[[0, 2], [2, IGNORE]], [[1, 1], [1, 1]]])
    assert present(label, 4).tolist() == [[True, False, True, False], [False, True, False, False]]


def test_boxes_have_their_size_about_any_pixel():
    torch.manual_seed(0)
    boxes = cutout_box(torch.zeros(400, 3, 20, 30), 0.2)
    rows, columns = boxes.any(2).sum(1), boxes.any(1).sum(1)
    assert torch.equal(boxes.sum((1, 2)), rows * columns)
    assert rows.max() == 4 and columns.max() == 6 and rows.min() == 2 and columns.min() == 3
    assert boxes.any(0).all() and not cutout_box(torch.zeros(4, 3, 20, 30), 0.0).any()


def test_refined_logits_by_their_parts():
    """Background is 2 less the largest score; a class that is not there scores 0."""
    torch.manual_seed(0)
    net = Refiner([3, 5], 4, 8).eval()
    nn.init.eye_(net.scale[0].weight[..., 0, 0].data)
    features, valid = (
        (torch.randn(2, 3, 8, 8), torch.randn(2, 5, 4, 4)),
        everywhere(2, 16, 16)[:, 0],
    )
    there = torch.tensor([[1.0, 0, 1], [0, 0, 0]])
    logits = net(features, valid, there) * math.sqrt(1 + 1e-5)
    score, keep = logits[:, 1:], everywhere(2, 4, 4)
    torch.testing.assert_close(logits[:, 0], 2 - score.amax(1))
    assert not score[0, 1].any() and not score[1].any() and score[0, 0].max() > 1
    maps = activation_maps(features[1], net.classifier.weight[..., 0, 0], there, keep)
    assert ((score >= maps - 1e-5) & (score <= maps + 1 + 1e-5)).all()
    assert Refiner([3, 5], 4, 8, background=False)(features, valid, torch.ones(2, 4)).shape[1] == 4


def test_images_are_classified_by_what_is_valid():
    net = Refiner([2], 3, 4)
    x, valid = torch.randn(1, 2, 4, 4), torch.ones(1, 4, 4, dtype=torch.bool)
    valid[:, 1:] = False
    expected = net.classifier(x[:, :, :1].mean((2, 3), keepdim=True))[..., 0, 0]
    torch.testing.assert_close(net.image_logits((x,), valid), expected)
    assert torch.isfinite(net.image_logits((x,), ~valid & valid)).all()


# The method


def batch_of(size: int = 4) -> Batch:
    g = generator()
    images = torch.randn(3, size, 3, 32, 32, generator=g)
    label = torch.randint(0, 8, (size, 4, 4), generator=g)
    label = label.repeat_interleave(8, 1).repeat_interleave(8, 2)
    valid = torch.ones(size, 32, 32, dtype=torch.bool)
    return Batch(images[0], label, images[1], (images[2],), valid)


class Update:
    """Stands for the minimizer: keeps the loss and gradients by name."""

    def __call__(self, loss, *nets):
        self.loss, self.grads = loss.detach(), {}
        named = [(f"{i}.{n}", p) for i, net in enumerate(nets) for n, p in net.named_parameters()]
        found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
        moved = [
            (n, g is not None and bool(g.any())) for (n, _), g in zip(named, found, strict=True)
        ]
        self.grads = dict(moved)
        return True


def method(**arguments) -> PseudoSeg:
    return build_method(tiny_config(method="pseudoseg", method_args=arguments), 8)


def test_labels_come_from_weak_views_and_are_for_strong_ones(monkeypatch):
    """The unlabeled loss by hand, at the size of the fused map and around the erased boxes."""
    net, batch, seen = method(), batch_of(), {}
    real = pseudoseg.calibrated
    monkeypatch.setattr(
        pseudoseg, "calibrated", lambda *a: seen.setdefault("probs", real(*a)) * 1.0
    )
    box = cutout_box(batch.weak, 0.2)
    monkeypatch.setattr(pseudoseg, "cutout_box", lambda *_: box)
    update = Update()
    losses = net.step(batch, Clock(0, 1, 1), update)
    view = batch.strong[0].masked_fill(box[:, None], 0)
    fused = net.student.fuse(net.student.encode(view))
    places = fused.shape[-2:]
    logits = net.student.classify(fused, places)
    assert places == (8, 8) and seen["probs"].shape == logits.shape
    each = -(seen["probs"] * logits.log_softmax(1)).sum(1)
    keep = ~box[:, ::4, ::4]
    torch.testing.assert_close(losses["unsup"], each[keep].mean().detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        losses["sup"], ce(net.student(batch.image), batch.label).detach(), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(update.loss, sum(losses.values()))


def test_image_classifier_is_taught_what_is_there():
    net, batch = method(), batch_of()
    losses = net.step(batch, Clock(0, 1, 1), Update())
    features = net.student.encode(batch.image)
    logits = net.refiner.classifier(features[-1].mean((2, 3), keepdim=True))[..., 0, 0]
    there = torch.stack([(batch.label == c).flatten(1).any(1) for c in range(1, 8)], 1).float()
    expected = nn.functional.binary_cross_entropy_with_logits(logits, there)
    torch.testing.assert_close(losses["image"], expected.detach(), rtol=1e-4, atol=1e-5)
    half = torch.where(torch.arange(4)[:, None, None] < 2, batch.label, IGNORE)
    losses = net.step(batch._replace(label=half), Clock(0, 1, 1), Update())
    assert 0 < losses["image"] and torch.isfinite(losses["image"])


@pytest.mark.parametrize(
    ("left", "learns"),
    [
        ("unsup", ["0.encoder", "0.decoder", "0.classifier"]),
        ("image", ["0.encoder", "1.classifier"]),
        ("attention", ["1.key", "1.query", "1.scale"]),
    ],
)
def test_each_loss_trains_its_own_parts(monkeypatch, left, learns):
    """Attention's gradient ends at its inputs; labels of unlabeled images have none."""
    weights = {"unsup": "weight", "image": "image_weight", "attention": "attention_weight"}
    net, update = method(**{w: float(name == left) for name, w in weights.items()}), Update()
    net.criterion = lambda logits, label: 0 * logits.sum()  # no labels for the student
    net.step(batch_of(), Clock(0, 1, 1), update)
    moved = {".".join(name.split(".")[:2]) for name, grad in update.grads.items() if grad}
    assert moved == set(learns)


def test_only_the_student_is_a_network():
    net = method(background=False)
    assert list(net.networks()) == ["student"]
    assert net.refiner.classifier.out_channels == 8
    assert torch.isfinite(net.step(batch_of(), Clock(0, 1, 1), Update())["attention"])
    with pytest.raises(ValueError, match="temperature=0.0: choose a number above 0"):
        method(temperature=0.0)
