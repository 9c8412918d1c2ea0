"""GCT: flaw maps against the released procedure, who learns from whom and from what."""

from __future__ import annotations

import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import nn

from s4lib.flaws import (
    FlawDetector,
    IBNorm,
    dynamic_targets,
    flaw_map,
    flaw_target,
    gaussian_blur,
    odd,
)
from s4lib.losses import IGNORE, ce
from s4lib.method import Batch, Clock
from s4lib.methods.gct import GCT
from s4lib.schedules import gaussian


def window(size: int) -> torch.Tensor:
    """As the released code makes it: scipy blurs a window with a single one in its middle."""
    one = torch.zeros(size, size, dtype=torch.float64)
    one[size // 2, size // 2] = 1
    sigma = 0.3 * ((size - 1) / 2 - 1) + 0.8
    return torch.from_numpy(gaussian_filter(one.numpy(), sigma))


def blurred(x: torch.Tensor, size: int) -> torch.Tensor:
    padded = nn.functional.pad(x, (size // 2,) * 4, mode="reflect")
    return nn.functional.conv2d(padded, window(size)[None, None])


@pytest.mark.parametrize("size", [1, 3, 5, 9, 33])
def test_blur_is_that_of_the_released_code(size):
    g = torch.Generator().manual_seed(size)
    x = torch.rand(2, 1, 40, 37, generator=g, dtype=torch.float64)
    torch.testing.assert_close(gaussian_blur(x, size), blurred(x, size), rtol=1e-12, atol=1e-12)
    assert (odd(size), odd(size + 1)) == (size, size + 2)


@pytest.mark.parametrize("size", [4, 17])
def test_a_window_that_does_not_fit_is_refused(size):
    with pytest.raises(ValueError, match=f"size={size}: choose an odd window below twice 8"):
        gaussian_blur(torch.zeros(1, 1, 8, 20), size)


@pytest.mark.parametrize("nu", [0, 1, 3])
def test_targets_are_those_of_the_released_code(nu):
    """Class by class, step by step, in float64; IGNORE has a one-hot of zeros."""
    g = torch.Generator().manual_seed(0)
    probs = torch.randn(3, 5, 32, 24, generator=g, dtype=torch.float64).mul(3).softmax(1)
    label = torch.randint(0, 5, (3, 4, 3), generator=g)
    label = label.repeat_interleave(8, 1).repeat_interleave(8, 2)
    label[:, :8, :8] = IGNORE
    one_hot = torch.stack([label == c for c in range(5)], 1).double()
    flaw = (one_hot - probs).abs().sum(1, keepdim=True) * 0.5
    flaw = blurred(flaw, 5)  # 32 / 8, odd
    for _ in range(nu):
        flaw = nn.functional.pad(flaw, (1,) * 4, mode="reflect")
        flaw = blurred(nn.functional.max_pool2d(flaw, 3, 1), 9)  # 32 / 4, odd
    expected = torch.stack([(f - f.min()) / (f.max() - f.min() + 1e-9) for f in flaw])
    found = flaw_target(probs, label, nu=nu)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_target_by_hand():
    """Sure and right but for a block, which is sure and wrong; void lies between, at one half."""
    label, probs = torch.zeros(1, 32, 32, dtype=torch.int64), torch.zeros(1, 2, 32, 32)
    probs[:, 0] = 1
    label[:, 12:20, 4:12] = 1
    label[:, 12:20, 20:28] = IGNORE
    flaw = flaw_target(probs, label, nu=0)[0, 0]
    assert flaw[16, 8] == 1 and flaw[16, 24] == pytest.approx(0.5, abs=1e-5) and flaw[2, 2] == 0
    weak = flaw_target(probs, label, mu=0.01, nu=0)[0, 0]
    torch.testing.assert_close(weak, flaw, rtol=1e-4, atol=1e-5)  # stretching undoes mu


def test_maps_are_clipped_blurred_and_stretched():
    g = torch.Generator().manual_seed(0)
    raw = torch.randn(3, 1, 48, 32, generator=g)
    raw[1] = raw[1] * 0.01 + 0.03  # nowhere above 0.1
    before = raw.clone()
    soft = blurred(raw.clamp(min=0).double(), 3)  # 48 / 16
    expected = torch.stack([(f - f.min()) / (f.max() - f.min() + 1e-9) for f in soft]).float()
    found, released = flaw_map(raw), flaw_map(raw, released=True)
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]], rtol=1e-5, atol=1e-5)
    assert not found[1].any() and torch.equal(raw, before)
    torch.testing.assert_close(released[[0, 2]], expected[[0, 2]], rtol=1e-5, atol=1e-5)
    constant = -soft[1].min() / (soft[1].max() - soft[1].min() + 1e-9)
    torch.testing.assert_close(released[1], constant.float().expand(1, 48, 32), rtol=1e-4, atol=0)
    assert constant < -0.1


def test_targets_come_from_the_less_flawed_network():
    """Own, theirs, own at a tie; beyond 0.6 all flaws are alike: both keep their own, both bad."""
    probs = [torch.full((1, 2, 1, 5), v) for v in (0.25, 0.75)]
    flaws = [torch.tensor(v).view(1, 1, 1, 5) for v in ([0.1, 0.5, 0.3, 0.7, 0.9],
                                                        [0.2, 0.4, 0.3, 0.8, 0.6])]  # fmt: skip
    one, two, bad = dynamic_targets(probs, flaws)
    assert one[0, 0, 0].tolist() == [0.25, 0.75, 0.25, 0.25, 0.75]
    assert two[0, 0, 0].tolist() == [0.25, 0.75, 0.75, 0.75, 0.75]
    assert bad[0, 0, 0].tolist() == [False, False, False, True, False]  # 0.6 is not above 0.6


def test_half_of_the_channels_are_normalised_by_image():
    norm, x = IBNorm(5), torch.randn(4, 5, 6, 6) * 3 + 2
    x[0] += 10
    y = norm(x)
    by_image = y[:, 3:].mean((2, 3))
    torch.testing.assert_close(by_image, torch.zeros_like(by_image), atol=1e-5, rtol=0)
    torch.testing.assert_close(y[:, :3].mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    assert y[0, :3].mean() > 1 and len(list(norm.parameters())) == 2


def test_the_detector_is_the_papers():
    """Channels, strides; the number of parameters is that of the sums by hand."""
    net = FlawDetector(21).eval()
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    shapes = [(c.in_channels, c.out_channels, c.kernel_size[0], c.stride[0]) for c in convs]
    widths, strides = [24, 64, 128, 128, 256, 256, 512, 512, 1], [2, 2, 1, 2, 1, 2, 1, 2]
    assert shapes == [(*widths[i : i + 2], 4, strides[i]) for i in range(8)]
    small = FlawDetector(3, 4)
    for size in ((32, 32), (70, 90)):
        assert small(torch.rand(2, 3, *size), torch.rand(2, 3, *size)).shape == (2, 1, *size)


# The method


class Pixelwise(nn.Module):
    """A SegNet of one 1 x 1 convolution with three classes."""

    def __init__(self, **changes):
        super().__init__()
        self.classifier = nn.Conv2d(3, 3, 1)

    def forward(self, image):
        return self.classifier(image)


class Update:
    """Stands for the minimizer: keeps losses, gradients and children."""

    def __init__(self, lr: float = 0.0):
        self.lr, self.losses, self.nets, self.grads = lr, [], [], []

    def __call__(self, loss, *nets):
        parameters = [p for net in nets for p in net.parameters()]
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        for p, grad in zip(parameters, grads, strict=True):
            if grad is not None:
                p.data.sub_(self.lr * grad)
        self.losses.append(loss.detach())
        self.nets.append(nets)
        self.grads.append(grads)
        return True


def method(**arguments) -> GCT:
    torch.manual_seed(0)
    return GCT(Pixelwise, detector_width=2, **arguments).train()


def batch_of(size: int = 2) -> Batch:
    g = torch.Generator().manual_seed(0)
    image, weak = torch.randn(2, size, 3, 64, 64, generator=g)
    label = torch.randint(0, 3, (size, 64, 64), generator=g)
    return Batch(image, label, weak, (), torch.ones_like(label, dtype=torch.bool))


def flawed(net: GCT, monkeypatch, *maps: torch.Tensor) -> None:
    """Let the detector say `maps` in turn, plus nothing times what it is asked about."""
    queue = list(maps)
    monkeypatch.setattr(
        net.detector, "forward", lambda image, probs: queue.pop(0) + 0 * probs.sum(1, keepdim=True)
    )


@pytest.mark.parametrize(("ramp", "share"), [(4.0, gaussian(0.5)), (0.0, 1.0)])
def test_losses_of_a_step_by_hand(monkeypatch, ramp, share):
    """The first network is flawed on the left, the second on the right, both below."""
    net, batch, update = method(ramp_epochs=ramp), batch_of(), Update()
    for p in net.detector.parameters():
        p.requires_grad_(False)
    left = torch.zeros(4, 1, 64, 64)
    left[..., :32] = 0.5
    left[:, :, 48:] = 1
    right = left.flip(3)
    flawed(net, monkeypatch, left, right, left, right)
    monkeypatch.setattr("s4lib.methods.gct.flaw_map", lambda raw, released: raw)
    update_fd = []
    losses = net.step(
        batch,
        Clock(20, 10, 10),
        lambda loss, *nets: (
            update(loss, *nets) if nets[0] is net.students else update_fd.append(loss)
        ),
    )
    probs = [n(torch.cat([batch.image, batch.weak])).softmax(1).detach() for n in net.students]
    own = (probs[0] - probs[1]).square().mean(1)
    wrong = torch.cat([own[:, :48, :32].flatten(), own[:, :48, 32:].flatten()]).sum()
    torch.testing.assert_close(losses["dc"], wrong / (4 * 64 * 64))
    torch.testing.assert_close(losses["bad"], torch.tensor(0.25))
    torch.testing.assert_close(losses["fc"], torch.tensor(0.5))  # a quarter of the pixels, twice
    sup = sum(ce(n(batch.image), batch.label) for n in net.students).detach()
    total = sup + 100 * share * losses["dc"] + losses["fc"]
    torch.testing.assert_close(update.losses[0], total)
    truth = [flaw_target(p[:2], batch.label) for p in probs]
    fd = sum((f[:2] - t).square().mean() for f, t in zip((left, right), truth, strict=True)) / 2
    torch.testing.assert_close(losses["fd"], fd)
    torch.testing.assert_close(update_fd[0].detach(), 10 * fd)


def test_networks_and_detector_learn_in_turn_and_apart():
    net, update = method(), Update()
    losses = net.step(batch_of(), Clock(0, 1, 2), update)
    assert update.nets == [(net.students,), (net.detector,)]
    assert all(g is not None and g.abs().max() > 0 for grads in update.grads[:1] for g in grads)
    assert sum(g is not None and g.abs().max() > 0 for g in update.grads[1]) > 10
    assert list(net.networks()) == ["students.0", "students.1"]
    assert set(losses) == {"sup", "dc", "fc", "fd", "bad"}


def test_flaw_correction_reaches_the_networks_through_the_detector():
    """Without labels and consistency it is what is left."""
    net, update = method(dc_weight=0.0, flaw_threshold=-1.0), Update()
    void = torch.full((2, 64, 64), IGNORE)
    losses = net.step(batch_of()._replace(label=void), Clock(0, 1, 2), update)
    assert losses["sup"] == 0 and losses["fd"] == 0 and losses["bad"] == 1 and losses["fc"] > 0
    assert all(g.abs().max() > 0 for g in update.grads[0])


@pytest.mark.parametrize("released", [False, True])
def test_released_code_cuts_negative_flaws_off_but_not_their_gradient(monkeypatch, released):
    net = method(released=released)
    bias = nn.Parameter(torch.tensor(-0.5))
    monkeypatch.setattr(net.detector, "forward", lambda image, probs: bias.expand(4, 1, 64, 64))
    batch, found = batch_of(), []

    def minimize(loss, *nets):
        found.append((loss.detach(), *torch.autograd.grad(loss, bias)))

    net.step(batch, Clock(0, 1, 2), minimize)
    plain = [n(batch.image).softmax(1) for n in net.students]
    truth = torch.stack([flaw_target(p, batch.label) for p in plain])
    seen = 0.0 if released else -0.5
    torch.testing.assert_close(found[1][0], 10 * (seen - truth).square().mean())
    torch.testing.assert_close(found[1][1], 20 * (seen - truth).mean())


def test_the_detector_sees_updated_networks_if_told_to(monkeypatch):
    asked = {}
    for updated in (False, True):
        net, batch = method(updated=updated), batch_of()
        real, seen = net.detector.forward, []
        monkeypatch.setattr(
            net.detector, "forward", lambda i, p, r=real, s=seen: s.append(p.detach()) or r(i, p)
        )
        net.step(batch, Clock(0, 1, 2), Update(lr=0.1))
        asked[updated] = [torch.equal(seen[i], seen[i + 2]) for i in range(2)]
        now = net.students[0](torch.cat([batch.image, batch.weak])).softmax(1)
        assert torch.allclose(now, seen[2], atol=1e-6) == updated
    assert asked == {False: [True, True], True: [False, False]}


def test_schedules_of_networks_and_detector():
    clock = Clock(5, 1, 10)
    for lr, expected in (("poly", 0.5), ("const", 0.0)):
        net = method(detector_lr=lr)
        assert net.schedule("students", clock) == 0.5
        assert net.schedule("detector", clock) == expected


@pytest.mark.parametrize("padding", [False, True])
def test_padding_counts_only_if_told_to(padding):
    found = []
    for value in (0.0, 5.0):
        net, batch = method(padding=padding), batch_of()
        valid = batch.valid.clone()
        valid[:, 40:] = False
        fill = {k: getattr(batch, k).masked_fill(~valid[:, None], value) for k in ("image", "weak")}
        batch = batch._replace(**fill, valid=valid, label=torch.where(valid, batch.label, IGNORE))
        found.append(net.step(batch, Clock(0, 1, 2), Update()))
    same = [bool(found[0][k] == found[1][k]) for k in ("sup", "dc", "fc", "fd")]
    assert same[0] and all(same) != padding
