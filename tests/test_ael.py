"""AEL: the bank, what it tilts, and its loss, written naively; the released code's differences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from s4lib.build import build_method
from s4lib.losses import IGNORE
from s4lib.method import Batch, Clock
from s4lib.methods.ael import AEL, class_confidence, reweighted_ce, sampled, sampling_rate
from s4lib.mixing import copy_paste, cutmix_class

K = 4


def draws(seed: int = 0, size: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    t = torch.Generator().manual_seed(seed)
    label = torch.randint(0, K - 1, (size, 10, 12), generator=t)  # class 3 is nowhere
    label[0, :3] = IGNORE
    return torch.randn(size, K, 10, 12, generator=t), label


def test_the_banks_new_entry_is_the_mean_probability_of_the_true_class():
    logits, label = draws()
    found, probs = class_confidence(logits, label), logits.double().softmax(1)
    for c in range(K - 1):
        wanted = probs[:, c][label == c].mean()
        assert found[c].item() == pytest.approx(wanted.item(), rel=1e-6)
    assert found[K - 1].isnan()


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_the_least_confident_class_counts_whole_and_others_less(beta):
    rate = sampling_rate(torch.tensor([0.9, 0.6, 0.2, 1.0]), beta)
    wanted = (torch.tensor([0.1, 0.4, 0.8, 0.0]) / 0.8) ** beta
    torch.testing.assert_close(rate, wanted)


def test_pixels_are_drawn_by_the_class_that_the_student_sees():
    logits, _ = draws()
    logits, rate = logits.repeat(1, 1, 20, 20), torch.tensor([0.0, 0.25, 1.0, 0.5])
    keep = sampled(logits, rate, torch.rand(3, 200, 240))
    shares = [keep[logits.argmax(1) == c].float().mean().item() for c in range(K)]
    assert shares == pytest.approx(rate.tolist(), abs=0.02)
    assert shares[0] == 0 and shares[2] == 1


def test_the_loss_is_a_mean_by_weight_in_which_void_weighs_but_has_no_loss():
    logits, label = draws()
    weight = torch.rand(3, 10, 12)
    logits.requires_grad_()
    loss = reweighted_ce(logits, label, weight)
    each = F.cross_entropy(logits.double(), label, ignore_index=IGNORE, reduction="none")
    wanted = (each * weight / weight.double().sum()).sum()
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=0)
    a, b = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss, wanted))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-8)
    assert reweighted_ce(logits, label, torch.zeros_like(weight)) == 0


def test_copied_pixels_are_the_partners_of_these_classes_alone():
    _, label = draws()
    mix = copy_paste(label, torch.tensor([False, True, False, True]), p=1.0)
    for i in range(3):
        partner = label[(i + 1) % 3]
        assert torch.equal(mix.mask[i], partner == 1)
        assert torch.equal(mix(label)[i], torch.where(partner == 1, partner, label[i]))
    assert not copy_paste(label, torch.ones(K, dtype=torch.bool), p=0.0).mask.any()


def test_an_image_is_pasted_on_with_its_probability():
    label = torch.zeros(4000, 1, 1, dtype=torch.int64)
    share = copy_paste(label, torch.ones(K, dtype=torch.bool), p=0.3).mask.float().mean()
    assert share.item() == pytest.approx(0.3, abs=0.03)


def test_a_box_holds_something_of_the_wanted_class_from_an_image_that_has_it():
    torch.manual_seed(0)
    label = torch.zeros(4, 16, 20, dtype=torch.int64)
    label[1, 0, 0], label[3, 9, 13], label[0, 15, 19] = 2, 2, 1
    seen = set()
    for _ in range(60):
        mix = cutmix_class(label, torch.tensor([2, 2, 1, 2]))
        partners = mix.partner.tolist()
        assert partners[0] in (1, 3) and partners[1] == 3 and partners[2] == 0 and partners[3] == 1
        seen.add(partners[0])
        for i, c in enumerate([2, 2, 1, 2]):
            assert (label[partners[i]] == c)[mix.mask[i]].any()
            rows, columns = mix.mask[i].any(1).sum(), mix.mask[i].any(0).sum()
            assert mix.mask[i].sum() == rows * columns  # a box, inside the image
            assert (rows * columns).item() == pytest.approx(160, abs=14)
    assert seen == {1, 3}


def test_a_class_that_nobody_shows_leaves_a_box_anywhere_of_any_other_image():
    torch.manual_seed(0)
    label = torch.zeros(3, 16, 16, dtype=torch.int64)
    found = [cutmix_class(label, torch.tensor([3, 3, 3])) for _ in range(200)]
    partners = torch.stack([mix.partner for mix in found])
    assert (partners != torch.arange(3)).all()
    assert {tuple(p) for p in partners[:, :2].tolist()} == {(1, 0), (1, 2), (2, 0), (2, 2)}
    covered = torch.stack([mix.mask.float().mean(0) for mix in found]).mean(0)
    assert covered.mean().item() == pytest.approx(0.5, abs=0.02) and covered.min() > 0.02
    alone = cutmix_class(label[:1], torch.tensor([3]))
    assert alone.partner.tolist() == [0]


def test_a_box_lies_anywhere_where_it_holds_the_pixel():
    torch.manual_seed(0)
    label = torch.zeros(2, 8, 8, dtype=torch.int64)
    label[:, 4, 4] = 1
    masks = [cutmix_class(label, torch.tensor([1, 1]), 0.25).mask for _ in range(300)]
    covered = torch.cat(masks).float().mean(0)
    assert covered[4, 4] == 1 and (covered.flatten() == 1).sum() == 1
    assert covered[0, 4] > 0 and covered[4, 0] > 0 and covered[7, 4] > 0 and covered[4, 7] > 0


def made(tiny, **changes):
    method = build_method(tiny(method="ael", method_args=changes), 8)
    t = torch.Generator().manual_seed(0)
    image, weak = torch.randn(2, 4, 3, 32, 32, generator=t)
    label = torch.randint(0, 7, (4, 32, 32), generator=t)  # class 7 is nowhere
    return method, Batch(image, label, weak, (), torch.ones(4, 32, 32, dtype=torch.bool))


def step(method, batch, clock=0):
    torch.manual_seed(0)
    return method.step(batch, Clock(clock, 1, 9), lambda loss, *nets: True)


def test_the_bank_moves_by_its_momentum_and_what_is_absent_stays_or_falls(tiny):
    for absent, factor in (("keep", 1.0), ("zero", 0.75)):
        method, batch = made(tiny, momentum=0.75, absent=absent, paste=0.0)
        method.confidence.fill_(0.4)
        with torch.no_grad():
            found = class_confidence(method.student(torch.cat([batch.image])), batch.label)
        step(method, batch)
        assert method.confidence[7].item() == pytest.approx(0.4 * factor)
        near = 0.75 * 0.4 + 0.25 * found[:7]  # but for BN, which sees the unlabeled images too
        torch.testing.assert_close(method.confidence[:7], near, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("tilt", "power", "wanted"),
    [
        ("norm", 1.0, torch.tensor([0.1, 0.5, 0.9])),
        ("softmax", 1.0, torch.tensor([0.1, 0.5, 0.9]).exp()),
        ("softmax", 0.5, torch.tensor([0.1, 0.5, 0.9]).sqrt().exp()),
    ],
)
def test_classes_are_drawn_by_what_they_lack(tiny, tilt, power, wanted):
    method, _ = made(tiny, tilt=tilt)
    method.confidence = torch.tensor([0.9, 0.5, 0.1])
    torch.manual_seed(0)
    share = method.drawn(20_000, power).bincount(minlength=3) / 20_000
    torch.testing.assert_close(share, wanted / wanted.sum(), rtol=0, atol=0.012)


def test_the_released_bank_starts_at_random_ours_at_zero(tiny):
    assert not made(tiny)[0].confidence.any()
    confidence = made(tiny, **AEL.presets["code"])[0].confidence
    assert confidence.min() > 0 and confidence.max() < 1 and confidence.std() > 0.05


def test_labeled_images_have_the_unlabeled_loss_only_in_the_code(tiny):
    losses = []
    for both in (False, True):
        method, batch = made(tiny, labeled_too=both)
        found = method.step(batch, Clock(0, 1, 9), lambda loss, *nets: losses.append(loss.item()))
        losses[-1] -= (found["sup"] + found["unsup"]).item()
    assert losses[0] == pytest.approx(0, abs=1e-6) and losses[1] > 0.5


def test_nothing_counts_where_every_class_is_certain(tiny):
    method, batch = made(tiny, momentum=1.0)
    method.confidence.fill_(1.0)
    found = step(method, batch)
    assert found["unsup"] == 0 and found["kept"] == 0
