"""Which training images carry labels: fixed draws by rule, chosen before any result is seen."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..losses import IGNORE
from . import lists
from .images import Images

RULES = ("plain", "spread", "balanced", "nested-plain", "nested-balanced")
TRIES = 300  # random draws that are compared
PRESENT = 30  # pixels from which a class counts as present in an image


@dataclass(frozen=True)
class Split:
    """Indices of labeled and unlabeled training images, disjoint, and a hash of their ids."""

    labeled: tuple[int, ...]
    unlabeled: tuple[int, ...]
    sha256: str


def split(
    images: Images,
    dataset: str,
    labeled: int,
    draw: int,
    unlabeled: int = 0,
    name: str = "",
    root: str = "",
) -> Split:
    """The `draw`-th split with `labeled` labeled images (0: all) and `unlabeled` others (0: all).

    Only images with annotation are labeled; the others are all unlabeled. By `name`:
        plain: at random.
        spread: one image of each of `labeled` equal slices of the list, which for video is in film
            order ("" but for mosaic).
        balanced: of 300 random draws, the one whose rarest class occurs in most images (ties: the
            next rarest, ...) ("" for mosaic).
        nested-plain, nested-balanced: of equal draws, the smaller is part of the larger. Balanced,
            the next image is the first of a random order to show the class labeled least so far.
        anything else: an imported list (`s4lib.data.lists`), which is one draw of a fixed size.

    Raises:
        ValueError: more labels asked for than there are annotated images, a negative draw, or a
            list that is unknown, altered or of another dataset.
    """
    if draw < 0:
        raise ValueError(f"draw={draw}: choose 0 or more")
    if name and name not in RULES:
        chosen, rest = _listed(images, dataset, labeled, draw, name, root)
    else:
        pool = images.annotated()
        if not 0 <= labeled <= len(pool):
            raise ValueError(
                f"labeled={labeled}: choose 0 (all) to {len(pool)}, "
                f"the annotated images of {dataset} train"
            )
        name = name or ("balanced" if dataset == "mosaic" else "spread")
        chosen = [pool[i] for i in _drawn(images, pool, labeled or len(pool), draw, name)]
        rest = set(range(len(images))) - set(chosen)
    chosen = tuple(sorted(int(i) for i in chosen))
    rest = tuple(sorted(rest))[: unlabeled or None]
    text = "\n".join([*(images.ids[i] for i in chosen), "--", *(images.ids[i] for i in rest)])
    return Split(chosen, rest, hashlib.sha256(text.encode()).hexdigest())


def _drawn(
    images: Images, pool: Sequence[int], count: int, draw: int, rule: str
) -> Sequence[int] | np.ndarray:
    """`count` different places in `pool`, by a rule."""
    if count == len(pool):
        return range(count)
    nested = rule.startswith("nested-")
    rng = np.random.default_rng([draw] if nested else [count, draw])
    if rule == "spread":
        return _spread(len(pool), count, rng)
    if rule.endswith("plain"):
        return rng.permutation(len(pool))[:count]
    present = np.zeros((len(pool), len(images.classes)), dtype=int)
    for i, index in enumerate(pool):
        pixels = np.bincount(images.label(index).flatten().numpy(), minlength=IGNORE + 1)
        present[i] = pixels[: len(images.classes)] >= PRESENT
    if nested:
        return _rarest_first(present, count, rng)
    draws = [rng.permutation(len(pool))[:count] for _ in range(TRIES)]
    return max(draws, key=lambda draw: sorted(present[draw].sum(0)))


def _rarest_first(present: np.ndarray, count: int, rng: np.random.Generator) -> list[int]:
    left = rng.permutation(len(present))
    chosen: list[int] = []
    while len(chosen) < count:
        shown = present[left]
        counts = np.where(shown.any(0), present[chosen].sum(0), len(present) + 1)
        place = int(shown[:, counts.argmin()].argmax())  # 0 if no class is left to show
        chosen.append(int(left[place]))
        left = np.delete(left, place)
    return chosen


def _spread(length: int, count: int, rng: np.random.Generator) -> np.ndarray:
    edges = np.linspace(0, length, count + 1).astype(int)  # whole numbers: no frame twice
    return (edges[:-1] + rng.uniform(size=count) * np.diff(edges)).astype(int)


def _listed(
    images: Images, dataset: str, labeled: int, draw: int, name: str, root: str
) -> tuple[list[int], set[int]]:
    """(labeled, unlabeled) indices of an imported list."""
    ids, others = lists.read(dataset, name, root, RULES)
    if draw:
        raise ValueError(f"draw={draw}: split={name!r} is one draw, so choose 0 (and vary seed)")
    if labeled not in (0, len(ids)):
        raise ValueError(
            f"labeled={labeled}: split={name!r} labels {len(ids)} images, so choose {len(ids)} or 0"
        )
    place = {name: index for index, name in enumerate(images.ids)}
    absent = [one for one in [*ids, *(others or ())] if one not in place]
    if absent:
        raise ValueError(
            f"split={name!r}: {len(absent)} of its images are not in {dataset} train, for instance "
            f"{absent[0]} ({images.note or f'{len(images)} images'})"
        )
    chosen = [place[one] for one in ids]
    images.require_annotations(chosen)
    rest = set(range(len(images))) - set(chosen)
    return chosen, rest if others is None else {place[one] for one in others}
