"""What is drawn where, and by which title."""

import matplotlib.pyplot as plt
import numpy as np
import torch

from s4lib import plots
from s4lib.analysis import Predictions

COLORS = np.array([[10, 20, 30], [200, 100, 0]], dtype=np.uint8)


def test_answers_are_label_maps_over_their_confidence_beside_what_is_given():
    truth = torch.tensor([[[0, 1], [1, 255]], [[0, 0], [0, 0]]], dtype=torch.uint8)
    before = Predictions(1 - truth.clamp(max=1), torch.full((2, 2, 2), 0.25), truth)
    after = Predictions(truth.clamp(max=1), torch.full((2, 2, 2), 0.75), truth)
    image = torch.arange(12).view(2, 2, 3).byte()
    figure = plots.answers([image], {"before": before, "after": after}, ["a", "b"], COLORS)
    shown = [axis.images[0].get_array() for axis in figure.axes]
    assert len(shown) == 6, "one image was asked for, of two that were predicted"
    assert [axis.get_title() for axis in figure.axes] == ["given", "before", "after", "", "", ""]
    np.testing.assert_array_equal(shown[0], [[COLORS[0], COLORS[1]], [COLORS[1], (235,) * 3]])
    np.testing.assert_array_equal(shown[1], COLORS[[[1, 0], [0, 0]]])
    np.testing.assert_array_equal(shown[2], COLORS[[[0, 1], [1, 1]]])
    np.testing.assert_array_equal(shown[3], image)
    assert (shown[4] == 0.25).all() and (shown[5] == 0.75).all()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    plt.close(figure)
