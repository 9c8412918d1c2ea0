"""What stands where in the figures of many systems."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from s4lib.book import rank_plots


def test_ranks_go_from_the_best_mean_downwards_with_the_band_from_it():
    figure = rank_plots.ranks({"gps": [3, 3], "supervised": [1, 2], "cct, code": [2, 1.5]}, 1.2)
    (axis,) = figure.axes
    assert [text.get_text() for text in axis.get_yticklabels()] == [
        "supervised",
        "cct, code",
        "gps",
    ]
    assert axis.yaxis_inverted()
    means = [line.get_xdata()[0] for line in axis.lines if line.get_marker() == "D"]
    assert means == [1.5, 1.75, 3]
    band = axis.patches[0]
    assert (band.get_x(), band.get_width()) == (1.5, pytest.approx(1.2))
    plt.close(figure)


def test_costs_join_the_front_and_name_every_point_once_without_overlap():
    points = {"supervised": (1, 30), "gps": (6, 33), "cps": (7, 32.99), "cct": (2, 31)}
    figure = rank_plots.costs({"passes": points, "seconds": points}, ylabel="mIoU")
    left, right = figure.axes
    steps = [line for line in left.lines if line.get_linestyle() == "--"]
    np.testing.assert_array_equal(steps[0].get_xdata(), [1, 2, 6])
    assert not left.texts and sorted(t.get_text() for t in right.texts) == sorted(points)
    at = {text.get_text(): text.get_position()[1] for text in right.texts}
    assert at["supervised"] < at["cct"] < at["cps"] < at["gps"]
    assert min(axis.get_xlim()[0] for axis in figure.axes) > 0.5, "no logarithm of less than zero"
    assert at["gps"] - at["cps"] > 0.1, "a hundredth apart, but both can be read"
    plt.close(figure)
