"""GCT's flaw maps: where a prediction is wrong, as it is known, predicted, and made use of.

Ke et al. (2020), as in PixelSSL@ce19203 (ssl_gct.py), which TorchSemiSeg@5e0c29c has taken over.
Maps are (B, 1, H, W), from 0, right, to 1, wrong; `probs` (B, K, H, W); blurs are sized by H.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .losses import IGNORE


def gaussian_blur(x: Tensor, size: int) -> Tensor:
    """Maps (B, 1, H, W) blurred by a window of `size` pixels, odd; the border is reflected.

    Its deviation is OpenCV's for that size, 0.3 ((size - 1) / 2 - 1) + 0.8; what lies beyond the
    window is folded back into it (scipy's gaussian_filter of a window with a single one in it).

    Raises:
        ValueError: an even window, or one that is not less than twice the image.
    """
    half = size // 2
    if size % 2 == 0 or half >= min(x.shape[-2:]):
        raise ValueError(f"size={size}: choose an odd window below twice {min(x.shape[-2:])}")
    sigma = 0.3 * ((size - 1) / 2 - 1) + 0.8
    reach = int(4 * sigma + 0.5)
    at = torch.arange(-reach, reach + 1, dtype=torch.float64)
    weight = torch.exp(-at.square() / (2 * sigma**2))
    place = (half + at.long()) % (2 * size)
    place = torch.minimum(place, 2 * size - 1 - place)
    window = torch.zeros(size, dtype=torch.float64).index_add(0, place, weight / weight.sum())
    window = window.to(x.device, x.dtype, non_blocking=True)
    x = F.pad(x, (half,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(x, window.view(1, 1, 1, -1)), window.view(1, 1, -1, 1))


def odd(size: int) -> int:
    """The window that is meant by a share of an image: itself, or the next odd number."""
    return size + 1 - size % 2


@torch.no_grad()
def flaw_target(probs: Tensor, label: Tensor, mu: float = 0.5, nu: int = 1) -> Tensor:
    """What the flaw detector should say: the difference to the label, spread out, from 0 to 1.

    The sum over classes of |one-hot - probs| times `mu`, blurred (H / 8), then `nu` times dilated
    by a pixel and blurred (H / 4), then stretched image by image. An IGNORE pixel has no one-hot,
    so that it looks half wrong, however sure the prediction is.
    """
    height, probs = probs.shape[-2], probs.float()
    true = probs.gather(1, torch.where(label == IGNORE, 0, label)[:, None])
    # Of K classes the others differ by 1 - true in all, and so does the true one.
    flaw = mu * torch.where(label[:, None] == IGNORE, 1, 2 - 2 * true)
    flaw = gaussian_blur(flaw, odd(height // 8))
    for _ in range(nu):
        flaw = F.max_pool2d(F.pad(flaw, (1,) * 4, mode="reflect"), 3, 1)
        flaw = gaussian_blur(flaw, odd(height // 4))
    return stretched(flaw)


def stretched(x: Tensor) -> Tensor:
    """Each image's map (B, 1, H, W) from 0 to 1."""
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    return (x - low) / (high - low + 1e-9)


@torch.no_grad()
def flaw_map(raw: Tensor, clip: float = 0.1, released: bool = False) -> Tensor:
    """The detector's output `raw` made fit for comparison: above 0, blurred (H / 16), from 0 to 1.

    A map that nowhere exceeds `clip` becomes 0: no flaw. `released`: it becomes a constant below 0,
    as the released code subtracts the lowest value from what it has just set to 0.
    """
    flaw = gaussian_blur(raw.float().clamp(min=0), odd(raw.shape[-2] // 16))
    if released:
        low, high = flaw.amin((1, 2, 3), keepdim=True), flaw.amax((1, 2, 3), keepdim=True)
        return (torch.where(high > clip, flaw, 0) - low) / (high - low + 1e-9)
    return torch.where(flaw.amax((1, 2, 3), keepdim=True) > clip, stretched(flaw), 0)


@torch.no_grad()
def dynamic_targets(
    probs: tuple[Tensor, Tensor], flaws: tuple[Tensor, Tensor], threshold: float = 0.6
) -> tuple[Tensor, Tensor, Tensor]:
    """(target of one, of the other, both bad) of the dynamic consistency constraint.

    A target is the network's own `probs` where its flaw map is at most the other's, else the
    other's probs; above `threshold` a flaw counts as 1. Both bad: (B, 1, H, W) bool, both above it.
    """
    bad = [flaw > threshold for flaw in flaws]
    one, two = (torch.where(b, 1, flaw) for b, flaw in zip(bad, flaws, strict=True))
    left = torch.where(one <= two, *probs)
    right = torch.where(two <= one, *probs[::-1])
    return left, right, bad[0] & bad[1]


class IBNorm(nn.Module):
    """BN with weights for the first half of the channels, instance normalisation for the rest."""

    def __init__(self, channels: int):
        super().__init__()
        self.half = (channels + 1) // 2
        self.batch = nn.BatchNorm2d(self.half)
        self.instance = nn.InstanceNorm2d(channels - self.half)

    def forward(self, x: Tensor) -> Tensor:
        one, two = x[:, : self.half], x[:, self.half :]
        return torch.cat([self.batch(one.contiguous()), self.instance(two.contiguous())], 1)


class FlawDetector(nn.Module):
    """Flaw maps (B, 1, H, W), not bounded, from images (B, 3, H, W) and `probs` of `classes`.

    Eight 4 x 4 convolutions with up to 8 `width` channels; images are enlarged to `least` pixels a
    side first, where they are smaller: it takes 64 to have any output.
    """

    def __init__(self, classes: int, width: int = 64, least: int = 64):
        super().__init__()
        channels = [3 + classes, *(width * n for n in (1, 2, 2, 4, 4, 8, 8))]
        layers, self.least = [], max(least, 64)
        for i, stride in enumerate((2, 2, 1, 2, 1, 2, 1)):
            layers.append(nn.Conv2d(channels[i], channels[i + 1], 4, stride, 1))
            layers += [IBNorm(channels[i + 1]), nn.LeakyReLU(0.2, inplace=True)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels[-1], 1, 4, 2, 1))

    def forward(self, image: Tensor, probs: Tensor) -> Tensor:
        x, size = torch.cat([image, probs.to(image.dtype)], 1), image.shape[-2:]
        enlarged = [max(side, self.least) for side in size]
        x = F.interpolate(x, enlarged, mode="bilinear", align_corners=True)
        return F.interpolate(self.layers(x), size, mode="bilinear", align_corners=True)
