"""mIoU by hand and against a plain loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from s4lib.evaluate import Counts, count, normaliser, scores
from s4lib.losses import IGNORE
from s4lib.metrics import confusion, iou, miou


def test_confusion_has_truth_in_rows_and_prediction_in_columns():
    matrix = confusion(torch.tensor([0, 1, 1, 2]), torch.tensor([0, 0, 1, IGNORE]), 3)
    assert matrix.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]


def test_iou_by_hand():
    values = iou(torch.tensor([[1, 1, 0], [0, 1, 0], [0, 0, 0]]))
    assert values[:2].tolist() == [50, 50] and math.isnan(values[2])


def test_a_class_that_occurs_nowhere_is_skipped_or_zero():
    matrix = torch.diag(torch.tensor([3, 5, 0]))
    assert miou(matrix) == 100
    assert miou(matrix, absent="zero") == pytest.approx(200 / 3)


def test_a_class_that_is_only_predicted_counts_as_zero_either_way():
    matrix = torch.tensor([[2, 2], [0, 0]])
    assert miou(matrix) == miou(matrix, absent="zero") == 25


def test_miou_refuses_an_unknown_convention():
    with pytest.raises(ValueError, match="absent=.one.: .*skip.*zero"):
        miou(torch.eye(2), absent="one")


def test_metrics_agree_with_a_plain_loop():
    rng = np.random.default_rng(0)
    label, truth = rng.integers(0, 5, (2, 3, 9, 7))
    truth[rng.random(truth.shape) < 0.2] = IGNORE
    values = []
    for k in range(6):
        here = truth != IGNORE
        both = int(((label == k) & (truth == k) & here).sum())
        either = int((((label == k) | (truth == k)) & here).sum())
        values.append(100 * both / either if either else math.nan)
    matrix = confusion(torch.from_numpy(label), torch.from_numpy(truth), 6)
    assert matrix.sum() == (truth != IGNORE).sum()
    np.testing.assert_allclose(iou(matrix).numpy(), values)
    assert miou(matrix) == pytest.approx(np.nanmean(values))
    assert miou(matrix, absent="zero") == pytest.approx(np.nansum(values) / 6)


def test_miou_is_of_the_set_and_not_a_mean_over_images():
    """Class 1 is in the second image alone: the mean of per-image values is another number."""
    label = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1]])
    truth = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1]])
    whole = sum(confusion(a, b, 2) for a, b in zip(label, truth, strict=True))
    single = [miou(confusion(a, b, 2)) for a, b in zip(label, truth, strict=True)]
    assert miou(whole) == pytest.approx((100 * 6 / 7 + 50) / 2)
    assert miou(whole) != pytest.approx(sum(single) / 2)


class Constant(torch.nn.Module):
    """Says one class everywhere."""

    def __init__(self, chosen: int, classes: int = 3):
        super().__init__()
        self.scale = torch.nn.Parameter(
            torch.nn.functional.one_hot(torch.tensor(chosen), classes).float()
        )

    def forward(self, image):
        return self.scale.view(1, -1, 1, 1).expand(len(image), -1, *image.shape[-2:])


class Frames(list):
    classes = ("a", "b", "c")

    def require_annotations(self, indices):
        pass


def test_evaluation_takes_images_of_different_sizes_and_puts_modes_back():
    images = Frames(
        (torch.zeros(3, h, 4, dtype=torch.uint8), torch.full((h, 4), h % 3, dtype=torch.uint8))
        for h in (3, 3, 4, 5, 5, 3)
    )
    nets = {"zero": Constant(0).train(), "one": Constant(1).eval()}
    apply = normaliser((0.5,) * 3, (0.5,) * 3, torch.device("cpu"))
    found = count(nets, images, range(5), apply, torch.device("cpu"))
    assert found["zero"].confusion.shape == (5, 3, 3)
    assert found["zero"].confusion[2].tolist() == [[0, 0, 0], [16, 0, 0], [0, 0, 0]]
    assert found["zero"].confusion.sum(0).tolist() == [[24, 0, 0], [16, 0, 0], [40, 0, 0]]
    assert found["one"].confusion.sum(0).tolist() == [[0, 24, 0], [0, 16, 0], [0, 40, 0]]
    assert nets["zero"].training and not nets["one"].training
    result = scores(found)
    assert result["zero"] == {"miou": 10.0, "iou": [30.0, 0.0, 0.0]}


def test_an_absent_class_is_null_in_scores():
    assert scores({"net": Counts(torch.diag(torch.tensor([1, 0]))[None])})["net"] == {
        "miou": 100.0,
        "iou": [100.0, None],
    }
