"""Views of a sample: random crop, scale and flip (weak), then colour (strong), on the device.

What happens to a sample is drawn from a generator keyed by (seed, stream, pass, index): the same
whatever batch, process or order it is in. The drawing is per sample, the arithmetic per batch.
Colour operations work on RGB in [0, 1], before normalisation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..losses import IGNORE

GREY = torch.tensor([0.299, 0.587, 0.114])
_TO_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_TO_RGB = torch.linalg.inv(_TO_YIQ)
CPU = torch.device("cpu")


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` of the host on the device; a GPU fetches it from pinned memory, nobody waits."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@dataclass(frozen=True)
class Views:
    """Our own views (`augment` "s4"), and how strong they are.

    Args:
        crop: (height, width) of a view.
        scale: bounds of the zoom; below 1 the image does not fill the crop.
        outside: what is seen there: "reflect" mirrors the image, "void" is black and takes no part
            in a loss.
        jitter: brightness, contrast and saturation factors are drawn from 1 +- jitter.
        hue: hue shift, as a share of the colour circle.
        colour, grey, blur: probabilities of jitter, greyscale and blur.
        noise: standard deviation of Gaussian noise, for methods whose strong views are noisy ones.
    """

    crop: tuple[int, int]
    scale: tuple[float, float] = (0.75, 1.5)
    outside: str = "reflect"
    jitter: float = 0.5
    hue: float = 0.05
    colour: float = 0.8
    grey: float = 0.2
    blur: float = 0.5
    noise: float = 0.15

    def draw_crop(
        self, rng: np.random.Generator, height: int, width: int, label: Tensor | None = None
    ) -> np.ndarray:
        """(2, 3) affine map from crop to image coordinates, both in [-1, 1]; `label` is unused."""
        scale, flip, fx, fy = rng.uniform(*self.scale), rng.uniform() < 0.5, *rng.uniform(-1, 1, 2)
        sx, sy = self.crop[1] / width / scale, self.crop[0] / height / scale
        # The window's centre may move as far as the window stays inside, or, larger than the image,
        # contains it.
        return np.array(
            [[-sx if flip else sx, 0, fx * abs(1 - sx)], [0, sy, fy * abs(1 - sy)]],
            dtype=np.float32,
        )

    def draw_colour(self, rng: np.random.Generator) -> np.ndarray:
        """(7,): brightness, contrast, saturation factors, hue angle; grey, blur, jitter 0 or 1."""
        factors = 1 + self.jitter * rng.uniform(-1, 1, 3)
        angle = 2 * math.pi * self.hue * rng.uniform(-1, 1)
        on = rng.uniform(size=3) < (self.grey, self.blur, self.colour)
        return np.array([*factors, angle, *on], dtype=np.float32)

    def crop_images(self, images: list[Tensor], maps: list[np.ndarray], device=CPU) -> Tensor:
        """Float views (B, 3, *crop) in [0, 1] of uint8 images (3, H, W) that may differ in size."""
        views = _sample(images, maps, self.crop, "bilinear", self._padding, device)
        return views / 255

    def crop_labels(self, labels: list[Tensor], maps: list[np.ndarray], device=CPU) -> Tensor:
        """Views (B, *crop) int64 of uint8 labels (H, W); IGNORE outside unless reflected."""
        # Zero padding then means IGNORE.
        layers = [label[None] for label in labels]
        views = _sample(layers, maps, self.crop, "nearest", self._padding, device, zero=IGNORE)
        return views[:, 0].round().long() + IGNORE

    def valid(self, images: list[Tensor], maps: list[np.ndarray], device=CPU) -> Tensor:
        """(B, *crop) bool: False where a view shows no image."""
        if self.outside == "reflect":
            return torch.ones(len(images), *self.crop, dtype=torch.bool, device=device)
        return (_grid(maps, self.crop, device).abs() <= 1).all(-1)

    def strong(self, images: Tensor, rngs: list[np.random.Generator]) -> Tensor:
        """Views (B, 3, H, W) in [0, 1], each in colours drawn from its own generator."""
        draws = torch.from_numpy(np.stack([self.draw_colour(rng) for rng in rngs]))
        return colour_jitter(images, move(draws, images.device))

    @property
    def _padding(self) -> str:
        return "reflection" if self.outside == "reflect" else "zeros"


def add_noise(image: Tensor, std: float, rngs: list[np.random.Generator]) -> Tensor:
    """Normalised images (B, 3, H, W) with noise of each one's own generator."""
    noise = torch.empty_like(image)
    for one, rng in zip(noise, rngs, strict=True):
        generator = torch.Generator(image.device).manual_seed(int(rng.integers(2**62)))
        one.normal_(generator=generator)
    return image + std * noise


def _grid(maps: list[np.ndarray], crop: tuple[int, int], device: torch.device) -> Tensor:
    maps = move(torch.from_numpy(np.stack(maps)), device)
    return F.affine_grid(maps, [len(maps), 1, *crop], align_corners=False)


def _sample(
    values: list[Tensor],
    maps: list[np.ndarray],
    crop: tuple[int, int],
    mode: str,
    padding: str,
    device: torch.device,
    zero: int = 0,
) -> Tensor:
    """Float views of uint8 values, `zero` subtracted: they reach the device as bytes."""
    if len({v.shape for v in values}) > 1:  # images of different sizes: one by one
        pairs = zip(values, maps, strict=True)
        return torch.cat([_sample([v], [m], crop, mode, padding, device, zero) for v, m in pairs])
    pixels, grid = move(torch.stack(values), device).float(), _grid(maps, crop, device)
    pixels = pixels.sub_(zero) if zero else pixels
    return F.grid_sample(pixels, grid, mode=mode, padding_mode=padding, align_corners=False)


def colour_jitter(image: Tensor, draws: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1], their colours changed and blurred by `draws` (B, 7)."""
    d = draws[:, :, None, None, None]
    x = image * d[:, 0]
    middle = x.mean((1, 2, 3), keepdim=True)
    x.sub_(middle).mul_(d[:, 1]).add_(middle)
    cos, sin = draws[:, 2] * draws[:, 3].cos(), draws[:, 2] * draws[:, 3].sin()
    turn = torch.zeros(len(x), 3, 3, device=x.device)
    turn[:, 0, 0] = 1
    turn[:, 1, 1], turn[:, 1, 2], turn[:, 2, 1], turn[:, 2, 2] = cos, -sin, sin, cos
    matrix = _TO_RGB.to(x.device) @ turn @ _TO_YIQ.to(x.device)
    x = (matrix @ x.flatten(2)).view_as(x)
    # Weights of 0 or 1 choose, as `where` does in several times the time.
    x.lerp_(image, (d[:, 6] <= 0).float())
    grey = (x * GREY.to(x.device)[:, None, None]).sum(1, keepdim=True)
    x.lerp_(grey.expand_as(x), (d[:, 4] > 0).float())
    return x.lerp_(_box_blur(x), (d[:, 5] > 0).float()).clamp_(0, 1)


def _box_blur(image: Tensor) -> Tensor:
    """Means over 3 x 3 pixels, the images mirrored at their borders; avg_pool2d is far slower."""
    mirrored, (height, width) = F.pad(image, (1, 1, 1, 1), mode="reflect"), image.shape[2:]
    total = torch.zeros_like(image)
    for y in range(3):
        for x in range(3):
            total.add_(mirrored[..., y : y + height, x : x + width])
    return total.div_(9)
