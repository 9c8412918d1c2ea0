"""Images, label maps, confidences and mistakes as pictures, and grids of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from ..data.images import Images
from ..trained import Trained
from .analysis import Predictions

VOID_COLOR = (235, 235, 235)


def as_colors(label: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 picture of class indices (H, W); void is light grey."""
    lookup = np.full((256, 3), VOID_COLOR, dtype=np.uint8)
    lookup[: len(colors)] = colors
    return lookup[np.asarray(label)]


def as_pictures(
    views: Tensor, colors: np.ndarray, mean: Tensor | float = 0, std: Tensor | float = 1
) -> list[np.ndarray]:
    """Pictures (H, W, 3) uint8 of class indices (B, H, W), or of images (B, 3, H, W).

    An image is x of (x - mean) / std, in [0, 1]; what lies outside is cut off.
    """
    if views.ndim == 3:
        return [as_colors(label, colors) for label in views.cpu()]
    pixels = (255 * (views * std + mean).clamp(0, 1)).round().byte()
    return list(pixels.permute(0, 2, 3, 1).cpu().numpy())


def as_heat(picture: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8: a picture in grey, reddened where `heat` (H, W) rises from 0 to 1."""
    grey = np.asarray(picture).mean(-1, keepdims=True)
    share = np.clip(np.asarray(heat), 0, 1)[..., None]
    return ((1 - share) * grey + share * np.array([214, 40, 40])).astype(np.uint8)


def as_mistakes(
    label: np.ndarray, truth: np.ndarray, confidence: np.ndarray, threshold: float
) -> np.ndarray:
    """(H, W, 3) picture: right pixels pale, mistakes amber, confident mistakes dark red."""
    wrong = np.asarray(label) != np.asarray(truth)
    picture = np.full((*wrong.shape, 3), (226, 230, 236), dtype=np.uint8)
    picture[wrong] = (240, 178, 80)
    picture[wrong & (np.asarray(confidence) >= threshold)] = (160, 24, 42)
    picture[np.asarray(truth) == 255] = 255
    return picture


def grid(
    rows: Mapping[str, Sequence[np.ndarray]],
    *,
    classes: Sequence[str] = (),
    colors: np.ndarray | None = None,
    titles: Sequence[str] = (),
    height: float = 1.25,
) -> Figure:
    """Pictures in labelled rows: (H, W, 3) uint8 as they are, (H, W) maps in [0, 1] as heat.

    `classes` and their `colors` (K, 3) add a legend below; `titles` stand above the columns.
    """
    columns = max(map(len, rows.values()))
    first = next(iter(rows.values()))[0]
    width = height * first.shape[1] / first.shape[0]
    legend = 0.5 if len(classes) else 0
    size = (columns * width + 1.1, len(rows) * height + legend)
    larger = min(max(1, size[0] / 6.4), 1.4)  # a wide figure is shrunk to the text column
    figure, axes = plt.subplots(len(rows), columns, figsize=size, squeeze=False)
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        for axis in line:
            axis.set(xticks=[], yticks=[])
            axis.set_frame_on(False)
        for axis, picture in zip(line, pictures, strict=False):
            heat = picture.ndim == 2
            shades = {"cmap": "viridis", "vmin": 0, "vmax": 1} if heat else {}
            axis.imshow(np.asarray(picture), **shades)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9 * larger)
    for axis, title in zip(axes[0], titles, strict=False):
        axis.set_title(title, fontsize=8 * larger)
    if len(classes):
        patches = [
            Patch(color=np.array(c) / 255, label=name)
            for name, c in zip(classes, colors, strict=True)
        ]
        about = {"ncols": min(len(classes), 6), "fontsize": 8 * larger}
        figure.legend(handles=patches, loc="outside lower center", **about)
    return figure


def answers(
    images: Sequence[np.ndarray],
    says: Mapping[str, Predictions],
    classes: Sequence[str],
    colors: np.ndarray,
    *,
    height: float = 1.0,
) -> Figure:
    """Two rows per image (H, W, 3): label maps, and below each its confidence, a column per title.

    The first column has the annotation and the image. `says` holds predictions of these images
    first; others that follow are not drawn.
    """
    rows = {}
    for i, image in enumerate(images):
        label = (next(iter(says.values())).truth[i], *(given.label[i] for given in says.values()))
        rows[f"labels {i + 1}"] = [as_colors(y, colors) for y in label]
        rows[f"confidence {i + 1}"] = [image, *(given.confidence[i] for given in says.values())]
    titles = ["given", *says]
    return grid(rows, classes=classes, colors=colors, titles=titles, height=height)


def label_maps(
    models: Mapping[str, Trained], images: Images, indices: Sequence[int]
) -> dict[str, list[np.ndarray]]:
    """Rows for `grid`: images, the label maps that each of the models gives them, and the truth."""
    samples = [images[i] for i in indices]
    rows = {"input": [image.permute(1, 2, 0).numpy() for image, _ in samples]}
    for name, model in models.items():
        labels = [model.probs(image[None])[0].argmax(0) for image, _ in samples]
        rows[name] = [as_colors(label, images.colors) for label in labels]
    return rows | {"truth": [as_colors(label, images.colors) for _, label in samples]}
