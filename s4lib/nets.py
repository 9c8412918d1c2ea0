"""`SegNet`: any timm encoder that gives features, and a DeepLabV3+ decoder (Chen et al. 2018).

net = build_net("light", classes=8)
logits = net(image)                           # (B, K, H, W), at input size
logits = net(image, perturb=nn.Dropout2d())   # encode -> perturb(features) -> decode
"""

from __future__ import annotations

import typing
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import checked, one_of
from .weights import first_line, load_encoder

# Networks by name: keyword arguments of SegNet. `light` is the CPU network of the embedded dataset,
# 0.15 million parameters; the mobilenet is the one that shared small ImageNet weights exist for.
NETS: dict[str, dict] = {
    "light": {
        "encoder": "resnet10t",
        "encoder_args": {"channels": [16, 32, 48, 64], "stem_width": 8},
        "output_stride": 8,
        "skip_stride": 2,
        "width": 24,
        "low_width": 16,
        "rates": [2, 4],
        "aspp_width": 12,
        "fuse": 1,
    },
    "tiny": {
        "encoder": "test_resnet",
        "output_stride": 8,
        "width": 16,
        "low_width": 8,
        "rates": [2],
    },
    "mobilenetv1": {
        "encoder": "mobilenetv1_100",
        "encoder_args": {"pad_type": "same", "bn_eps": 1e-3},
        "output_stride": 16,
        "deep_index": 3,
        "width": 64,
        "low_width": 24,
        "rates": [2, 4],
    },
    "deeplabv3plus-resnet18": {
        "encoder": "resnet18",
        "output_stride": 16,
        "width": 128,
        "rates": [3, 6, 9],
    },
    "deeplabv3plus-resnet50": {"encoder": "resnet50", "output_stride": 16},
    "deeplabv3plus-resnet101": {"encoder": "resnet101", "output_stride": 16},
}


def conv_norm_relu(inputs: int, outputs: int, kernel: int = 1, dilation: int = 1) -> nn.Sequential:
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(inputs, outputs, kernel, padding=padding, dilation=dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class Decoder(nn.Module):
    """ASPP on the deepest feature, concatenated with a finer one, at the finer one's size."""

    def __init__(self, low, deep, *, width: int, low_width: int, aspp_width: int, rates: list[int]):
        super().__init__()
        branches = [conv_norm_relu(deep, aspp_width)]
        branches += [conv_norm_relu(deep, aspp_width, 3, rate) for rate in rates]
        self.branches = nn.ModuleList(branches)
        # No BN after the global mean: it would have one value per image, and none to spare in a
        # batch of one.
        self.pooled = nn.Conv2d(deep, aspp_width, 1)
        self.project = conv_norm_relu(aspp_width * (len(branches) + 1), width)
        self.low = conv_norm_relu(low, low_width)
        self.channels = width + low_width

    def forward(self, low: Tensor, deep: Tensor) -> Tensor:
        pooled = self.pooled(deep.mean((2, 3), keepdim=True)).relu().expand(-1, -1, *deep.shape[2:])
        x = self.project(torch.cat([*(branch(deep) for branch in self.branches), pooled], 1))
        x = F.interpolate(x, low.shape[2:], mode="bilinear")
        return torch.cat([x, self.low(low)], 1)


class SegNet(nn.Module):
    """Encoder, decoder, classifier; logits at input size.

    Its children are `encoder` (image to features), `decoder` (ASPP, features to one fused map) and
    `classifier` (the last convolutions, fused map to logits).

    Args:
        classes: number of classes K.
        encoder: a timm model name that supports `features_only`.
        encoder_args: further arguments of that timm model.
        output_stride: input size / deepest feature size, 8 or 16 where the encoder allows it, 32
            otherwise.
        skip_stride: stride of the feature that is fused in, 4 in DeepLabV3+.
        deep_index: which timm feature goes to the ASPP; None takes the last.
        width, low_width, aspp_width, rates: decoder sizes; aspp_width 0 means `width`.
        fuse: number of 3 x 3 convolutions in the classifier, 2 in DeepLabV3+.
        norm: "batch", or "group" (statistics per image: results do not depend on the batch).
        pretrained: ask timm for its default weights (needs a network or timm's cache).

    Raises:
        ValueError: unknown encoder, or one that gives no pyramid of features at these strides.
    """

    def __init__(
        self,
        classes: int,
        *,
        encoder: str,
        encoder_args: dict | None = None,
        output_stride: int = 16,
        skip_stride: int = 4,
        deep_index: int | None = None,
        width: int = 256,
        low_width: int = 48,
        aspp_width: int = 0,
        rates: list[int] = (6, 12, 18),
        fuse: int = 2,
        norm: str = "batch",
        pretrained: bool = False,
    ):
        super().__init__()
        one_of("norm", norm, "batch", "group")
        arguments = {"features_only": True, "pretrained": pretrained, **(encoder_args or {})}
        if output_stride != 32:
            arguments["output_stride"] = output_stride
        try:
            probe = timm.create_model(encoder, **{**arguments, "pretrained": False}).feature_info
            strides = probe.reduction()
            deep = len(strides) - 1 if deep_index is None else deep_index
            low = strides.index(skip_stride)
            self.encoder = timm.create_model(encoder, out_indices=(low, deep), **arguments)
        except (RuntimeError, TypeError, AssertionError, ValueError, AttributeError) as error:
            raise ValueError(
                f"encoder={encoder!r} with output_stride={output_stride}, "
                f"skip_stride={skip_stride}: timm says {first_line(error)!r}; valid are "
                f"timm.list_models() that give a pyramid of features"
            ) from error
        channels = self.encoder.feature_info.channels()
        self.decoder = Decoder(
            channels[0],
            channels[1],
            width=width,
            low_width=low_width,
            aspp_width=aspp_width or width,
            rates=list(rates),
        )
        inputs = [self.decoder.channels] + [width] * (fuse - 1)
        last = nn.Conv2d(width, classes, 1)
        self.classifier = nn.Sequential(*(conv_norm_relu(n, width, 3) for n in inputs), last)
        info = getattr(self.encoder, "pretrained_cfg", None) or {}
        self.mean, self.std = (
            tuple(info.get("mean", (0.5,) * 3)),
            tuple(info.get("std", (0.5,) * 3)),
        )
        self.source = encoder, encoder_args or {}  # the timm model that weights are given for
        if norm == "group":
            batch_to_group_norm(self)

    def encode(self, image: Tensor) -> tuple[Tensor, ...]:
        """Features (low, deep) of images (B, 3, H, W)."""
        return tuple(self.encoder(image))

    def fuse(self, features: tuple[Tensor, ...]) -> Tensor:
        """The one map (B, C, h, w) that the classifier reads, of features."""
        return self.decoder(*features)

    def classify(self, fused: Tensor, size: torch.Size) -> Tensor:
        """Logits (B, K, *size) of a fused map."""
        return F.interpolate(self.classifier(fused), size, mode="bilinear")

    def decode(self, features: tuple[Tensor, ...], size: torch.Size) -> Tensor:
        """Logits (B, K, *size) of features."""
        return self.classify(self.fuse(features), size)

    def forward(self, image: Tensor, perturb: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        features = self.encode(image)
        if perturb is not None:
            features = tuple(perturb(f) for f in features)
        return self.decode(features, image.shape[-2:])


def batch_to_group_norm(module: nn.Module) -> None:
    """Replace every BN, in place, by GroupNorm with up to 8 groups, as divide its channels."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d):
            groups = max(g for g in range(1, 9) if child.num_features % g == 0)
            new = nn.GroupNorm(groups, child.num_features)
            rest = [getattr(child, extra) for extra in ("drop", "act") if hasattr(child, extra)]
            setattr(module, name, nn.Sequential(new, *rest) if rest else new)
        else:
            batch_to_group_norm(child)


def build_net(name: str, classes: int, *, weights: str | None = None, **changes) -> SegNet:
    """A fresh network from NETS with `changes`, its encoder initialised from a file.

    Raises:
        ValueError: unknown name, unknown argument, or weights that do not fit.
    """
    if name not in NETS:
        raise ValueError(f"net={name!r}: choose one of {', '.join(NETS)}")
    unknown = sorted(set(changes) - set(SegNet.__init__.__kwdefaults__) - {"encoder"})
    if unknown:
        valid = ", ".join(["encoder", *SegNet.__init__.__kwdefaults__])
        raise ValueError(f"net_args has unknown key {unknown[0]!r}: choose from {valid}")
    kinds = typing.get_type_hints(SegNet.__init__)
    changes = {key: checked(key, value, kinds[key]) for key, value in changes.items()}
    arguments = {**NETS[name], **changes}
    if "encoder" in changes and "encoder_args" not in changes:
        arguments.pop("encoder_args", None)  # they belong to the encoder that was replaced
    net = SegNet(classes, **arguments)
    if weights:
        load_encoder(net, Path(weights))
    return net
