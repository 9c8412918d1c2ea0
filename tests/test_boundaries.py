"""Neighbouring patches and errors by distance, on images small enough to count by hand."""

from __future__ import annotations

import numpy as np
import torch

from s4lib.book.analysis import Predictions
from s4lib.book.boundaries import error_by_distance, neighbour_distances, separability


def test_neighbours_across_a_boundary_differ_by_the_step():
    image = torch.zeros(1, 3, 4, 6, dtype=torch.uint8)
    image[..., 3:] = 90
    label = (image[:, 0] > 0).byte()
    within, across = neighbour_distances(image, label, 1)
    assert (within == 0).all() and len(within) == 16
    assert (across == 90).all() and len(across) == 4
    label[:, 0] = 255
    assert len(neighbour_distances(image, label, 1)[1]) == 3


def test_separability_is_the_share_of_ordered_pairs():
    low, high = np.array([1.0, 2.0, 5.0]), np.array([3.0, 4.0])
    assert separability(low, high) == 4 / 6
    assert separability(low, low) == 0.5  # ties count half
    assert separability(low, low + 10) == 1 and separability(low + 10, low) == 0


def test_errors_are_counted_in_bands_from_the_boundary():
    truth = torch.zeros(1, 3, 8, dtype=torch.uint8)
    truth[..., 4:] = 1
    label = truth.clone()
    label[..., 3] = 1  # wrong in one of the two columns at the boundary
    given = Predictions(label, torch.ones(1, 3, 8), truth)
    np.testing.assert_allclose(error_by_distance(given, [1, 2]), [0.5, 0, 0])
