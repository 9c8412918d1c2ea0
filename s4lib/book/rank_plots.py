"""Figures of many systems at once: ranks over label draws, and scores over what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from .plots import color_of
from .ranking import front


def ranks(by_system: Mapping[str, Sequence[float]], critical: float) -> Figure:
    """Ranks of each draw (small) and their mean (large), best mean on top.

    From the best mean on, a band as wide as the critical difference: who is inside cannot be told
    from the first.
    """
    mean = {name: float(np.mean(values)) for name, values in by_system.items()}
    names = sorted(mean, key=mean.get)
    figure, axis = plt.subplots(figsize=(6.4, 1.1 + 0.24 * len(names)))
    best = mean[names[0]]
    axis.axvspan(best, best + critical, color="#8883", linewidth=0, label="critical difference")
    for i, name in enumerate(names):
        values, color = by_system[name], color_of(name.partition(",")[0])
        axis.hlines(i, min(values), max(values), color="#8888", linewidth=1)
        axis.plot(values, [i] * len(values), "o", color=color, alpha=0.45, markersize=4)
        axis.plot(mean[name], i, "D", color=color, markersize=6)
    axis.set_yticks(range(len(names)), names)
    axis.set(xlabel="rank within a label draw (1: highest mIoU)", xlim=(0.5, len(names) + 0.5))
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    figure.legend(loc="outside lower center")
    return figure


def costs(panels: Mapping[str, Mapping[str, tuple[float, float]]], *, ylabel: str) -> Figure:
    """One panel per cost, of the same systems: {x label: {name: (cost, score)}}; log cost.

    A line leads from each point to its name at the right; steps join those that nothing as cheap
    surpasses.
    """
    score = {name: y for name, (_, y) in next(iter(panels.values())).items()}
    figure, axes = plt.subplots(
        1, len(panels), figsize=(7.4, 1.4 + 0.2 * len(score)), sharey=True, squeeze=False
    )
    for axis, (xlabel, points) in zip(axes[0], panels.items(), strict=True):
        axis.set_xscale("log", base=2)  # before limits, which it would read as of a linear one
        right = 1.25 * max(x for x, _ in points.values())
        for name, (x, y) in points.items():
            axis.hlines(y, x, right, color="#8885", linewidth=0.6)
            axis.plot(x, y, "o", color=color_of(name.partition(",")[0]), markersize=5)
        steps = np.array([points[name] for name in front(points)])
        axis.step(*steps.T, where="post", color="#8888", linestyle="--", linewidth=1)
        axis.set(xlabel=xlabel, xlim=(0.8 * min(x for x, _ in points.values()), right))
        axis.xaxis.set_major_formatter("{x:g}")
    axes[0, 0].set_ylabel(ylabel)
    places = np.linspace(0, 1, len(score) + 2)[1:-1]
    for name, place in zip(sorted(score, key=score.get), places, strict=True):
        axis.annotate(
            name,
            (1, score[name]),
            (1.06, place),
            xycoords=axis.get_yaxis_transform(),
            textcoords="axes fraction",
            va="center",
            fontsize=7,
            arrowprops={"arrowstyle": "-", "color": "#8885", "linewidth": 0.6, "relpos": (0, 0.5)},
        )
    return figure
