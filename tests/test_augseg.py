"""AugSeg: the released losses and mixing, by arrays and by loops; what its presets change."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import LOSS, equal
from torch import nn

from s4lib.build import build_method
from s4lib.losses import IGNORE, ce, confidence_per_image, pseudo_label
from s4lib.method import Batch, Clock, ema, frozen_copy
from s4lib.methods import augseg
from s4lib.methods.augseg import AugSeg
from s4lib.mixing import Injection, Mix, boxes_beta, cutmix_beta, cutmix_inject, paste


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# Losses


@pytest.mark.parametrize("threshold", ["0.95", "-0.7"])
def test_loss_is_that_of_augseg(golden, threshold):
    """augseg_losses.npz: pseudo-labels exact, loss and kept share 1e-5, mean over *all* pixels."""
    g = golden("augseg_losses.npz")
    label, confidence = pseudo_label(g["teacher_logits"])
    assert torch.equal(label, g["pseudo_label"])
    torch.testing.assert_close(confidence, g["max_prob"], **LOSS)
    keep = (confidence >= float(threshold)) & (g["target"] != IGNORE)
    loss = ce(g["student_logits"], g["target"], keep=keep, over="all")
    torch.testing.assert_close(loss, g[f"unsup_loss_thr{threshold}"], **LOSS)
    torch.testing.assert_close(keep.float().mean(), g[f"ratio_thr{threshold}"], **LOSS)
    assert ce(g["student_logits"], g["target"], keep=keep, over="valid") > 1.05 * loss


def test_confidence_per_image_is_that_of_augseg(golden):
    """augseg_losses.npz; 1e-5."""
    g = golden("augseg_losses.npz")
    found = confidence_per_image(g["teacher_logits"])
    torch.testing.assert_close(found, g["confidence_per_image"], **LOSS)
    swapped = confidence_per_image(g["teacher_logits"].flip(0))
    torch.testing.assert_close(swapped, found.flip(0))


def test_confidence_per_image_by_hand():
    """Two classes: (1/2, 1/2) has none; (1/4, 3/4) has 3/4 (1 - H / ln 2); a sure one has 1."""
    logits = torch.tensor([[0.5, 0.25, 0.0], [0.5, 0.75, 1.0]]).log()[None, :, None]
    logits = logits.clamp(min=-1e4)
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    quarter = 0.75 * (1 - entropy / math.log(2))
    assert confidence_per_image(logits).item() == pytest.approx((0 + quarter + 1) / 3, rel=1e-5)
    valid = torch.tensor([[[True, False, True]]])
    assert confidence_per_image(logits, valid).item() == pytest.approx(0.5, rel=1e-5)
    assert confidence_per_image(logits, ~valid).item() == pytest.approx(quarter, rel=1e-5)
    assert confidence_per_image(logits, valid & False).item() == 0


def test_confidence_per_image_takes_infinitely_sure_logits():
    logits = torch.tensor([200.0, -200, -200]).view(1, 3, 1, 1)
    assert confidence_per_image(logits).item() == pytest.approx(1)


# Label-injecting CutMix


def boxes(b: int, h: int, w: int, generator: torch.Generator) -> torch.Tensor:
    """Any boxes, one per image."""
    masks = torch.zeros(b, h, w, dtype=torch.bool)
    for mask in masks:
        top, left = (int(torch.randint(0, n, (), generator=generator)) for n in (h, w))
        mask[top : top + h // 2, left : left + w // 2] = True
    return masks


@pytest.mark.parametrize("seed", range(4))
def test_injection_is_the_released_loops(seed):
    """Copies take labeled boxes where told to, then images take boxes of their partner's copy."""
    g = torch.Generator().manual_seed(seed)
    b, h, w = 5, 9, 12
    unlabeled, labeled = (torch.randn(b, 3, h, w, generator=g) for _ in range(2))
    inner, outer = boxes(b, h, w, g), boxes(b, h, w, g)
    told, partner = torch.rand(b, generator=g) < 0.5, torch.randperm(b, generator=g)
    copy, expected = unlabeled.clone(), unlabeled.clone()
    for i in range(b):
        for y in range(h):
            for x in range(w):
                if told[i] and inner[i, y, x]:
                    copy[i, :, y, x] = labeled[partner[i], :, y, x]
    for i in range(b):
        for y in range(h):
            for x in range(w):
                if outer[i, y, x]:
                    expected[i, :, y, x] = copy[partner[i], :, y, x]
    mix = Injection(Mix(inner & told[:, None, None], partner), Mix(outer, partner))
    assert torch.equal(mix(unlabeled, labeled), expected)
    assert torch.equal(mix(unlabeled[:, 0], labeled[:, 0]), expected[:, 0])
    assert not torch.equal(expected, Mix(outer, partner)(unlabeled)) or not told.any()


def test_paste_of_a_batch_into_itself_is_mixing():
    x = torch.randn(4, 2, 8, 8)
    mix = cutmix_beta(x)
    assert torch.equal(paste(mix, x, x), mix(x)) and torch.equal(
        paste(mix, x[:, 0], x[:, 0]), mix(x[:, 0])
    )
    other = torch.randn(6, 2, 8, 8)
    shown = paste(Mix(mix.mask, mix.partner + 2), other, x)
    assert torch.equal(shown, torch.where(mix.mask[:, None], other[mix.partner + 2], x))


def test_boxes_of_beta_4_4_are_those_of_cutmix_beta():
    like = torch.zeros(6, 3, 33, 40)
    for seed in range(5):
        torch.manual_seed(seed)
        mask = boxes_beta(like, 4.0, 4.0)
        torch.manual_seed(seed)
        assert torch.equal(mask, cutmix_beta(like, 4.0).mask)


def test_labeled_boxes_are_small():
    """Uncut areas are 1 - s with s ~ Beta(8, 2): mean 0.2, deviation 0.12. All of a batch are one
    size, so the largest is uncut but for big ones."""
    like = torch.zeros(32, 1, 64, 64)
    draws = [boxes_beta(like, 8.0, 2.0).float().mean((1, 2)).amax() for _ in range(300)]
    share = torch.stack(draws)
    assert abs(share.mean() - 0.2) < 0.025 and abs(share.std() - 0.12) < 0.02
    assert boxes_beta(like, 4.0, 4.0).shape == (32, 64, 64)


def test_a_box_is_injected_with_probability_one_minus_score():
    like = torch.zeros(4, 3, 32, 32)
    score = torch.tensor([0.0, 0.3, 0.9, 1.0])
    drawn = torch.stack(
        [cutmix_inject(like, like, score).inject.mask.flatten(1).any(1) for _ in range(600)]
    )
    share = drawn.float().mean(0)
    assert share[0] == 1 and share[3] == 0
    assert abs(share[1] - 0.7) < 0.07 and abs(share[2] - 0.1) < 0.05


def test_one_permutation_for_labeled_images_and_partners():
    like = torch.zeros(6, 3, 16, 16)
    seen = set()
    for _ in range(20):
        mix = cutmix_inject(like, like, torch.zeros(6))
        assert torch.equal(mix.inject.partner, mix.mix.partner)
        assert mix.mix.partner.sort().values.tolist() == list(range(6))
        seen.add(tuple(mix.mix.partner.tolist()))
        fewer = cutmix_inject(like, like[:4], torch.zeros(6))
        assert torch.equal(fewer.inject.partner, fewer.mix.partner % 4)
    assert len(seen) > 10


# The step


class Identity(nn.Module):
    """A SegNet whose logits are its image plus a learnt shift; remembers images and modes."""

    def __init__(self):
        super().__init__()
        self.classifier = nn.Conv2d(3, 3, 1, groups=3)
        nn.init.ones_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)
        self.seen = []

    def forward(self, image):
        self.seen.append((image, self.training))
        return self.classifier(image)


class Update:
    """A `minimize` that descends and remembers losses."""

    def __init__(self, updates: bool = True):
        self.updates, self.losses = updates, []

    def __call__(self, loss, *nets):
        self.losses.append(loss.detach())
        parameters = [p for net in nets for p in net.parameters()]
        for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            p.data -= 0.1 * g * self.updates
        return self.updates


def batch_of(u: int = 4, size: int = 16) -> Batch:
    image, weak, strong = (4 * torch.randn(u, 3, size, size) for _ in range(3))
    weak[0] *= 3  # the teacher is surer of this one
    valid = torch.ones(u, size, size, dtype=torch.bool)
    valid[1, :, 9:] = False
    label = torch.randint(0, 3, (u, size, size))
    label[:, :3] = IGNORE
    return Batch(image, label, weak, (strong,), valid)


@pytest.fixture
def mixes(monkeypatch) -> list[tuple[Injection, torch.Tensor]]:
    """What the next steps draw, and for which scores."""
    found, real = [], augseg.cutmix_inject

    def draw(like, labeled, score):
        found.append((real(like, labeled, score), score))
        return found[-1][0]

    monkeypatch.setattr(augseg, "cutmix_inject", draw)
    return found


@pytest.mark.parametrize("preset", ["paper", "code"])
def test_eq_a_step_is_the_released_one_with_padding_void_in_paper(mixes, preset):
    """Ground truth counts where a labeled box is seen, its void not; labels are confidence 1."""
    method, batch = AugSeg(Identity, **AugSeg.presets[preset]).train(), batch_of()
    with torch.no_grad():
        method.teacher.classifier.bias[0] = 2.0
    teacher, update = frozen_copy(method.teacher), Update(updates=False)
    found = method.step(batch, Clock(0, 1, 3), update)
    ((mix, score),) = mixes
    valid = batch.valid if preset == "paper" else torch.ones_like(batch.valid)
    probs = teacher(batch.weak).softmax(1)
    confidence, label = probs.max(1)
    entropy = -(probs * (probs + 1e-10).log()).sum(1) / math.log(3)
    expected = [((1 - e) * c)[v].mean() for e, c, v in zip(entropy, confidence, valid, strict=True)]
    torch.testing.assert_close(score, torch.stack(expected), **LOSS)
    assert score.argmax() == 0
    label = torch.where(valid, label, IGNORE)
    target = mix(label, batch.label)
    sure = mix(confidence, torch.ones_like(confidence)) >= 0.95
    image = mix(batch.strong[0], batch.image)
    each = F.cross_entropy(image, target, ignore_index=IGNORE, reduction="none")
    keep = sure & (target != IGNORE)
    torch.testing.assert_close(found["unsup"], (each * keep).mean())
    torch.testing.assert_close(update.losses[0], found["sup"] + found["unsup"])
    assert found["sup"] == ce(batch.image, batch.label)
    assert found["kept"] == keep.float().mean()
    ((seen, mode),) = method.student.seen
    assert mode and torch.equal(seen, torch.cat([batch.image, image]))
    ((seen, mode),) = method.teacher.seen
    assert not mode and seen is batch.weak
    assert mix.inject.mask.any() and not torch.equal(target, mix.mix(label))


def test_extra_weak_views_go_through_the_student_for_nothing_but_bn(mixes):
    batch, found = batch_of(), []
    for extra in (False, True):
        torch.manual_seed(1)
        method = AugSeg(Identity, extra_weak=extra).train()
        found.append(method.step(batch, Clock(0, 1, 3), Update()))
        ((image, _),) = method.student.seen
        assert len(image) == (12 if extra else 8)
        assert not extra or torch.equal(image[4:8], batch.weak)
    assert equal(*found)  # this network has no BN


@pytest.mark.parametrize(("inject", "share"), [("always", 1.0), ("never", 0.0)])
def test_labeled_boxes_always_or_never(mixes, inject, share):
    method, batch = AugSeg(Identity, inject=inject).train(), batch_of()
    for _ in range(10):
        method.step(batch, Clock(0, 1, 3), Update(updates=False))
    drawn = torch.stack([mix.inject.mask.flatten(1).any(1) for mix, _ in mixes]).float()
    assert drawn.mean() == share


def test_the_teacher_is_a_copy_in_codes_first_epoch_and_then_an_average(tiny):
    """decay: 0 in epoch 0, then min(1 - 1/(step + 1), 0.999), buffers too."""
    g = torch.Generator().manual_seed(0)
    images = [torch.randn(4, 3, 32, 32, generator=g) for _ in range(3)]
    label = torch.randint(0, 8, (4, 32, 32), generator=g)
    batch = Batch(images[0], label, images[1], (images[2],), torch.ones_like(label) > 0)
    for preset, decays in (
        ("paper", {0: 0.0, 1: 0.5, 9: 0.9, 10: 10 / 11, 5000: 0.999}),
        ("code", {0: 0.0, 1: 0.0, 9: 0.0, 10: 10 / 11, 5000: 0.999}),
    ):
        method = build_method(tiny(method="augseg", preset=preset), 8)
        expected = frozen_copy(method.teacher)
        for step, decay in decays.items():
            method.step(batch, Clock(step, 10, 600), Update())
            ema(expected, method.student, decay, "ema")
            assert equal(dict(expected.state_dict()), dict(method.teacher.state_dict())), step
        accumulated = frozen_copy(method.teacher)
        method.step(batch, Clock(5001, 10, 600), Update(updates=False))
        assert equal(dict(accumulated.state_dict()), dict(method.teacher.state_dict()))


def test_fewer_labeled_than_unlabeled_images_work():
    batch = batch_of()
    batch = batch._replace(image=batch.image[:2], label=batch.label[:2])
    found = AugSeg(Identity).train().step(batch, Clock(0, 1, 3), Update())
    assert all(torch.isfinite(value) for value in found.values())
