"""mIoU from one confusion matrix of the whole set, never an average over images; boundary IoU,
calibration, and how much either depends on the images that happen to be in the set."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import one_of
from .losses import IGNORE


def confusion(label: Tensor, truth: Tensor, classes: int) -> Tensor:
    """(K, K) int64 counts, rows truth, columns prediction; IGNORE in truth is left out."""
    valid = truth != IGNORE
    cells = truth[valid].long() * classes + label[valid].long()
    return torch.bincount(cells, minlength=classes * classes).view(classes, classes)


def iou(matrix: Tensor) -> Tensor:
    """(..., K) intersection over union in percent of confusion matrices (..., K, K).

    NaN for a class in neither truth nor prediction.
    """
    matrix = matrix.double()
    inside = matrix.diagonal(dim1=-2, dim2=-1)
    return 100 * inside / (matrix.sum(-2) + matrix.sum(-1) - inside)  # 0 / 0 is NaN


def miou(matrix: Tensor, absent: str = "skip") -> float:
    """Mean IoU over classes in percent of a (K, K) confusion matrix; see `miou_of`."""
    return float(miou_of(iou(matrix), absent))


def miou_of(values: Tensor, absent: str = "skip") -> Tensor:
    """(...) mean over the classes of IoU (..., K).

    Released codes disagree on a class that occurs in neither truth nor prediction: "skip" leaves it
    out (ST++), "zero" counts it as 0 (U2PL, UniMatch).

    Raises:
        ValueError: unknown `absent`.
    """
    one_of("absent", absent, "skip", "zero")
    return values.nanmean(-1) if absent == "skip" else values.nan_to_num(0).mean(-1)


def boundary(label: Tensor, truth: Tensor, classes: int, share: float = 0.02) -> Tensor:
    """(N, 2, K) pixels in the intersection and union of bands along class boundaries.

    A class's band are its pixels within `share` of the image's diagonal (at least one pixel) of a
    pixel of another class or of the image's edge; boundary IoU is the IoU of the bands of truth and
    prediction (Cheng et al., CVPR 2021). Void pixels belong to no class and do not count.

    Args:
        label, truth: (N, H, W) class indices, IGNORE = void in `truth`.
    """
    height, width = truth.shape[-2:]
    reach = max(1, round(share * (height**2 + width**2) ** 0.5))

    def bands(index: Tensor, k: int) -> Tensor:
        inside = (index == k)[:, None].float()
        eroded = -F.max_pool2d(F.pad(-inside, [reach] * 4, value=0.0), 2 * reach + 1, 1)
        return (inside - eroded)[:, 0] > 0

    valid, counts = truth != IGNORE, []
    for k in range(classes):
        ours, true = bands(label, k) & valid, bands(truth, k) & valid
        counts.append(torch.stack([(ours & true).sum((1, 2)), (ours | true).sum((1, 2))], 1))
    return torch.stack(counts, 2).float()


def calibration_bins(confidence: Tensor, right: Tensor, truth: Tensor, bins: int = 15) -> Tensor:
    """(N, 3, bins) number of pixels, sum of confidence, number right, in bins of equal width.

    Args: confidence (N, H, W) in [0, 1], right (N, H, W) bool, truth with IGNORE = void.
    """
    n = len(truth)
    valid = (truth != IGNORE).flatten(1).float()
    place = (confidence * bins).long().clamp(max=bins - 1).flatten(1)
    empty = torch.zeros(n, bins, device=truth.device)
    parts = (valid, valid * confidence.flatten(1), valid * right.flatten(1))
    return torch.stack([empty.scatter_add(1, place, part) for part in parts], 1)


def bootstrap(
    matrices: Tensor, base: Tensor | None = None, *, absent: str = "skip", draws: int = 2000
) -> tuple[float, float]:
    """95 % interval of mIoU (%), or of its difference to `base`, over resampled images.

    Images are drawn with replacement, the same ones for both networks, so that the interval says
    what another sample of images would change; it says nothing about another training.

    Args:
        matrices, base: (N, K, K) confusion matrices per image, of the same images.
    """
    if base is not None and base.shape != matrices.shape:
        raise ValueError(f"base has shape {tuple(base.shape)}, expected {tuple(matrices.shape)}")
    n, generator = len(matrices), torch.Generator().manual_seed(0)
    drawn = torch.randint(n, (draws, n), generator=generator)
    weights = torch.zeros(draws, n, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(draws, n, dtype=torch.float64)
    )

    def values(counts: Tensor) -> Tensor:
        sums = weights @ counts.cpu().double().flatten(1)
        return miou_of(iou(sums.view(draws, *counts.shape[1:])), absent)

    found = values(matrices) - (0 if base is None else values(base))
    low, high = torch.quantile(found, torch.tensor([0.025, 0.975], dtype=found.dtype)).tolist()
    return low, high
