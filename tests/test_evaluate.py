"""Rules of evaluation: crops, windows, averages, and what they do to the score."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from s4lib.evaluate import EVALUATIONS, Evaluation, _starts, centred, count, evaluation, predict
from s4lib.evaluate import scores as scored
from s4lib.losses import IGNORE
from s4lib.metrics import bootstrap, boundary, iou, miou, miou_of

CPU = torch.device("cpu")


class Context(nn.Module):
    """Logits that depend on what else is in the picture, so that windows matter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 5, padding=2)

    def forward(self, image):
        return self.conv(image) * image.mean((1, 2, 3), keepdim=True).exp()


@pytest.fixture
def net():
    return Context().eval()


def image(height: int, width: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_a_whole_image_is_predicted_as_it_is(net):
    x = image(20, 30)
    assert torch.equal(predict(net, x, Evaluation()), net(x))


def test_windows_of_u2pl_cover_cityscapes_as_specified():
    # gta_u2pl.md 1.7: crop 769, stride ceil(769 * 2 / 3) = 513, the last window shifted back.
    how = evaluation("u2pl-slide")
    assert how.strides() == (513, 513)
    assert list(_starts(1024, 769, 513, "shift")) == [(0, 769), (255, 1024)]
    assert [first for first, _ in _starts(2048, 769, 513, "shift")] == [0, 513, 1026, 1279]


def test_windows_of_unimatch_are_cut_off_at_the_border():
    # dual_unimatch.md 2: crop 801, stride int(801 * 2 / 3) = 534, border windows smaller.
    how = evaluation("unimatch-slide")
    assert how.strides() == (534, 534)
    spans = [(0, 801), (534, 1335), (1068, 1869), (1602, 2048)]
    assert list(_starts(2048, 801, 534, "shrink")) == spans
    assert list(_starts(1024, 801, 534, "shrink")) == [(0, 801), (534, 1024)]


@pytest.mark.parametrize("border", ["shift", "shrink"])
@pytest.mark.parametrize("average", ["logits", "probs"])
def test_sliding_windows_equal_a_plain_loop(net, border, average):
    x = image(23, 31)
    how = Evaluation(mode="slide", crop=(12, 15), stride=8, border=border, average=average)
    total, visits = torch.zeros(2, 4, 23, 31), torch.zeros(23, 31)
    if border == "shift":
        rows, columns = (0, 8, 11), (0, 8, 16)
    else:
        rows, columns = (0, 8, 16), (0, 8, 16, 24)
    for r in rows:
        for c in columns:
            logits = net(x[..., r : r + 12, c : c + 15])
            logits = logits.softmax(1) if average == "probs" else logits
            total[..., r : r + 12, c : c + 15] += logits
            visits[r : r + 12, c : c + 15] += 1
    torch.testing.assert_close(predict(net, x, how), total / visits)


def test_an_image_smaller_than_the_window_is_padded_around_and_cut_out_again(net):
    x = image(9, 12)
    how = Evaluation(mode="slide", crop=(14, 15))
    whole = net(F.pad(x, (1, 2, 2, 3)))  # the smaller half of the padding first
    torch.testing.assert_close(predict(net, x, how), whole[..., 2:11, 1:13])


def test_the_centre_is_cut_or_padded_and_padding_counts_only_when_asked(net):
    x, label = image(10, 30, 1), torch.ones(1, 10, 30, dtype=torch.uint8)
    how = Evaluation(mode="centre", crop=(16, 16))
    cut, truth = centred(x, label, how)
    assert torch.equal(cut[..., 3:13, :], x[..., 7:23]) and (cut[..., :3, :] == 0).all()
    assert (truth == IGNORE).sum() == 6 * 16 and (truth == 1).sum() == 160
    published = evaluation("u2pl-centre", {"crop": [16, 16]})
    truth = centred(x, label, published)[1]
    assert (truth == 0).sum() == 6 * 16 and not (truth == IGNORE).any()


def test_scales_flips_and_multiples_are_averaged_at_the_images_size(net):
    x = image(20, 27)
    plain, mirrored = net(x), net(x.flip(-1)).flip(-1)
    torch.testing.assert_close(predict(net, x, Evaluation(flip=True)), (plain + mirrored) / 2)
    up = lambda t, size: F.interpolate(t, size, mode="bilinear", align_corners=True)  # noqa: E731
    half = up(net(up(x, (10, 14))), (20, 27))
    found = predict(net, x, Evaluation(scales=(1.0, 0.5)))
    torch.testing.assert_close(found, (plain + half) / 2)
    eights = up(net(up(x, (16, 24))), (20, 27))
    torch.testing.assert_close(predict(net, x, Evaluation(multiple=8)), eights)


@pytest.mark.parametrize("name", EVALUATIONS)
def test_every_published_rule_predicts(net, name):
    how = evaluation(name, {"crop": [16, 16], "stride": 8} if "crop" in EVALUATIONS[name] else {})
    assert predict(net, image(20, 26), how).shape == (2, 4, 20, 26)


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("nope", {}, "choose one of whole, centre"),
        ("whole", {"crops": [3, 3]}, "unknown key 'crops'"),
        ("whole", {"crop": [3, 3]}, "takes no crop"),
        ("centre", {"crop": [0, 3]}, "two positive numbers"),
        ("centre", {"average": "logit"}, "choose one of logits, probs"),
        ("whole", {"scales": []}, "positive numbers"),
        ("whole", {"multiple": 0}, "multiple"),
    ],
)
def test_bad_rules_are_refused(name, changes, says):
    with pytest.raises(ValueError, match=says):
        evaluation(name, changes)


def test_a_run_evaluated_by_another_rule_says_so_in_its_record(tiny, tmp_path):
    from s4lib.trainer import fit

    rule = {"crop": [24, 40]}
    record = fit(tiny(epochs=1, evaluation="u2pl-centre", eval_args=rule), out=tmp_path)
    assert record["evaluation"]["rule"] == "u2pl-centre"
    assert record["evaluation"]["pad_label"] == 0 and record["evaluation"]["absent"] == "zero"
    kept = torch.load(next(tmp_path.glob("*/counts.pt")), weights_only=True)
    matrices = kept["confusion"]["student"]
    assert matrices.shape == (6, 8, 8) and len(kept["ids"]) == 6
    assert (matrices.sum((1, 2)) == 24 * 40).all()  # 8 columns of padding count
    assert round(miou(matrices.sum(0), "zero"), 4) == record["networks"]["student"]["last"]["miou"]


def test_boundary_iou_of_a_shifted_square():
    truth = torch.zeros(1, 12, 12, dtype=torch.long)
    guess = truth.clone()
    truth[0, 3:9, 3:9], guess[0, 3:9, 4:10] = 1, 1
    inside, union = boundary(guess, truth, 2, share=0.05)[0]
    band = torch.zeros(12, 12, dtype=torch.bool)
    band[3:9, 3:9], band[4:8, 4:8] = True, False
    moved = band.roll(1, 1)
    assert (inside[1], union[1]) == ((band & moved).sum(), (band | moved).sum())
    same = boundary(truth, truth, 2)[0]
    assert torch.equal(same[0], same[1]) and (same > 0).all()
    void = truth.clone()
    void[0, :, :6] = IGNORE
    assert boundary(guess, void, 2, share=0.05)[0, 1, 1] < union[1]


def test_calibration_agrees_with_the_analysis_of_predictions(net):
    from s4lib.book.analysis import Predictions, calibration_error

    x = image(16, 16, 3)
    truth = torch.randint(0, 4, (3, 16, 16), generator=torch.Generator().manual_seed(2)).byte()
    truth[:, :3] = IGNORE

    class Three(list):
        classes = tuple("abcd")

        def require_annotations(self, indices):
            pass

    images = Three((x[i], truth[i]) for i in range(3))
    found = count({"net": net}, images, range(3), lambda t: t, CPU, thorough=True)["net"]
    confidence, label = net(x).detach().softmax(1).max(1)
    want = calibration_error(Predictions(label.byte(), confidence, truth))
    result = scored({"net": found})["net"]
    assert math.isclose(result["ece"], want, abs_tol=1e-6)
    assert found.bins[:, 0].sum() == (truth != IGNORE).sum()
    assert 0 < result["boundary_miou"] < 100


def test_the_bootstrap_interval_is_that_of_the_normal_law_where_images_are_alike():
    """One class pair, n images, each all right or all wrong: accuracy is a binomial share."""
    n, right = 400, 300
    matrices = torch.zeros(n, 2, 2, dtype=torch.int64)
    matrices[:right, 0, 0] = matrices[right:, 0, 1] = 10
    low, high = bootstrap(matrices)
    share = right / n  # IoU of class 0; class 1 is never right
    wide = 1.96 * 100 / 2 * math.sqrt(share * (1 - share) / n)
    assert abs(low - (100 * share / 2 - wide)) < 0.3 and abs(high - (100 * share / 2 + wide)) < 0.3
    assert bootstrap(matrices, matrices) == (0, 0)
    better = matrices.clone()
    better[right : right + 20] = matrices[0]
    low, high = bootstrap(better, matrices)
    assert low > 0  # the same images are drawn for both, so a small gain on few images shows
    with pytest.raises(ValueError, match="expected"):
        bootstrap(matrices, matrices[:5])


def test_iou_takes_leading_dimensions():
    matrices = torch.randint(0, 9, (5, 3, 3), generator=torch.Generator().manual_seed(0))
    one_by_one = torch.stack([iou(m) for m in matrices])
    torch.testing.assert_close(iou(matrices), one_by_one)
    assert miou_of(one_by_one).shape == (5,)
