"""What is drawn where, and by which title."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from s4lib import trained
from s4lib.book import pictures, plots
from s4lib.book.analysis import Predictions, predictions
from s4lib.data import open_dataset

COLORS = np.array([[10, 20, 30], [200, 100, 0]], dtype=np.uint8)


def test_answers_are_label_maps_over_their_confidence_beside_what_is_given():
    truth = torch.tensor([[[0, 1], [1, 255]], [[0, 0], [0, 0]]], dtype=torch.uint8)
    before = Predictions(1 - truth.clamp(max=1), torch.full((2, 2, 2), 0.25), truth)
    after = Predictions(truth.clamp(max=1), torch.full((2, 2, 2), 0.75), truth)
    image = torch.arange(12).view(2, 2, 3).byte()
    figure = pictures.answers([image], {"before": before, "after": after}, ["a", "b"], COLORS)
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


def test_pictures_undo_normalisation_and_colour_labels():
    image = torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1).expand(1, 3, 2, 4)
    (picture,) = pictures.as_pictures((image - 0.4) / 0.2, COLORS, 0.4, 0.2)
    assert picture.dtype == np.uint8 and picture.shape == (2, 4, 3)
    np.testing.assert_array_equal(picture[0, 0], [0, 128, 255])
    assert pictures.as_pictures(image + 1, COLORS)[0].min() == 255, "brighter than white"
    (label,) = pictures.as_pictures(torch.tensor([[[0, 1, 255]]]), COLORS)
    np.testing.assert_array_equal(label, [[*COLORS, (235,) * 3]])


def test_label_maps_are_what_each_model_says_of_the_images_asked_for(trained_run):
    model = trained.load(trained_run, device="cpu")
    images = open_dataset("mosaic", "val", size=(32, 32))
    rows = pictures.label_maps({"ours": model}, images, [3, 5])
    assert list(rows) == ["input", "ours", "truth"] and {len(row) for row in rows.values()} == {2}
    np.testing.assert_array_equal(rows["input"][1], images[5][0].permute(1, 2, 0))
    np.testing.assert_array_equal(rows["truth"][0], pictures.as_colors(images[3][1], images.colors))
    said = predictions(model, images, [3, 5]).label
    np.testing.assert_array_equal(rows["ours"][1], pictures.as_colors(said[1], images.colors))


def test_panels_have_one_legend_and_the_axes_asked_for():
    lines = {"a": [([1, 2], [1, 10])], "b": [([1, 2], [2, 3])]}
    figure = plots.panels({"x (%)": lines, "y": lines}, xlabel="epoch", log=["x (%)"])
    assert [axis.get_yscale() for axis in figure.axes] == ["log", "linear"]
    assert [axis.get_ylabel() for axis in figure.axes] == ["x (%)", "y"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    plt.close(figure)


def test_powers_are_straight_lines_and_references_dashed():
    sizes = [1, 2, 4]
    panels = {
        "mean": {"a": (sizes, sizes), "free": (sizes, sizes)},
        "variance": {"a": (sizes, sizes)},
    }
    figure = plots.powers(panels, xlabel="images", ylabel="scatter")
    first, second = figure.axes
    assert (first.get_xscale(), second.get_yscale()) == ("log", "log")
    assert [line.get_linestyle() for line in first.lines] == ["-", "--"]
    assert first.lines[0].get_color() == second.lines[0].get_color()


def test_stacked_bars_end_at_the_sum_of_their_parts():
    rows = {"one": {"forward a": 2.0, "forward b": 1.0, "rest": 3.0}, "two": {"rest": 4.0}}
    figure = plots.stacked(rows, xlabel="ms")
    bars = figure.axes[0].patches
    assert [bar.get_x() + bar.get_width() for bar in bars] == [2.0, 3.0, 6.0, 4.0]
    assert bars[0].get_facecolor() == bars[1].get_facecolor() != bars[2].get_facecolor()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["forward", "rest"]
    plt.close(figure)


def test_paired_names_every_draw_once_and_no_two_on_top_of_each_other():
    scores = {"supervised": {0: 30.0, 1: 35.0, 2: 40.0}, "gps": {0: 36.0, 1: 36.01, 2: 30.0}}
    figure = plots.paired(scores)
    (axis,) = figure.axes
    at = {text.get_text(): text.get_position()[1] for text in axis.texts}
    assert at["draw 1"] - at["draw 0"] > 0.3 and at["draw 0"] == pytest.approx(36, abs=0.5)
    assert at["draw 2"] == pytest.approx(30), "far from the others, so beside its point"
    plt.close(figure)
