"""`mosaic`: an embedded, procedural dataset to study semi-supervision on a CPU.

Every image is a tiling of 3 to 7 warped regions; a region's class is the *family* of its texture,
drawn with random orientation, frequency and contrast. Its hue hints at the class but sometimes
misleads; light, gamma, colour cast and noise vary by image. An image is a pure function of (part,
index): nothing is downloaded and nothing is stored.
"""

from __future__ import annotations

import numpy as np

from .images import Images

LENGTHS = {"train": 512, "val": 256, "test": 256}
HUE_TRUE, HUE_SPREAD, LIGHT, NOISE = 0.85, 0.06, 0.25, 0.04


class Mosaic(Images):
    """Procedural images, 64 x 64 unless `size` says otherwise. `root` is not used."""

    classes = ("plain", "stripes", "checks", "dots", "speckle", "blotches", "waves", "grid")
    colors = np.array(
        [
            (110, 113, 122),
            (228, 87, 86),
            (76, 152, 103),
            (74, 119, 196),
            (237, 178, 60),
            (152, 99, 178),
            (70, 181, 190),
            (240, 134, 62),
        ],
        dtype=np.uint8,
    )

    def __init__(self, part: str, *, root: str = "", size: tuple[int, int] | None = None):
        super().__init__()
        self.part = part
        self.size = size or (64, 64)
        if self.size[0] != self.size[1]:
            raise ValueError(f"size={list(self.size)}: mosaic images are square")
        self.ids = [f"{part}-{i:03d}" for i in range(LENGTHS[part])]

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return scene(np.random.default_rng([list(LENGTHS).index(self.part), index]), self.size[0])


def smooth_noise(rng: np.random.Generator, size: int, cells: int, count: int = 1) -> np.ndarray:
    """`count` fields (count, size, size): normal values on a cells x cells grid, interpolated."""
    grid = rng.standard_normal((count, cells, cells))
    at = np.linspace(0, cells - 1, size)
    low = np.minimum(at.astype(int), cells - 2)
    t = at - low
    t = t * t * (3 - 2 * t)
    weights = np.zeros((size, cells))
    weights[np.arange(size), low] = 1 - t
    weights[np.arange(size), low + 1] = t
    return weights @ grid @ weights.T


def texture(family: str, u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brightness pattern, about -1 to 1, at rotated pixel coordinates u, v (size, size)."""
    a, b = rng.uniform(0, 2 * np.pi, 2)
    f = 2 * np.pi * rng.uniform(0.087, 0.16)  # radians a pixel: periods of 6 to 12 pixels
    if family == "plain":
        return np.zeros_like(u)
    if family == "stripes":
        return np.sin(f * u + a)
    if family == "checks":
        return np.sign(np.sin(0.8 * f * u + a) * np.sin(0.8 * f * v + b))
    if family == "dots":
        return np.where(np.sin(f * u + a) * np.sin(f * v + b) > 0.4, 1.3, -0.35)
    if family == "speckle":
        return rng.standard_normal(u.shape)
    if family == "blotches":
        return 1.3 * smooth_noise(rng, len(u), len(u) // 4)[0]
    if family == "waves":
        return np.sin(f * u + a + 2.2 * np.sin(0.45 * f * v + b))
    line = lambda x, shift: np.abs(np.mod(f * x / np.pi + shift, 2) - 1) < 0.28  # noqa: E731
    return np.where(line(u, a) | line(v, b), 1.2, -0.4)  # grid


def hue_to_rgb(hue: float, saturation: float, value: np.ndarray) -> np.ndarray:
    """RGB (3, ...) of one hue and saturation at every value."""
    k = (np.array([5.0, 3.0, 1.0]) + hue * 6) % 6
    fade = saturation * np.clip(np.minimum(k, 4 - k), 0, 1)
    return value * (1 - fade).reshape(3, *[1] * value.ndim)


def scene(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """One (image, label): uint8 (size, size, 3) and (size, size)."""
    names = Mosaic.classes
    unit = (np.arange(size) + 0.5) / size
    x, y = np.meshgrid(unit, unit)
    warp = 0.1 * smooth_noise(rng, size, 6, 2)
    regions = rng.integers(3, 8)
    seeds = rng.uniform(0, 1, (regions, 2))
    away = np.stack([x, y]) + warp - seeds[:, :, None, None]  # (regions, 2, size, size)
    region = (away**2).sum(1).argmin(0)
    family = rng.integers(0, len(names), regions)
    image = np.zeros((3, size, size))
    for r in range(regions):
        turn = rng.uniform(0, np.pi)
        u = (x * np.cos(turn) + y * np.sin(turn)) * 64
        v = (y * np.cos(turn) - x * np.sin(turn)) * 64
        pattern = texture(names[family[r]], u, v, rng)
        own = family[r] / len(names) + HUE_SPREAD * rng.standard_normal()
        hue = own % 1 if rng.uniform() < HUE_TRUE else rng.uniform()
        saturation, base = rng.uniform(0.15, 0.7), rng.uniform(0.35, 0.75)
        contrast = rng.uniform(0.15, 0.35)
        here = region == r
        image[:, here] = hue_to_rgb(hue, saturation, np.clip(base + contrast * pattern[here], 0, 1))
    light = 1 + LIGHT * smooth_noise(rng, size, 3)[0]
    cast = np.exp(0.25 * LIGHT * rng.standard_normal((3, 1, 1)))
    image = image ** np.exp(LIGHT * rng.standard_normal()) * light * cast
    image += NOISE * rng.uniform(0.3, 1.7) * rng.standard_normal(image.shape)
    image = np.round(255 * np.clip(image, 0, 1)).astype(np.uint8)
    return image.transpose(1, 2, 0), family[region].astype(np.uint8)
