"""Losses by hand: one pixel or two, numbers that can be checked on paper."""

from __future__ import annotations

import math

import pytest
import torch

from s4lib.losses import IGNORE, ce, mse, pseudo_label


def logits_of(probs: list[list[float]]) -> torch.Tensor:
    """Logits (1, K, 1, W) whose softmax is `probs`, one list of K per pixel."""
    return torch.tensor(probs).log().T[None, :, None]


TWO = logits_of([[0.5, 0.5], [0.25, 0.75]])
LABEL = torch.tensor([[[0, 1]]])
A, B = math.log(2), math.log(4 / 3)  # cross-entropies of the two pixels


def test_ce_is_the_mean_of_minus_log_probability():
    assert ce(TWO, LABEL).item() == pytest.approx((A + B) / 2)


def test_ce_leaves_ignored_pixels_out_of_sum_and_count():
    label = torch.tensor([[[0, IGNORE]]])
    assert ce(TWO, label).item() == pytest.approx(A)
    assert ce(TWO, label, over="valid").item() == pytest.approx(A)
    assert ce(TWO, label, over="all").item() == pytest.approx(A / 2)


@pytest.mark.parametrize(("over", "count"), [("kept", 1), ("valid", 2), ("all", 3)])
def test_ce_divides_by_what_over_says(over, count):
    logits = logits_of([[0.5, 0.5], [0.25, 0.75], [0.9, 0.1]])
    label = torch.tensor([[[0, 1, IGNORE]]])
    keep = torch.tensor([[[False, True, True]]])
    assert ce(logits, label, keep=keep, over=over).item() == pytest.approx(B / count)


def test_ce_weighs_pixels_without_changing_the_count():
    weight = torch.tensor([[[2.0, 0.5]]])
    assert ce(TWO, LABEL, weight=weight).item() == pytest.approx((2 * A + 0.5 * B) / 2)


def test_ce_of_nothing_is_zero_with_a_gradient_of_zero():
    logits = TWO.clone().requires_grad_()
    loss = ce(logits, torch.full_like(LABEL, IGNORE))
    loss.backward()
    assert loss == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


def test_ce_at_a_dropped_pixel_may_be_infinite():
    logits = torch.tensor([[[[0.0, -math.inf]], [[0.0, 0.0]]]])
    assert ce(logits, LABEL * 0, keep=torch.tensor([[[True, False]]])).item() == pytest.approx(A)


def test_ce_of_half_precision_logits_is_computed_in_float32():
    logits = torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(0)).half()
    label = torch.zeros(2, 4, 4, dtype=torch.long)
    assert ce(logits, label).dtype == torch.float32
    assert ce(logits, label) == ce(logits.float(), label)


def test_ce_refuses_an_unknown_normaliser():
    with pytest.raises(ValueError, match="over=.mean.: .*kept.*valid.*all"):
        ce(TWO, LABEL, over="mean")


@pytest.mark.parametrize(("classes", "value"), [("mean", 1 / 16), ("sum", 1 / 8)])
def test_mse_conventions_differ_by_the_number_of_classes(classes, value):
    """Softmax (1/2, 1/2) against (1/4, 3/4): each class differs by 1/4."""
    logits, probs = logits_of([[0.5, 0.5]]), torch.tensor([0.25, 0.75]).view(1, 2, 1, 1)
    assert mse(logits, probs, classes=classes).item() == pytest.approx(value)


def test_mse_is_a_mean_over_valid_pixels():
    probs = torch.tensor([[0.25, 0.75], [1.0, 0.0]]).T[None, :, None]
    logits = logits_of([[0.5, 0.5], [0.5, 0.5]])
    valid = torch.tensor([[[True, False]]])
    assert mse(logits, probs, valid=valid).item() == pytest.approx(1 / 16)
    assert mse(logits, probs).item() == pytest.approx((1 / 16 + 1 / 4) / 2)
    assert mse(logits, probs, valid=~valid & valid) == 0


def test_mse_does_not_see_nan_in_padding():
    logits = torch.tensor([[[[0.0, math.nan]], [[0.0, 1.0]]]], requires_grad=True)
    loss = mse(logits, torch.full((1, 2, 1, 2), 0.5), valid=torch.tensor([[[True, False]]]))
    assert loss == 0


def test_mse_refuses_an_unknown_convention():
    with pytest.raises(ValueError, match="classes=.none.: .*mean.*sum"):
        mse(TWO, TWO.softmax(1), classes="none")


def test_pseudo_label_is_argmax_and_max_of_the_softmax():
    logits = logits_of([[0.1, 0.6, 0.3], [0.8, 0.1, 0.1]]).requires_grad_()
    label, confidence = pseudo_label(logits)
    assert label.tolist() == [[[1, 0]]]
    torch.testing.assert_close(confidence, torch.tensor([[[0.6, 0.8]]]))
    assert not confidence.requires_grad


def test_ce_agrees_with_a_plain_loop():
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 4, 3, 5, generator=g)
    label = torch.randint(0, 4, (2, 3, 5), generator=g)
    label[0, 0] = IGNORE
    keep = torch.rand(2, 3, 5, generator=g) < 0.5
    weight = torch.rand(2, 3, 5, generator=g)
    total, kept = 0.0, 0
    for b in range(2):
        for y in range(3):
            for x in range(5):
                if keep[b, y, x] and label[b, y, x] != IGNORE:
                    probs = logits[b, :, y, x].double().softmax(0)
                    total -= math.log(probs[label[b, y, x]]) * weight[b, y, x].item()
                    kept += 1
    assert 0 < kept < 25
    assert ce(logits, label, keep=keep, weight=weight).item() == pytest.approx(total / kept, 1e-5)
