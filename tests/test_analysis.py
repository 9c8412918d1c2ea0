"""Measurements on trained networks, each on an example small enough to compute by hand."""

import numpy as np
import pytest
import torch
from torch import nn

from s4lib import trained
from s4lib.book import analysis, probe, tables
from s4lib.book.analysis import Predictions
from s4lib.data import open_dataset
from s4lib.losses import IGNORE
from s4lib.method import ema, frozen_copy
from s4lib.nets import build_net
from s4lib.perturb import stochastic_depth
from s4lib.schedules import warm_decay


def given(label, confidence, truth) -> Predictions:
    """One image of one row."""
    label, truth = (torch.tensor([[values]], dtype=torch.uint8) for values in (label, truth))
    return Predictions(label, torch.tensor([[confidence]]), truth)


ROW = given([0, 1, 1, 2, 0], [0.95, 0.55, 0.95, 0.55, 0.99], [0, 1, 2, 0, IGNORE])


def test_void_is_neither_right_nor_wrong():
    assert ROW.valid.sum() == 4 and ROW.wrong.sum() == 2 and ROW.accuracy == 0.5


def test_a_higher_threshold_keeps_less():
    coverage, precision = analysis.precision_coverage(ROW, [0, 0.9, 1])
    assert coverage.tolist() == [1, 0.5, 0]
    assert precision[:2].tolist() == [0.5, 0.5] and np.isnan(precision[2])


def test_mistakes_weigh_less_where_pixels_count_by_confidence():
    """Kept are 0.95 right, 0.95 wrong; from 0.5 on also 0.55 right, 0.55 wrong."""
    assert analysis.strictness(ROW, 0.9) == pytest.approx((0.5, 0.5, 0.5))
    unsure = given([0, 1, 1, 0], [0.9, 0.6, 0.5, 0.99], [0, 1, 0, IGNORE])
    assert analysis.strictness(unsure, 0) == pytest.approx((1, 1 / 3, 0.5 / 2.0))
    assert np.isnan(analysis.strictness(unsure, 1)[1])


def test_kept_labels_are_counted_by_class():
    share = analysis.kept_by_class(ROW, 0.9, 4)
    assert share["truth"].tolist() == [0.5, 0.25, 0.25, 0]
    assert share["kept"].tolist() == [0.5, 0.5, 0, 0]
    np.testing.assert_array_equal(share["recall"], [0.5, 0, 0, np.nan])


def test_calibration_error_weighs_bins_by_their_pixels():
    confidence, accuracy, share = analysis.reliability_bins(ROW, 10)
    np.testing.assert_allclose(confidence, [0.55, 0.95], rtol=1e-6)
    assert accuracy.tolist() == [0.5, 0.5] and share.tolist() == [0.5, 0.5]
    assert analysis.calibration_error(ROW, 10) == pytest.approx((0.05 + 0.45) / 2)


def test_certainty_falls_into_the_last_bin():
    sure = given([0, 0], [1.0, 1.0], [0, 1])
    assert analysis.calibration_error(sure) == pytest.approx(0.5)


def test_fate_looks_only_at_confident_mistakes():
    before = given([1, 1, 1, 1, 0], [0.95, 0.95, 0.95, 0.5, 0.95], [0, 0, 0, 0, 0])
    after = given([1, 0, 2, 1, 1], [0.5, 0.5, 0.5, 0.5, 0.5], [0, 0, 0, 0, 0])
    fate = analysis.fate(before, after, 0.9)
    assert fate == pytest.approx((3 / 5, 1 / 3, 1 / 3))


def test_border_is_where_another_class_is_within_reach():
    truth = torch.tensor([[[0, 0, 0, 0, 1]]], dtype=torch.uint8).expand(1, 5, 5)
    assert analysis.near_border(truth, 1)[0, 2].tolist() == [False, False, False, True, True]
    assert analysis.near_border(truth, 2)[0, 2].tolist() == [False, False, True, True, True]


def test_disagreement_leaves_out_void():
    other = ROW._replace(label=torch.tensor([[[0, 0, 1, 2, 1]]], dtype=torch.uint8))
    assert analysis.disagreement(ROW, other) == 0.25 and analysis.disagreement(ROW, ROW) == 0


def test_weight_distance_is_relative_to_the_second_network():
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2))
    double = frozen_copy(net)
    for parameter in double.parameters():
        parameter.mul_(2)
    double[1].running_mean += 7  # buffers do not count
    assert analysis.weight_distance(net, net) == 0
    assert analysis.weight_distance(double, net) == pytest.approx(1)


def test_past_weights_say_what_ema_does():
    decays = [warm_decay(0.8, step) for step in range(9)]
    students = torch.randn(9, generator=torch.Generator().manual_seed(0))
    teacher, student = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    for decay, value in zip(decays, students, strict=True):
        nn.init.constant_(student.weight, float(value))
        ema(teacher, student, decay)
    weights = analysis.past_weights(decays)
    assert weights.sum() == pytest.approx(1)  # a warmed-up average forgets its initial weights
    assert teacher.weight.item() == pytest.approx(float(students.numpy() @ weights), abs=1e-6)


def test_constant_decay_keeps_some_of_the_initial_weights():
    assert 1 - analysis.past_weights([0.9] * 10).sum() == pytest.approx(0.9**10)


def test_memory_age_is_the_mean_age_of_the_past_weights():
    decays = [warm_decay(0.8, step) for step in range(30)]
    expected = analysis.past_weights(decays) @ np.arange(29, -1, -1)
    assert analysis.memory_age(decays)[-1] == pytest.approx(expected)
    assert analysis.memory_age([0.0, 0.5, 0.0]).tolist() == [0, 0.5, 0]


def test_a_teacher_ages_while_it_waits_unless_its_turns_restart():
    ages = analysis.labelling_ages(12, 3, 0.8)
    decays = [warm_decay(0.8, step) for step in range(12)]
    assert ages["single_teacher"].tolist() == analysis.memory_age(decays).tolist()
    assert ages["ema_reset"].tolist() == pytest.approx([0, 0.5, 1] * 4)
    # Its turn ends at an age of 1, it waits for 3 steps, and a quarter of its next update is new.
    assert ages["dual_teacher"][:7].tolist() == pytest.approx([0, 0.5, 1] * 2 + [0.75 * 5])
    short = analysis.labelling_ages(6, 1, 0.5)
    assert short["dual_teacher"].tolist() == [0, 0, 1, 1, 1.5, 1.5]
    assert short["ema_reset"].tolist() == [0] * 6


def test_sub_models_skip_the_blocks_they_say():
    torch.manual_seed(0)
    net, image = build_net("light", 3).eval(), torch.randn(1, 3, 32, 32).expand(64, 3, 32, 32)
    assert analysis.sub_models(net, image[:9], 0.9)[0].all()  # new branches are all zero
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.ones_(part.weight)
    torch.manual_seed(1)
    kept, same = analysis.sub_models(net, image, 0.6)
    torch.manual_seed(1)
    with stochastic_depth(net, 0.6), torch.no_grad():
        label = net(image).argmax(1)
    with torch.no_grad():
        full = net(image).argmax(1)
    torch.testing.assert_close(same, (label == full).float().mean((1, 2)))
    assert kept.shape == (64, 4) and kept[:, 0].all()  # the first block is never skipped
    assert kept.float().mean(0).tolist() == pytest.approx([1, 0.8, 0.6, 0.4], abs=0.15)
    first = (kept == kept[0]).all(1)  # the same blocks, the same sub-model
    assert 1 < first.sum() < 64 and (label[first] == label[0]).all()
    assert (label[~first] != label[0]).flatten(1).any(1).float().mean() > 0.9
    kept, same = analysis.sub_models(net, image[:1], 0)
    assert kept.shape == (1, 0) and same == 1


def test_by_turn_tells_who_labels_from_who_waits():
    made = lambda *epochs: [  # noqa: E731
        probe.Pair(e, one, other, 0.1 * e, 0.2, 3.0)
        for e in epochs
        for one, other in (("student", "teachers.0"), ("student", "teachers.1"))
        + (("teachers.0", "teachers.1"),)
    ]
    short = lambda pairs: [f"{p.epoch}:{p.other[-1]}" for p in pairs]  # noqa: E731
    labels, waits = map(short, analysis.by_turn(made(1, 2, 3, 4)))
    assert labels == ["1:0", "2:1", "3:0", "4:1"] and waits == ["2:0", "3:1", "4:0"]
    labels, waits = map(short, analysis.by_turn(made(1, 2, 3, 4), period=2, first=1))
    assert labels == ["2:0", "3:0", "4:1"] and waits == ["4:0"]
    one = [p for p in made(1, 2) if p.one == "student" and p.other == "teachers.0"]
    assert analysis.by_turn(one) == (one, [])
    lines = analysis.coupling_curves({"net": one})
    assert all(by["net"][0][0] == [1, 2] for by in lines.values())
    assert [by["net"][0][1][1] for by in lines.values()] == pytest.approx([20, 20, -3])


def test_paired_values_pair_by_position():
    assert analysis.paired_values([3, 5], [1, 3]).values == (2, 2)
    table = tables.differences({"q": {"a": [1.0, 3.0], "b": [2.0, 4.1]}}, "a", "points")
    assert [row[1] for row in table.rows] == ["a", "b"] and table.rows[0][-1] == "the reference"
    assert table.rows[1][-1] == "higher"


def test_predictions_of_a_trained_run(trained_run):
    model = trained.load(trained_run, device="cpu")
    images = open_dataset("mosaic", "val", size=(32, 32))
    found = analysis.predictions(model, images, range(3), network="teacher")
    assert found.label.shape == found.confidence.shape == found.truth.shape == (3, 32, 32)
    assert found.label.dtype == found.truth.dtype == torch.uint8
    assert float(found.confidence.min()) >= 1 / len(images.classes)


def test_predictions_of_images_of_several_sizes_are_padded_with_void(trained_run):
    model = trained.load(trained_run, device="cpu")
    both = [open_dataset("mosaic", "val", size=(side, side))[0] for side in (32, 24)]
    found, small = (analysis.predictions(model, both, indices) for indices in ([0, 1], [1]))
    assert found.label.shape == (2, 32, 32) and not found.valid[1, 24:].any()
    assert torch.equal(found.label[1, :24, :24], small.label[0])
    assert found.wrong[1].sum() == small.wrong.sum() and found.valid[0].all()
