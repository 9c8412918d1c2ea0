"""Decoders: features to one fused map, and the classifiers that read it.

`DeepLab` is DeepLabV3+ (Chen et al. 2018) in the `STYLES` of the papers' code, `DPT` is the dense
prediction transformer's decoder (Ranftl et al. 2021) as UniMatch V2 uses it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Style(NamedTuple):
    """What differs between decoders that are all called DeepLabV3+, apart from their sizes.

    Args:
        norm: BN after each convolution.
        pool_norm: BN after the image pooling; a training batch of one image is then refused.
        activation: of the ASPP.
        project: kernel of the convolution that joins the ASPP's branches, 1 or 3.
        separable: depth-wise separable 3 x 3 convolutions in ASPP and classifier, BN after both.
        low_bias, bias: biases in front of BN in the low-level, and the classifier's, convolutions.
        dropout: Dropout2d in front of the last 1 x 1 convolution.
        dropout_within: Dropout2d after the ASPP and after the classifier's other convolutions.
        align_corners: of every upsampling.
    """

    norm: bool = True
    pool_norm: bool = True
    activation: type[nn.Module] = nn.ReLU
    project: int = 1
    separable: bool = False
    low_bias: bool = False
    bias: bool = False
    dropout: float = 0.0
    dropout_within: float = 0.0
    align_corners: bool = True


# TorchSemiSeg's ASPP has one BN over the concatenation of its four convolutions and adds a 1 x 1
# convolution of the pooled branch: the same function and gradients as BN per branch and one 1 x 1
# convolution of all five. The one difference is that at PyTorch's initialisation the pooled branch
# has half of its weight there.
STYLES: dict[str, Style] = {
    "plain": Style(pool_norm=False, align_corners=False),
    "u2pl": Style(project=3, low_bias=True, bias=True, dropout=0.1, dropout_within=0.1),
    "cps": Style(activation=nn.LeakyReLU),
    "unimatch": Style(),
    "augseg": Style(low_bias=True),
    "mmseg": Style(project=3, separable=True, dropout=0.1, align_corners=False),
    "dpt": Style(norm=False, bias=True),  # of its classifier: the decoder is another
}


def conv_norm(
    inputs: int,
    outputs: int,
    kernel: int = 1,
    dilation: int = 1,
    *,
    activation: type[nn.Module] = nn.ReLU,
    norm: bool = True,
    bias: bool = False,
    separable: bool = False,
    dropout: float = 0.0,
) -> nn.Sequential:
    """Convolution that keeps the size, BN, activation, dropout, where wanted.

    A separable one is two of them: 3 x 3 for each channel alone, then 1 x 1.
    """
    groups, middle = (inputs, inputs) if separable else (1, outputs)
    shape = {"padding": dilation * (kernel // 2), "dilation": dilation, "groups": groups}
    layers = [nn.Conv2d(inputs, middle, kernel, bias=bias, **shape)]
    layers += [nn.BatchNorm2d(middle)] if norm else []
    layers += [activation(inplace=True)]
    if separable:
        layers += conv_norm(inputs, outputs, activation=activation, norm=norm, bias=bias)
    return nn.Sequential(*layers, *([nn.Dropout2d(dropout)] if dropout else []))


def classifier(inputs: int, width: int, outputs: int, count: int, style: Style) -> nn.Sequential:
    """`count` convolutions 3 x 3, then one 1 x 1 to `outputs` channels."""
    drops = [style.dropout_within] * (count - 1) + [style.dropout]
    how = {"norm": style.norm, "bias": style.bias, "separable": style.separable}
    convs = [
        conv_norm(n, width, 3, dropout=p, **how)
        for n, p in zip([inputs] + [width] * (count - 1), drops, strict=True)
    ]
    return nn.Sequential(*convs, nn.Conv2d(width, outputs, 1))


class DeepLab(nn.Module):
    """ASPP on the deepest feature, concatenated with the finest one, at the finest one's size."""

    def __init__(
        self,
        channels: list[int],
        *,
        width: int,
        low_width: int,
        aspp_width: int,
        rates: list[int],
        style: Style,
    ):
        super().__init__()
        low, *_, deep = channels
        act = style.activation
        self.branches = nn.ModuleList([conv_norm(deep, aspp_width, activation=act)])
        for rate in rates:
            how = {"activation": act, "separable": style.separable}
            self.branches.append(conv_norm(deep, aspp_width, 3, rate, **how))
        self.pooled = nn.Conv2d(deep, aspp_width, 1, bias=not style.pool_norm)
        if style.pool_norm:
            self.pooled = nn.Sequential(self.pooled, nn.BatchNorm2d(aspp_width))
        self.activation = act()
        self.project = conv_norm(
            aspp_width * (len(rates) + 2),
            width,
            style.project,
            activation=act,
            dropout=style.dropout_within,
        )
        self.low = conv_norm(low, low_width, bias=style.low_bias)
        self.channels = width + low_width
        self.align_corners = style.align_corners

    def forward(self, *features: Tensor) -> Tensor:
        low, *_, deep = features
        pooled = self.activation(self.pooled(deep.mean((2, 3), keepdim=True)))
        pooled = pooled.expand(-1, -1, *deep.shape[2:])
        x = self.project(torch.cat([*(branch(deep) for branch in self.branches), pooled], 1))
        x = F.interpolate(x, low.shape[2:], mode="bilinear", align_corners=self.align_corners)
        return torch.cat([x, self.low(low)], 1)


class DPT(nn.Module):
    """Four maps of one size become a pyramid of strides 1/4, 1/2, 1, 2 of it, fused from the coarse
    end to `width` channels at eight times their size; no BN (UniMatch V2's model/semseg/dpt.py).

    The four levels have 1, 2, 4 and 8 times `low_width` channels, which fits the small and base
    encoders. The coarsest fusion's `skip` has nothing to add: its parameters get no gradient, and
    are there because they are in the published count.
    """

    def __init__(self, channels: list[int], *, width: int, low_width: int):
        super().__init__()
        levels = [low_width * 2**i for i in range(4)]
        self.levels = nn.ModuleList(
            nn.Conv2d(c, n, 1) for c, n in zip(channels, levels, strict=True)
        )
        self.resize = nn.ModuleList(
            [
                nn.ConvTranspose2d(levels[0], levels[0], 4, stride=4),
                nn.ConvTranspose2d(levels[1], levels[1], 2, stride=2),
                nn.Identity(),
                nn.Conv2d(levels[3], levels[3], 3, stride=2, padding=1),
            ]
        )
        self.reduce = nn.ModuleList(nn.Conv2d(n, width, 3, padding=1, bias=False) for n in levels)
        self.fusions = nn.ModuleList(Fusion(width) for _ in levels)
        self.channels = width

    def forward(self, *features: Tensor) -> Tensor:
        parts = zip(self.levels, self.resize, self.reduce, features, strict=True)
        maps = [reduce(resize(level(f))) for level, resize, reduce, f in parts]
        sizes = [tuple(2 * n for n in maps[0].shape[2:]), *(m.shape[2:] for m in maps)]
        x = self.fusions[3](maps[3], None, sizes[3])
        for i in (2, 1, 0):
            x = self.fusions[i](x, maps[i], sizes[i])
        return x


class Fusion(nn.Module):
    """Add the next finer map to what is fused so far, refine, and go to that map's finer size."""

    def __init__(self, width: int):
        super().__init__()
        self.skip, self.refine = residual(width), residual(width)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, finer: Tensor | None, size: tuple[int, ...]) -> Tensor:
        if finer is not None:
            x = x + finer + self.skip(finer)
        x = x + self.refine(x)
        return self.out(F.interpolate(x, size, mode="bilinear", align_corners=True))


def residual(width: int) -> nn.Sequential:
    """What a pre-activation residual unit adds to its input."""
    convs = [nn.Conv2d(width, width, 3, padding=1) for _ in range(2)]
    return nn.Sequential(nn.ReLU(), convs[0], nn.ReLU(), convs[1])
