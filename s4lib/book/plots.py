"""Charts of the book, and its style; each function returns the matplotlib figure.

Those of many systems at once are in `rank_plots`, images and label maps in `pictures`, drawings of
methods in `diagrams`. Colours of methods are fixed (`METHOD_COLORS`), so that a method looks the
same in every chapter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

METHOD_COLORS = {
    "supervised": "#6e7178",
    "pseudo_label": "#98631b",
    "mean_teacher": "#4a77c4",
    "cutmix_seg": "#d1495b",
    "dual_teacher": "#2f8f5b",
    "single_teacher": "#7b5fb0",
    "dual_student": "#d99a1e",
}
STYLE = {
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.labelsize": 9,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "image.interpolation": "nearest",
}


def use_style() -> None:
    """The book's look; in a notebook, figures become SVG."""
    sns.set_theme(style="ticks", rc=STYLE)
    try:
        from matplotlib_inline.backend_inline import set_matplotlib_formats
    except ImportError:
        return
    if "inline" in mpl.get_backend():
        set_matplotlib_formats("svg")


def color_of(method: str) -> str:
    spare = sns.color_palette("deep").as_hex()
    return METHOD_COLORS.get(method, spare[sum(map(ord, method)) % len(spare)])


def curves(
    lines: Mapping[str, Sequence[tuple[Sequence[float], Sequence[float]]]],
    *,
    xlabel: str = "step",
    ylabel: str = "mIoU (%)",
    palette: Mapping[str, str] | None = None,
) -> Figure:
    """One thick mean line per name over thin lines of its runs; each run is (x, y)."""
    figure, axis = plt.subplots(figsize=(6.4, 3.4))
    _draw(axis, lines, palette)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.legend()
    return figure


def panels(
    quantities: Mapping[str, Mapping[str, Sequence[tuple[Sequence[float], Sequence[float]]]]],
    *,
    xlabel: str = "step",
    palette: Mapping[str, str] | None = None,
    log: Sequence[str] = (),
) -> Figure:
    """`curves` of several quantities side by side, of the same names: {y label: {name: runs}}.

    The axes of those in `log` are logarithmic.
    """
    n = len(quantities)
    width = n * (3 if n < 3 else 2.4)  # a wider figure would be shrunk to the text column
    figure, axes = plt.subplots(1, n, figsize=(width, 3), squeeze=False)
    for axis, (ylabel, lines) in zip(axes[0], quantities.items(), strict=True):
        _draw(axis, lines, palette)
        axis.set(xlabel=xlabel, ylabel=ylabel, yscale="log" if ylabel in log else "linear")
        axis.xaxis.set_major_locator(mpl.ticker.MaxNLocator(6, integer=True))
    names = axes[0, 0].get_legend_handles_labels()
    figure.legend(*names, loc="outside lower center", ncols=min(len(names[1]), 5))
    return figure


def _draw(axis: Axes, lines: Mapping, palette: Mapping[str, str] | None) -> None:
    for name, runs in lines.items():
        color = (palette or {}).get(name) or color_of(name)
        for x, y in runs:
            axis.plot(
                x,
                y,
                color=color,
                alpha=0.25 if len(runs) > 1 else 1,
                linewidth=1 if len(runs) > 1 else 1.8,
            )
        if len(runs) > 1:
            axis.plot(runs[0][0], np.mean([y for _, y in runs], axis=0), color=color)
        axis.plot(
            [], [], color=color, label=name if len(runs) == 1 else f"{name} (mean of {len(runs)})"
        )


def paired(scores: Mapping[str, Mapping[int, float]], *, ylabel: str = "mIoU (%)") -> Figure:
    """One line per label draw across methods: {method: {draw: value}}. Look at the slopes."""
    figure, axis = plt.subplots(figsize=(1.6 + 1.35 * len(scores), 3.4))
    names = list(scores)
    draws = sorted(set.intersection(*(set(v) for v in scores.values())))
    for draw in draws:
        values = [scores[name][draw] for name in names]
        axis.plot(names, values, color="#8888", linewidth=1)
    ends = {draw: scores[names[-1]][draw] for draw in draws}
    line = 0.05 * np.diff(axis.get_ylim()).item()  # of text, in points
    for draw, place in zip(sorted(ends, key=ends.get), _apart(ends.values(), line), strict=True):
        axis.text(len(names) - 0.73, place, f"draw {draw}", fontsize=8, va="center")
    for i, name in enumerate(names):
        values = [scores[name][draw] for draw in draws]
        axis.scatter([i] * len(values), values, color=color_of(name), zorder=3, s=28)
        axis.hlines(np.mean(values), i - 0.22, i + 0.22, color=color_of(name), linewidth=3)
    axis.set(ylabel=ylabel, xlim=(-0.4, len(names) - 0.3))
    return figure


def _apart(values: Iterable[float], gap: float) -> np.ndarray:
    """The values, sorted, and moved as little as it takes to lie at least `gap` apart."""
    from scipy.optimize import isotonic_regression

    wanted = np.sort(np.fromiter(values, float))
    rungs = gap * np.arange(len(wanted))
    return isotonic_regression(wanted - rungs).x + rungs


def intervals(rows: Mapping[str, tuple[float, float, float]], *, xlabel: str) -> Figure:
    """A dot with its interval per name, top to bottom: {name: (low, value, high)}."""
    figure, axis = plt.subplots(figsize=(6.4, 0.8 + 0.27 * len(rows)))
    at = range(len(rows), 0, -1)
    low, value, high = np.array(list(rows.values())).T
    axis.hlines(at, low, high, color="#8888", linewidth=3)
    axis.plot(value, at, "o", color=color_of("supervised"), markersize=5)
    axis.axvline(0, color="#8888", linestyle="--", linewidth=1)
    axis.set_yticks(at, list(rows))
    axis.set(xlabel=xlabel)
    axis.grid(axis="y", visible=False)
    return figure


def reliability(bins: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Figure:
    """Accuracy against confidence: {name: (confidence, accuracy, share of pixels)} per bin."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(5, 4.6), sharex=True, height_ratios=(3, 1))
    top.plot([0, 1], [0, 1], color="#8888", linestyle="--", linewidth=1, label="calibrated")
    for name, (confidence, accuracy, share) in bins.items():
        top.plot(confidence, accuracy, marker="o", markersize=4, color=color_of(name), label=name)
        bottom.plot(confidence, share, marker="o", markersize=4, color=color_of(name))
    top.set(ylabel="accuracy", ylim=(0, 1))
    bottom.set(xlabel="confidence", ylabel="share of pixels", xlim=(0, 1), ylim=(0, None))
    top.legend()
    return figure


def precision_coverage(
    runs: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]],
    thresholds: Sequence[float],
    marked: Sequence[float],
) -> Figure:
    """Accuracy of what is kept against how much is kept: {name: [(coverage, precision) per run]}.

    A dot and a number stand where the threshold is one of `marked`, on the mean of the runs.
    """
    figure, axis = plt.subplots(figsize=(6.4, 3.6))
    at = [list(thresholds).index(value) for value in marked]
    for name, curves_ in runs.items():
        for coverage, precision in curves_:
            axis.plot(coverage, precision, color=color_of(name), alpha=0.25, linewidth=1)
        coverage, precision = np.mean(curves_, axis=0)
        axis.plot(coverage, precision, color=color_of(name), label=name)
        axis.plot(coverage[at], precision[at], "o", color=color_of(name), markersize=5)
        for i, value in zip(at, marked, strict=True):
            place = (coverage[i], precision[i])
            axis.annotate(f"{value:g}", place, (4, 5), textcoords="offset points", fontsize=8)
    axis.set(xlabel="share of pixels kept", ylabel="share of these that are right", xlim=(0, 1.04))
    if len(runs) > 1:
        axis.legend()
    return figure


def class_shares(panels: Mapping[str, Mapping[str, np.ndarray]], classes: Sequence[str]) -> Figure:
    """One panel of bars per title, classes downwards: {title: {bar name: share per class}}."""
    size = (7.2, 0.9 + 0.32 * len(classes))
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
    at = np.arange(len(classes))
    for axis, (title, bars) in zip(axes[0], panels.items(), strict=True):
        height = 0.76 / len(bars)
        for i, (name, values) in enumerate(bars.items()):
            place = at + (i - (len(bars) - 1) / 2) * height
            axis.barh(place, values, height, color=color_of(name), label=name)
        axis.set(title=title, xlim=(0, None))
        axis.xaxis.set_major_locator(mpl.ticker.MaxNLocator(5))
        axis.xaxis.set_major_formatter(mpl.ticker.PercentFormatter(1, decimals=0))
        axis.grid(axis="y", visible=False)
        if len(bars) > 1:
            axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=len(bars))
    axes[0, 0].set_yticks(at, classes)
    axes[0, 0].invert_yaxis()
    return figure


def histograms(panels: Mapping[str, Mapping[str, np.ndarray]], *, xlabel: str) -> Figure:
    """One panel of overlaid histograms of equal area per title: {title: {name: values}}."""
    figure, axes = plt.subplots(1, len(panels), figsize=(2.7 * len(panels), 2.5), squeeze=False)
    for axis, (title, values) in zip(axes[0], panels.items(), strict=True):
        top = max(np.quantile(v, 0.99) for v in values.values())
        for color, (name, v) in zip(("#4a77c4", "#d1495b"), values.items(), strict=True):
            axis.hist(
                v, bins=np.linspace(0, top, 41), density=True, alpha=0.5, color=color, label=name
            )
        axis.set(title=title, yticks=[])
    figure.supxlabel(xlabel, fontsize=9)
    names = axes[0, 0].get_legend_handles_labels()
    figure.legend(*names, loc="outside upper center", ncols=len(names[1]))
    return figure


def clouds(
    panels: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]],
    classes: Sequence[str],
    colors: np.ndarray,
    *,
    columns: int = 3,
) -> Figure:
    """Points coloured by class, some of them starred: {title: (xy (N, 2), label (N,), star (N,))}.

    All panels have the same axes. Of `classes` and their `colors` (K, 3), those seen have a legend.
    """
    lines = -(-len(panels) // columns)
    size = (2.4 * columns, 2.4 * lines + 0.5)
    figure, axes = plt.subplots(
        lines, columns, figsize=size, sharex=True, sharey=True, squeeze=False
    )
    shades = np.asarray(colors) / 255
    for axis, (title, (xy, label, star)) in zip(axes.flat, panels.items(), strict=False):
        axis.scatter(*xy.T, s=3, c=shades[label], alpha=0.5, linewidths=0, rasterized=True)
        style = {"marker": "*", "s": 30, "c": "#d62828", "edgecolors": "white", "linewidths": 0.4}
        axis.scatter(*xy[star].T, **style, rasterized=True)
        axis.set(title=title, xticks=[], yticks=[])
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    seen = sorted({int(k) for _, label, _ in panels.values() for k in label})
    patches = [Patch(color=shades[k], label=classes[k]) for k in seen]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(len(seen), 6))
    return figure


def powers(
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]],
    *,
    xlabel: str,
    ylabel: str,
) -> Figure:
    """{title: {name: (x, y)}} on logarithmic axes, where a power of x is a straight line.

    Names of the first panel that the last one has not are references, dashed.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(3.5 * len(panels), 3.2), squeeze=False)
    last = list(list(panels.values())[-1])
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for i, (name, (x, y)) in enumerate(lines.items()):
            color, style = f"C{i % len(last)}", "o-" if name in last else "--"
            axis.loglog(x, y, style, base=2, color=color, markersize=4, label=name)
        axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
    names = axes[0, 0].get_legend_handles_labels()
    figure.legend(*names, loc="outside lower center", ncols=2)
    return figure


def stacked(rows: Mapping[str, Mapping[str, float]], *, xlabel: str) -> Figure:
    """{name: {part: value}} as one bar a name; parts that begin with one word share a colour."""
    kinds = list(dict.fromkeys(part.split()[0] for parts in rows.values() for part in parts))
    figure, axis = plt.subplots(figsize=(6.4, 0.6 + 0.35 * len(rows)))
    for name, parts in rows.items():
        left = 0.0
        for part, value in parts.items():
            color = f"C{kinds.index(part.split()[0])}"
            axis.barh(name, value, left=left, color=color, edgecolor="white", linewidth=0.6)
            left += value
    axis.invert_yaxis()
    axis.set(xlabel=xlabel)
    patches = [Patch(color=f"C{i}", label=kind) for i, kind in enumerate(kinds)]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(len(kinds), 6))
    return figure
