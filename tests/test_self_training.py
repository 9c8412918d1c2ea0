"""The maps and counts of the self-training chapter."""

from __future__ import annotations

import torch

from s4lib.book.self_training import (
    Stability,
    false_negatives,
    needs,
    pool,
    reliable,
    strong,
    witnesses,
)
from s4lib.losses import IGNORE
from s4lib.methods.pseudoseg import PseudoSeg
from s4lib.nets import build_net
from s4lib.protocols import protocol


def test_stable_images_come_first_and_the_text_says_how_right_they_are():
    found = Stability([0.2, 0.9, 0.8, 0.1], [10.0, 90.0, 70.0, 20.0])
    assert found.halves == ([1, 2], [0, 3])
    assert "**80 %** in the stable half, **15 %**" in str(found) and "0.80" in str(found)


def test_witnesses_are_probabilities_and_one_spot_reaches_one():
    torch.manual_seed(0)
    method = PseudoSeg(lambda **changes: build_net("tiny", 4, **changes), width=8).eval()
    maps = witnesses(method, torch.randn(2, 3, 64, 64))
    for name in ("decoder", "attention", "calibrated"):
        torch.testing.assert_close(maps[name].sum(1), torch.ones_like(maps[name][:, 0]))
    peaks = maps["spot"].flatten(1).amax(1)
    assert ((peaks - 1).abs() < 1e-5).logical_or(peaks == 0).all() and peaks.any()


def test_a_class_of_low_confidence_is_drawn_and_counted_most():
    bank = torch.tensor([0.9, 0.5, 0.1])
    probs = torch.where(torch.eye(3) > 0, bank, (1 - bank) / 2)  # column k: a pixel of class k
    about = needs(probs.view(1, 3, 1, 3), torch.arange(3).view(1, 1, 3))
    torch.testing.assert_close(about["confidence"]["bank"], bank)
    paper, code = (about["chance to be drawn"][k] for k in ("paper", "code"))
    torch.testing.assert_close(paper, torch.tensor([0.1, 0.5, 0.9]) / 1.5)
    assert paper[2] / paper[0] > code[2] / code[0] > 1
    counts = about["pixels that count"]
    torch.testing.assert_close(counts["paper"], counts["code"].sqrt())


def test_unsure_pixels_lose_their_label_and_become_negatives_of_unlikely_classes():
    sure, flat = [0.97, 0.01, 0.01, 0.01], [0.3, 0.28, 0.26, 0.16]
    probs = torch.tensor([sure, sure, sure, flat]).T.view(1, 4, 2, 2)
    kept, negatives = reliable(probs, 0.25)
    assert kept.flatten().tolist() == [0, 0, 0, IGNORE]
    assert negatives[3].flatten().tolist() == [False, False, False, True]
    assert negatives.sum() == 1
    assert not reliable(probs, 0.25, "alike")[1].any()


def test_both_rules_leave_fewer_false_negatives():
    truth = torch.tensor([0, 1]).repeat(2, 4, 2).view(2, 4, 4)
    truth[0, 0, 0] = IGNORE
    found = false_negatives(torch.where(truth == IGNORE, 0, truth), truth, 20_000)
    assert 0.45 < found["anywhere"] < 0.55 and found["both"] == found["another label"] == 0


def test_the_pool_is_of_other_images_with_another_label():
    truth = torch.zeros(2, 20, 20, dtype=torch.long)
    truth[:, :, 10:] = 1
    label = truth.clone()
    label[1, 0] = 1  # a mistake: the left part of this row passes for the other class
    found = pool(label, truth, 10, 5)
    assert found["anywhere"][0, 10, 5] == 3 and (found["anywhere"][1, :, :10] == 2).all()
    both = found["both rules"]
    assert both[0].unique().tolist() == [0, 3] and (both[1, 1:, :10] == 0).all()
    assert (both[1, :, 10:] == 1).all() and (both[1, 0, :10] == 2).all()


def test_strong_views_are_of_the_family_that_is_asked_for():
    image = torch.rand(3, 3, 8, 8)
    ours, theirs = (strong(image, protocol("mosaic-32", augment=a)) for a in ("s4", "augseg"))
    assert ours.shape == theirs.shape == image.shape and 0 <= theirs.min() <= theirs.max() <= 1
    assert not torch.equal(ours, theirs)
    assert torch.equal(strong(image, protocol("mosaic-32", augment="augseg")), theirs)
