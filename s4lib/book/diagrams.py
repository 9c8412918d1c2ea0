"""Drawings of who teaches whom: networks, data and losses as boxes, what passes between as arrows.

nodes = diagrams.boxes("u 0 0 data: unlabeled; t 1 0 network: teacher")
diagrams.flow(nodes, diagrams.arrows("u forward t: weak view"))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..config import one_of

KINDS = {
    "network": {"boxstyle": "round,pad=0.6", "facecolor": "#dbe6f6", "edgecolor": "#4a77c4"},
    "data": {"boxstyle": "square,pad=0.5", "facecolor": "#f1f1ee", "edgecolor": "#8a8d92"},
    "loss": {"boxstyle": "round,pad=0.5,rounding_size=1.2", "facecolor": "#f9dfe2"}
    | {"edgecolor": "#d1495b"},
    "note": {"boxstyle": "square,pad=0.2", "facecolor": "none", "edgecolor": "none"},
}
STYLES = {
    "forward": ("forward pass", "#3b3f46", "-"),
    "labels": ("labels", "#98631b", (0, (1.5, 1.5))),
    "gradient": ("gradient", "#d1495b", "-"),
    "ema": ("moving average", "#4a77c4", "--"),
}
INCHES = np.array([1.6, 0.95])  # of one unit to the right, and upwards
PAGE = 6.4  # inches of a text column: wider figures are shrunk, and have larger letters for it


def _read(text: str, form: str) -> list[list[str]]:
    """Words of each entry of `text`, with what follows its colon ("" if none) as the last one."""
    found = []
    for entry in filter(None, map(str.strip, text.split(";"))):
        words, _, about = entry.partition(":")
        if len(words := words.split()) != len(form.split()):
            raise ValueError(f"{entry!r}: write {form}, or {form}: text")
        found.append([*words, about.strip()])
    return found


def boxes(text: str) -> dict[str, tuple[float, float, str, str]]:
    """Nodes for `flow` from "ID X Y KIND: text", parted by semicolons. ValueError if not so."""
    read = _read(text, "ID X Y KIND")
    return {name: (float(x), float(y), about, kind) for name, x, y, kind, about in read}


def arrows(text: str) -> list[tuple[str, str, str, str]]:
    """Edges for `flow` from "FROM STYLE TO" or "FROM STYLE TO: text", parted by semicolons.

    Raises:
        ValueError: an edge that does not read like that.
    """
    return [(a, b, about, style) for a, style, b, about in _read(text, "FROM STYLE TO")]


def flow(
    nodes: Mapping[str, tuple[float, float, str, str]], edges: Sequence[tuple[str, str, str, str]]
) -> Figure:
    """Boxes on a grid and arrows between them, with a legend where arrows are of several styles.

    Args:
        nodes: {id: (x, y, text, kind)}, y upwards; kind is network, data, loss, or note (no box).
        edges: (from, to, text, style); style is forward, labels, gradient or ema. Several between
            two nodes are bent apart.

    Raises:
        ValueError: unknown kind or style, or an edge to a node that is not there.
    """
    places = np.array([node[:2] for node in nodes.values()])
    low, high = places.min(0) - 0.5, places.max(0) + 0.5
    width, height = (high - low) * INCHES
    figure, larger = (
        plt.figure(figsize=(width, height), layout="none"),
        np.clip(width / PAGE, 1, 1.4),
    )
    axis = figure.add_axes((0, 0, 1, 1), xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    axis.set_axis_off()
    drawn, middle = {}, {"ha": "center", "va": "center"}
    for name, (x, y, text, kind) in nodes.items():
        look = KINDS[one_of("kind", kind, *KINDS)]
        drawn[name] = axis.text(x, y, text, fontsize=9 * larger, bbox=look, zorder=2, **middle)
    pairs = [frozenset(edge[:2]) for edge in edges]
    for i, (start, end, text, style) in enumerate(edges):
        _, color, line = STYLES[one_of("style", style, *STYLES)]
        for name in (start, end):
            one_of("node", name, *nodes)
        beside = np.linspace(-0.13 * n, 0.13 * n, n) if (n := pairs.count(pairs[i])) > 1 else [0]
        a, b = (np.array(nodes[name][:2]) for name in (start, end))
        bend = beside[pairs[:i].count(pairs[i])] * (1 if tuple(a) < tuple(b) else -1)
        arrow = {"arrowstyle": "-|>", "color": color, "linestyle": line, "linewidth": 1.5}
        arrow |= {"mutation_scale": 13}
        arrow |= {"connectionstyle": f"arc3,rad={bend}", "shrinkA": 2, "shrinkB": 2}
        arrow |= {"patchA": drawn[start].get_bbox_patch(), "patchB": drawn[end].get_bbox_patch()}
        # Above the boxes, whose sizes are known only when they have been drawn.
        axis.annotate("", b, a, arrowprops=arrow, zorder=3)
        dx, dy = (b - a) * INCHES
        x, y = (a + b) / 2 + bend / 2 * np.array([dy, -dx]) / INCHES
        white = {"boxstyle": "square,pad=0.15", "facecolor": "white", "edgecolor": "none"}
        axis.text(x, y, text, fontsize=8 * larger, color=color, bbox=white, zorder=4, **middle)
    used = [STYLES[s] for s in STYLES if s in {edge[3] for edge in edges}]
    if len(used) > 1:
        lines = [Line2D([], [], color=c, linestyle=s, label=name) for name, c, s in used]
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "ncols": len(lines)}
        axis.legend(handles=lines, fontsize=8 * larger, **place)
    return figure


def panels(
    places: Mapping[str, tuple[float, float, str, str]],
    frameworks: Mapping[str, str],
    columns: int = 0,
) -> Figure:
    """Several frameworks side by side, {title: text for `arrows`}, a node at its place in each.

    `places` are nodes as of `flow`; a framework shows those that its arrows touch. `columns` of
    them stand in a row, all if 0. Raises ValueError as `arrows` and `flow` do.
    """
    x, y, *_ = zip(*places.values(), strict=True)
    left, right, low, top = min(x), max(x), min(y), max(y)
    nodes, edges = {}, []
    for i, (title, text) in enumerate(frameworks.items()):
        line, column = divmod(i, columns or len(frameworks))
        shift, down = column * (right - left + 1), line * (top - low + 1.5)
        nodes[title] = ((left + right) / 2 + shift, top + 0.6 - down, title, "note")
        for *ends, about, style in arrows(text):
            for name in ends:
                x, y, *others = places[one_of("node", name, *places)]
                nodes[f"{name} {i}"] = (x + shift, y - down, *others)
            edges.append((*(f"{name} {i}" for name in ends), about, style))
    return flow(nodes, edges)
