"""Arrows of a diagram lead from box to box, apart from each other, and wrong input is named."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.text import Annotation

from s4lib.book.diagrams import arrows as read
from s4lib.book.diagrams import boxes, flow, panels

NODES = {
    "u": (0, 1, "unlabeled", "data"),
    "teacher": (1, 1, "teacher", "network"),
    "student": (1, 0, "student", "network"),
    "loss": (2, 1, "$L_u$", "loss"),
    "title": (0, 2, "(a) Mean Teacher", "note"),
}
EDGES = [
    ("u", "teacher", "", "forward"),
    ("teacher", "loss", "pseudo-labels", "labels"),
    ("student", "loss", "", "forward"),
    ("loss", "student", "", "gradient"),
    ("student", "teacher", "", "ema"),
]


@pytest.fixture
def drawn():
    figure = flow(NODES, EDGES)
    figure.canvas.draw()
    yield figure
    plt.close(figure)


def arrows(figure):
    return [a.arrow_patch for a in figure.axes[0].texts if isinstance(a, Annotation)]


def test_every_text_stands_at_its_place(drawn):
    shown = {text.get_text(): text.get_position() for text in drawn.axes[0].texts}
    assert {text: shown[text] for _, _, text, _ in NODES.values()} == {
        text: (x, y) for x, y, text, _ in NODES.values()
    }
    assert "pseudo-labels" in shown


def test_arrows_begin_and_end_at_the_edges_of_their_boxes(drawn):
    named = [t for t in drawn.axes[0].texts if t.get_text()]
    boxes = {t.get_text(): t.get_bbox_patch().get_window_extent() for t in named}
    for (start, end, _, _), arrow in zip(EDGES, arrows(drawn), strict=True):
        line = arrow.get_transform().transform(arrow.get_path().vertices)
        for name in (start, end):
            box = boxes[NODES[name][2]]
            outside = np.maximum(box.min - line, line - box.max).max(1)
            assert 0 <= outside.min() < 0.1 * drawn.dpi, f"{start} to {end} at {name}"


def test_arrows_between_the_same_boxes_are_bent_apart():
    nodes, styles = {k: NODES[k] for k in ("student", "loss")}, ("forward", "gradient", "labels")
    edges = [("student", "loss", f"text of {s}", s) for s in styles]
    edges += [("loss", "student", "text of ema", "ema")]
    figure = flow(nodes, edges)
    places = [t.get_position() for t in figure.axes[0].texts if "text of" in t.get_text()]
    plt.close(figure)
    apart = [np.hypot(x - u, y - v) for i, (x, y) in enumerate(places) for u, v in places[:i]]
    assert len(apart) == 6 and min(apart) > 0.1


def test_the_legend_names_the_styles_that_are_used(drawn):
    texts = [text.get_text() for text in drawn.axes[0].get_legend().get_texts()]
    assert texts == ["forward pass", "labels", "gradient", "moving average"]
    one = flow(NODES, EDGES[:1])
    assert one.axes[0].get_legend() is None
    plt.close(one)


@pytest.mark.parametrize(
    ("nodes", "edges", "said"),
    [
        ({"u": (0, 0, "u", "image")}, [], "kind='image': choose network or data or loss or note"),
        (NODES, [("u", "loss", "", "red")], "style='red': choose forward or labels or gradient or"),
        (NODES, [("u", "losses", "", "ema")], "node='losses': choose u or teacher or student or"),
    ],
)
def test_wrong_input_is_named(nodes, edges, said):
    with pytest.raises(ValueError, match=said):
        flow(nodes, edges)
    plt.close("all")


def test_edges_can_be_written_as_text():
    text = "u forward teacher; teacher labels loss: pseudo-labels; student forward loss;"
    assert read(text + "loss gradient student; student ema teacher") == EDGES
    with pytest.raises(ValueError, match="'u teacher': write FROM STYLE TO"):
        read("u forward teacher; u teacher")


def test_boxes_can_be_written_as_text():
    text = "u 0 1 data: unlabeled; teacher 1 1 network: teacher; title 0 2 note: (a) Mean Teacher"
    assert boxes(text) == {name: NODES[name] for name in ("u", "teacher", "title")}
    with pytest.raises(ValueError, match="'u 0 data: x': write ID X Y KIND"):
        boxes("u 0 data: x")


def test_panels_show_the_nodes_that_their_arrows_touch():
    texts = {"(b)": "teacher labels student; student ema teacher", "(a)": "student labels student"}
    figure = panels(NODES, {"one": "student forward loss", **texts})
    at = sorted((t.get_text(), *t.get_position()) for t in figure.axes[0].texts if t.get_text())
    plt.close(figure)
    assert [place for place in at if place[0] in ("teacher", "student")] == [
        ("student", 1, 0),
        ("student", 4, 0),
        ("student", 7, 0),
        ("teacher", 4, 1),
    ]
    assert [place for place in at if "(" in place[0]] == [("(a)", 7, 2.6), ("(b)", 4, 2.6)]
    below = panels(NODES, {"one": "student forward loss", **texts}, columns=2)
    place = {t.get_text(): t.get_position() for t in below.axes[0].texts}
    plt.close(below)
    assert place["(a)"] == (1, pytest.approx(2.6 - 3.5)) and place["(b)"] == (4, 2.6)
    with pytest.raises(ValueError, match="node='tutor': choose"):
        panels(NODES, {"one": "tutor forward loss"})
