"""Schedules and the exponential moving average, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from s4lib.method import Clock, ema, frozen_copy, joint
from s4lib.schedules import cosine, gaussian, gps_printed, linear_warmup, poly, ramp_up, warm_decay


def test_the_clock_counts_epochs_and_progress():
    clocks = [Clock(step, 4, 3) for step in range(12)]
    assert [c.epoch for c in clocks] == [0] * 4 + [1] * 4 + [2] * 4
    assert clocks[0].progress == 0 and clocks[6].progress == 0.5 and clocks[11].progress < 1
    assert clocks[0].steps == 12


def test_poly_falls_from_one_to_zero():
    assert poly(0) == 1 and poly(1) == 0
    assert poly(0.5) == pytest.approx(0.5**0.9)
    assert poly(0.75, power=2) == pytest.approx(1 / 16)


def test_ramp_up_is_gaussian_and_ends_at_its_share():
    def at(step, share):
        return ramp_up(Clock(step, 10, 10), share)

    assert at(0, 0.5) == pytest.approx(math.exp(-5))
    assert at(25, 0.5) == pytest.approx(math.exp(-5 / 4))
    assert at(50, 0.5) == at(99, 0.5) == 1
    assert at(0, 0) == 1
    values = [at(step, 0.8) for step in range(100)]
    assert values == sorted(values)


@pytest.mark.parametrize(
    ("ramp", "values"),
    [
        (cosine, (0, 0.14645, 0.5, 0.85355, 1)),
        (gaussian, (0.00674, 0.06005, 0.28650, 0.73162, 1)),
        (lambda x: gaussian(x, k=1), (0.36788, 0.56978, 0.77880, 0.93941, 1)),
        (gps_printed, (0.13534, 0.08208, 0.04979, 0.03020, 0.01832)),
    ],
)
def test_ramps_have_the_values_of_their_formulas(ramp, values):
    assert [ramp(x) for x in (0, 0.25, 0.5, 0.75, 1)] == pytest.approx(values, abs=1e-5)


@pytest.mark.parametrize("ramp", [cosine, gaussian])
def test_ramps_are_flat_outside_their_rise(ramp):
    assert ramp(-3) == ramp(0) < ramp(1e-3)
    assert ramp(1 - 1e-3) < ramp(1) == ramp(7) == 1


def test_warm_decay_begins_at_zero_and_stops_at_decay():
    assert [warm_decay(0.9, k) for k in (0, 1, 3, 9, 10, 999)] == [0, 0.5, 0.75, 0.9, 0.9, 0.9]


def test_during_warm_up_the_teacher_is_the_mean_of_its_students():
    teacher, student = nn.Linear(1, 1), nn.Linear(1, 1)
    seen = []
    for step in range(5):
        nn.init.constant_(student.weight, float(step**2))
        seen.append(float(step**2))
        ema(teacher, student, warm_decay(0.99, step))
        assert teacher.weight.item() == pytest.approx(sum(seen) / len(seen))


def nets() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    pair = [nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)) for _ in range(2)]
    for k, net in enumerate(pair):
        net[1].running_mean.fill_(4.0 * k)
        net[1].num_batches_tracked.fill_(10 * k)
    return tuple(pair)


@pytest.mark.parametrize(
    ("buffers", "mean", "count"), [("copy", 4, 10), ("ema", 1, 10), ("keep", 0, 0)]
)
def test_ema_treats_buffers_as_it_is_told(buffers, mean, count):
    target, source = nets()
    before = target[0].weight.clone()
    ema(target, source, 0.75, buffers)
    torch.testing.assert_close(target[0].weight, 0.75 * before + 0.25 * source[0].weight)
    assert target[1].running_mean.tolist() == [mean, mean]
    assert target[1].num_batches_tracked == count


def test_ema_works_in_place_and_leaves_the_source_alone():
    target, source = nets()
    pointer, kept = target[0].weight.data_ptr(), source[0].weight.clone()
    ema(target, source, 0.5)
    assert target[0].weight.data_ptr() == pointer != source[0].weight.data_ptr()
    assert torch.equal(source[0].weight, kept)
    assert target[1].running_mean.data_ptr() != source[1].running_mean.data_ptr()


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_ema_with_decay_zero_copies_and_with_one_rests(decay):
    target, source = nets()
    wanted = (source if decay == 0 else target)[0].weight.clone()
    ema(target, source, decay)
    assert torch.equal(target[0].weight, wanted)


def test_ema_refuses_other_architectures_and_unknown_words():
    target, source = nets()
    with pytest.raises(ValueError, match="buffers=.mean.: .*copy.*ema.*keep"):
        ema(target, source, 0.5, "mean")
    with pytest.raises(ValueError):
        ema(target, nn.Conv2d(2, 2, 1), 0.5)


def test_a_frozen_copy_takes_no_gradient_and_shares_nothing():
    net, _ = nets()
    copy = frozen_copy(net)
    assert not any(p.requires_grad for p in copy.parameters())
    assert all(p.requires_grad for p in net.parameters())
    assert torch.equal(copy[0].weight, net[0].weight)
    assert copy[0].weight.data_ptr() != net[0].weight.data_ptr()


def test_a_joint_pass_lets_batch_norm_see_all_images():
    net = nn.BatchNorm2d(1)
    low, high = torch.zeros(1, 1, 2, 2), torch.full((3, 1, 2, 2), 4.0)
    a, b = joint(net, low, high)
    assert a.shape == low.shape and b.shape == high.shape
    assert net.running_mean.item() == pytest.approx(0.1 * 3)
    assert a.mean() < -1 < b.mean() < 1


def test_linear_warmup_rises_to_one_over_its_share():
    factors = [linear_warmup(Clock(step, 10, 2), 0.2) for step in range(6)]
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert linear_warmup(Clock(0, 10, 2), 0.0) == 1.0
