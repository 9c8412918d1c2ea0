"""mIoU from one confusion matrix of the whole set, never an average over images."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import one_of
from .losses import IGNORE


def confusion(label: Tensor, truth: Tensor, classes: int) -> Tensor:
    """(K, K) int64 counts, rows truth, columns prediction; IGNORE in truth is left out."""
    valid = truth != IGNORE
    cells = truth[valid].long() * classes + label[valid].long()
    return torch.bincount(cells, minlength=classes * classes).view(classes, classes)


def iou(matrix: Tensor) -> Tensor:
    """(K,) intersection over union in percent; NaN for a class in neither truth nor prediction."""
    matrix = matrix.double()
    inside = matrix.diag()
    return 100 * inside / (matrix.sum(0) + matrix.sum(1) - inside)  # 0 / 0 is NaN


def miou(matrix: Tensor, absent: str = "skip") -> float:
    """Mean IoU over classes in percent.

    Released codes disagree on a class that occurs in neither truth nor prediction: "skip" leaves it
        out
    (ST++), "zero" counts it as 0 (U2PL, UniMatch).

    Raises:
        ValueError: unknown `absent`.
    """
    one_of("absent", absent, "skip", "zero")
    values = iou(matrix)
    return float(values.nanmean() if absent == "skip" else values.nan_to_num(0).mean())
