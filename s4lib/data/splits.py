"""Which training images carry labels: fixed draws by rule, chosen before any result is seen."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from ..losses import IGNORE
from .images import Images

TRIES = 300  # random draws that are compared
PRESENT = 30  # pixels from which a class counts as present in an image


@dataclass(frozen=True)
class Split:
    """Indices of labeled and unlabeled training images, disjoint, and a hash of their ids."""

    labeled: tuple[int, ...]
    unlabeled: tuple[int, ...]
    sha256: str


def split(images: Images, dataset: str, labeled: int, draw: int, unlabeled: int = 0) -> Split:
    """The `draw`-th split with `labeled` labeled images (0: all) and `unlabeled` others (0: all).

    mosaic labels, of 300 random draws, the one whose rarest class occurs in most images (ties: the
    next rarest, ...); camvid one frame of each of `labeled` equal slices of the list, which is in
    film order.

    Raises:
        ValueError: more labels asked for than there are images, or a negative draw.
    """
    if not 0 <= labeled <= len(images):
        raise ValueError(
            f"labeled={labeled}: choose 0 (all) to {len(images)}, the images of {dataset} train"
        )
    if draw < 0:
        raise ValueError(f"draw={draw}: choose 0 or more")
    if labeled in (0, len(images)):
        chosen = range(len(images))
    elif dataset == "mosaic":
        chosen = _class_balanced(images, labeled, np.random.default_rng([labeled, draw]))
    else:
        chosen = _spread(len(images), labeled, np.random.default_rng([labeled, draw]))
    chosen = tuple(sorted(int(i) for i in chosen))
    rest = tuple(sorted(set(range(len(images))) - set(chosen)))[: unlabeled or None]
    text = "\n".join([*(images.ids[i] for i in chosen), "--", *(images.ids[i] for i in rest)])
    return Split(chosen, rest, hashlib.sha256(text.encode()).hexdigest())


def _class_balanced(images: Images, count: int, rng: np.random.Generator) -> np.ndarray:
    present = np.zeros((len(images), len(images.classes)), dtype=int)
    for i in range(len(images)):
        pixels = np.bincount(images[i][1].flatten().numpy(), minlength=IGNORE + 1)
        present[i] = pixels[: len(images.classes)] >= PRESENT
    draws = [rng.permutation(len(images))[:count] for _ in range(TRIES)]
    return max(draws, key=lambda draw: sorted(present[draw].sum(0)))


def _spread(length: int, count: int, rng: np.random.Generator) -> np.ndarray:
    edges = np.linspace(0, length, count + 1).astype(int)  # whole numbers: no frame twice
    return (edges[:-1] + rng.uniform(size=count) * np.diff(edges)).astype(int)
