"""Class boundaries in images: do pixels say where one is, and do networks err there?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import Tensor

from ..losses import IGNORE
from .analysis import Predictions, near_border


def neighbour_distances(
    images: Tensor, labels: Tensor, patch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Distances of patches around neighbouring pixels: (within one class, across a boundary).

    The root mean square difference, in grey levels, of the patch x patch windows around a pixel and
    around its right-hand neighbour. If classes were separated by a gap in density, the second kind
    would be clearly larger (the question of French et al. 2020, section 3.1).

    Args:
        images: (N, 3, H, W) uint8.
        labels: (N, H, W) uint8; pairs with a void pixel are left out.
        patch: odd size of the windows.
    """
    difference = (images[..., 1:].float() - images[..., :-1].float()).square().mean(1, keepdim=True)
    window = F.avg_pool2d(difference, patch, 1, patch // 2, count_include_pad=False)[:, 0].sqrt()
    left, right = labels[..., :-1], labels[..., 1:]
    valid = (left != IGNORE) & (right != IGNORE)
    return window[valid & (left == right)].numpy(), window[valid & (left != right)].numpy()


def separability(low: np.ndarray, high: np.ndarray) -> float:
    """Probability that a value of `high` exceeds one of `low`; a tie counts half (ROC area)."""
    ranks = rankdata(np.concatenate([low, high]))[len(low) :]
    return float((ranks.mean() - (len(high) + 1) / 2) / len(low))


def error_by_distance(given: Predictions, edges: Sequence[int]) -> np.ndarray:
    """(len(edges),) share of wrong pixels, in bands by distance to the next class boundary.

    Band i holds the pixels within edges[i] rows and columns of another class but not within
    edges[i - 1]; a last value for all pixels farther away is appended.
    """
    bands, nearer = [], torch.zeros_like(given.valid)
    for edge in edges:
        near = near_border(given.truth, edge)
        bands.append(near & ~nearer & given.valid)
        nearer = near
    bands.append(~nearer & given.valid)
    return np.array([float(given.wrong[band].float().mean()) for band in bands])
