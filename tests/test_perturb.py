"""Adversarial perturbations against hand-made, measured and float64 numbers."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from s4lib.perturb import adversarial

SIZE = (16, 16)


class Net(nn.Module):
    """What `adversarial` asks of a SegNet; logits are not enlarged."""

    def __init__(self, classifier: nn.Module):
        super().__init__()
        self.classifier = classifier.eval()

    def classify(self, fused, size):
        return self.classifier(fused)


def classifier(channels: int = 8, classes: int = 5) -> nn.Sequential:
    """That of psmt_vat.npz."""
    conv = nn.Conv2d(channels, 6, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, classes, 1))


@pytest.fixture
def nets() -> list[Net]:
    torch.manual_seed(0)
    found = [Net(classifier()) for _ in range(2)]
    for net in found:
        net.classifier[1].running_mean.normal_()
        net.classifier[1].running_var.uniform_(0.5, 2)
    return found


@pytest.fixture
def fused() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(3, 8, *SIZE).relu()


def linear(*rows: list[float]) -> Net:
    """Logits are a linear function of the features."""
    conv = nn.Conv2d(len(rows[0]), len(rows), 1, bias=False)
    conv.weight.data = torch.tensor(rows)[..., None, None]
    return Net(conv)


def starting_from(monkeypatch, value: torch.Tensor) -> None:
    for draw in ("randn_like", "rand_like"):
        monkeypatch.setattr(torch, draw, lambda like: value.to(like))


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(F.cosine_similarity(a.double().flatten(), b.double().flatten(), 0))


def lengths(r: torch.Tensor) -> torch.Tensor:
    return r.flatten(1).norm(dim=1)


def test_eq_1_gradient_of_kl_from_the_clean_to_the_noisy_prediction(monkeypatch):
    """Two classes with logits (x, 0) at two places: p is 1/2 and 3/4, with noise 3/4 and 9/10.

    The gradient of KL(p || q) with respect to the logit is q - p, so 0.25 and 0.15.
    """
    x = torch.tensor([0.0, math.log(3)]).view(1, 1, 1, 2)
    starting_from(monkeypatch, torch.ones(1, 1, 1, 2))
    r = adversarial(x, [linear([1.0], [0.0])], (1, 2), xi=math.sqrt(2) * math.log(3))
    expected = 2 * torch.tensor([5.0, 3.0]) / math.sqrt(34)
    torch.testing.assert_close(r.flatten(), expected)


def test_eq_1_asks_the_mean_of_both_classifiers(monkeypatch):
    """Logits (6 x, 0) and (8 y, 0): their mean rises along (3, 4)."""
    starting_from(monkeypatch, torch.ones(1, 2, 1, 1))
    both = [linear([6.0, 0], [0.0, 0]), linear([0.0, 8], [0.0, 0])]
    r = adversarial(torch.zeros(1, 2, 1, 1), both, (1, 1))
    torch.testing.assert_close(r.flatten(), torch.tensor([1.2, 1.6]))


def test_eq_2_has_length_eps_in_each_image_or_place(fused, nets):
    r = adversarial(fused, nets, SIZE)
    torch.testing.assert_close(lengths(r), torch.full((3,), 2.0), rtol=0, atol=1e-3)
    r = adversarial(fused, nets, SIZE, eps=0.5, iters=2)
    torch.testing.assert_close(lengths(r), torch.full((3,), 0.5), rtol=0, atol=1e-3)
    r = adversarial(fused, nets, SIZE, norm="pixel")
    torch.testing.assert_close(r.norm(dim=1), torch.full((3, *SIZE), 2.0), rtol=0, atol=1e-3)


def test_floor_is_added_to_lengths_of_noise_and_of_the_gradient_of_the_mean_image(monkeypatch):
    """Two images at logit 0, noise 1 / (1 + 1): q - p is 1/4, the gradient 2 ln 3 / 4 / 2."""
    starting_from(monkeypatch, torch.ones(2, 1, 1, 1))
    nets = [linear([1.0], [0.0])]
    r = adversarial(torch.zeros(2, 1, 1, 1), nets, (1, 1), xi=2 * math.log(3), floor=1.0)
    length = math.log(3) / 4
    torch.testing.assert_close(r.flatten(), torch.full((2,), 2 * length / (length + 1)))


def reference(x, start, nets, *, xi, norm, iters=1, eps=2.0) -> torch.Tensor:
    """Eq. 1 and 2 in float64, written down once more."""
    x, nets = x.double(), [copy.deepcopy(net).double() for net in nets]

    def unit(v):
        square = v.square().sum(1, keepdim=True)
        return v / (square if norm == "pixel" else square.sum((2, 3), keepdim=True)).sqrt()

    def probs(x):
        return torch.stack([net.classifier(x) for net in nets]).mean(0).softmax(1)

    d, p = unit(start.double()), probs(x).detach()
    for _ in range(iters):
        d.requires_grad_()
        (p * (p / probs(x + xi * d)).log()).sum().backward()
        d = unit(d.grad)
    return eps * d


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("iters", [1, 3])
@pytest.mark.parametrize("norm", ["sample", "pixel"])
def test_direction_is_that_of_float64(monkeypatch, fused, nets, norm, iters, autocast):
    start = torch.randn_like(fused)
    starting_from(monkeypatch, start)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        r = adversarial(fused, nets, SIZE, norm=norm, iters=iters)
    assert r.dtype == torch.float32
    assert cosine(r, reference(fused, start, nets, xi=0.1, norm=norm, iters=iters)) > 0.99


def test_half_precision_features_give_the_direction_of_the_same_numbers_in_float(
    monkeypatch, fused, nets
):
    start = torch.randn_like(fused)
    starting_from(monkeypatch, start)
    half = fused.bfloat16()
    r = adversarial(half, nets, SIZE)
    assert r.dtype == torch.float32
    assert cosine(r, reference(half, start, nets, xi=0.1, norm="sample")) > 0.99


def measured(golden) -> tuple[dict[str, torch.Tensor], list[Net]]:
    g, nets = golden("psmt_vat.npz"), []
    for name in ("dec1", "dec2"):
        net = Net(classifier())
        net.classifier.load_state_dict({k: g[f"{name}.{k}"] for k in net.classifier.state_dict()})
        nets.append(net)
    return g, nets


RELEASED = {"noise": "uniform", "floor": 1e-8}


def test_t_vat_is_that_of_ps_mt(golden, monkeypatch):
    """psmt_vat.npz at xi 0.1: 2e-4 with its floor under lengths; without, the direction."""
    g, nets = measured(golden)
    starting_from(monkeypatch, g["rand_u01"])
    ours = adversarial(g["features"], nets, SIZE, **RELEASED)
    torch.testing.assert_close(ours, g["r_f32_xi1em1"], rtol=2e-4, atol=1e-6)
    ours = adversarial(g["features"], nets, SIZE, noise="uniform")
    assert cosine(ours, g["r_f32_xi1em1"]) > 0.9999 and cosine(ours, g["r_f64_xi1em1"]) > 0.9999
    torch.testing.assert_close(lengths(ours), torch.full((2,), 2.0), rtol=0, atol=1e-3)
    assert (
        cosine(adversarial(g["features"], nets, SIZE, xi=10, **RELEASED), g["r_f32_xi10"]) > 0.9999
    )
    double = [net.double() for net in nets]
    ours = adversarial(g["features"].double(), double, SIZE, xi=1e-3, iters=3, **RELEASED)
    assert ours.dtype == torch.float64
    assert cosine(ours, g["r_f64_xi1em3_it3"]) > 0.9999


def test_released_xi_and_floor_leave_little_but_rounding_noise(golden, monkeypatch):
    """xi 1e-6: far shorter than eps 2, and not along eq. 1; with xi 0.1 it is both."""
    g, nets = measured(golden)
    starting_from(monkeypatch, g["rand_u01"])
    released = adversarial(g["features"], nets, SIZE, xi=1e-6, **RELEASED)
    assert 0 < lengths(released).max() < 1e-3
    assert abs(cosine(released, g["r_f64_xi1em6"])) < 0.3
    assert cosine(adversarial(g["features"], nets, SIZE, noise="uniform"), g["r_f64_xi1em6"]) > 0.99


def test_it_misleads_more_than_noise_of_its_length(fused, nets):
    def kl(r):
        with torch.no_grad():
            p, q = (sum(net.classify(x, SIZE) for net in nets) / 2 for x in (fused, fused + r))
            return float(F.kl_div(q.log_softmax(1), p.softmax(1), reduction="sum"))

    noise = adversarial(fused, nets, SIZE, iters=0)
    torch.testing.assert_close(lengths(noise), torch.full((3,), 2.0))
    assert kl(adversarial(fused, nets, SIZE)) > 3 * kl(noise) > 0


def test_images_do_not_depend_on_each_other(monkeypatch, fused, nets):
    start = torch.randn_like(fused)
    starting_from(monkeypatch, start)
    fused, nets = fused.double(), [net.double() for net in nets]
    together = adversarial(fused, nets, SIZE)
    starting_from(monkeypatch, start[1:2])
    torch.testing.assert_close(together[1:2], adversarial(fused[1:2], nets, SIZE))


def test_only_valid_pixels_are_asked():
    """Networks that see one pixel at a time: no change where predictions do not count."""
    net = linear([1.0, 2], [3.0, -1], [0.0, 1])
    valid = torch.rand(2, *SIZE) < 0.5
    r = adversarial(torch.randn(2, 2, *SIZE), [net], SIZE, valid)
    assert torch.equal((r.abs().sum(1) > 0), valid)


@pytest.mark.parametrize("norm", ["sample", "pixel"])
def test_no_gradient_gives_no_perturbation(fused, norm):
    constant = linear([0.0] * 8, [0.0] * 8)
    r = adversarial(fused, [constant], SIZE, norm=norm)
    assert torch.equal(r, torch.zeros_like(r))


def test_it_leaves_no_state_behind(fused, nets):
    """Modes mixed before are so after; no gradient, no BN statistic, no setting is left."""
    nets[0].classifier.train()
    nets[1].classifier.requires_grad_(False)
    before = [copy.deepcopy(net.state_dict()) for net in nets]
    inside = []
    nets[0].classifier.register_forward_hook(
        lambda module, *_: inside.append(
            (module.training, torch.is_autocast_enabled("cpu"), torch.backends.cudnn.allow_tf32)
        )
    )
    fused.requires_grad_()
    tf32 = torch.backends.cudnn.allow_tf32
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        r = adversarial(fused, nets, SIZE)
        assert torch.is_autocast_enabled("cpu") and not torch.is_grad_enabled()
    assert inside == [(False, False, False)] * 2
    assert torch.backends.cudnn.allow_tf32 == tf32
    assert nets[0].classifier.training and not nets[1].classifier.training
    for net, state in zip(nets, before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
        assert all(p.grad is None for p in net.parameters())
    assert fused.grad is None and not r.requires_grad


def test_wrong_names_are_refused(fused, nets):
    with pytest.raises(ValueError, match="norm='class': choose sample or pixel"):
        adversarial(fused, nets, SIZE, norm="class")
    with pytest.raises(ValueError, match="noise='salt': choose gaussian or uniform"):
        adversarial(fused, nets, SIZE, noise="salt")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_direction_is_that_of_float64_on_a_gpu(monkeypatch, amp):
    """At DeepLabV3+'s size, where TF32 convolutions, torch's default, would find another."""
    torch.manual_seed(0)
    x = torch.randn(1, 304, 64, 64).relu()
    nets = [Net(nn.Sequential(nn.Conv2d(304, 256, 3, padding=1), classifier(256))) for _ in "12"]
    start = torch.randn_like(x)
    starting_from(monkeypatch, start)
    expected = reference(x, start, nets, xi=0.1, norm="sample")
    with torch.autocast("cuda", amp):
        r = adversarial(x.cuda(), [net.cuda() for net in nets], (64, 64))
    assert cosine(r.cpu(), expected) > 0.99
