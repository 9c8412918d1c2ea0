"""`SegNet`: an encoder of timm, a decoder and a classifier, in the combinations of `NETS`.

net = build_net("light", classes=8)
logits = net(image)                           # (B, K, H, W), at input size
logits = net(image, perturb=nn.Dropout2d())   # encode -> perturb(features) -> decode
"""

from __future__ import annotations

import typing
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .architectures import NETS
from .config import checked, one_of
from .decoders import DPT, STYLES, DeepLab, classifier
from .encoders import Tokens, batch_to_group_norm, ceil_pool, dilate, pyramid
from .weights import load_encoder


class SegNet(nn.Module):
    """Encoder, decoder, classifier; logits at input size.

    Its children are `encoder` (image to features), `decoder` (features to one fused map) and
    `classifier` (the last convolutions, fused map to logits); `representation` (fused map to
    embeddings) and `auxiliary` (see `auxiliary_logits`) are None unless asked for.

    Args:
        classes: number of classes K.
        encoder: a timm model name that supports `features_only`; a vision transformer for "dpt".
        encoder_args: further arguments of that timm model.
        decoder: one of s4lib.decoders.STYLES.
        output_stride: input size / deepest feature size, 8 or 16 where the encoder allows it, 32
            otherwise.
        skip_stride: stride of the feature that is fused in, 4 in DeepLabV3+.
        deep_index: which timm feature goes to the ASPP; None takes the last.
        taps: blocks of a vision transformer, from 0, whose tokens are its features.
        multi_grid: factors on the dilations of the blocks of a ResNet's layer4; none if empty.
        ceil_mode: the max-pool of a ResNet rounds sizes up.
        width, low_width, aspp_width, rates: decoder sizes; aspp_width 0 means `width`.
        fuse: number of 3 x 3 convolutions in the classifier, 2 in DeepLabV3+.
        representation: also a second classifier, with `width` outputs: U2PL's embeddings.
        auxiliary: also a small classifier on the last but one feature.
        norm: "batch", or "group" (statistics per image: results do not depend on the batch).
        pretrained: ask timm for its default weights (needs a network or timm's cache).

    Raises:
        ValueError: unknown encoder, decoder or norm, or an encoder that the rest does not fit.
    """

    def __init__(
        self,
        classes: int,
        *,
        encoder: str,
        encoder_args: dict | None = None,
        decoder: str = "plain",
        output_stride: int = 16,
        skip_stride: int = 4,
        deep_index: int | None = None,
        taps: list[int] = (2, 5, 8, 11),
        multi_grid: list[int] = (),
        ceil_mode: bool = False,
        width: int = 256,
        low_width: int = 48,
        aspp_width: int = 0,
        rates: list[int] = (6, 12, 18),
        fuse: int = 2,
        representation: bool = False,
        auxiliary: bool = False,
        norm: str = "batch",
        pretrained: bool = False,
    ):
        super().__init__()
        one_of("norm", norm, "batch", "group")
        style = STYLES[one_of("decoder", decoder, *STYLES)]
        self.source = encoder, encoder_args or {}  # the timm model that weights are given for
        if decoder == "dpt":
            self.encoder = Tokens(*self.source, pretrained=pretrained, taps=taps)
            channels = self.encoder.channels
            self.decoder = DPT(channels, width=width, low_width=low_width)
        else:
            self.encoder = pyramid(
                *self.source,
                pretrained=pretrained,
                output_stride=output_stride,
                skip_stride=skip_stride,
                deep_index=deep_index,
                middle=auxiliary,
            )
            channels = self.encoder.feature_info.channels()
            self.decoder = DeepLab(
                channels,
                width=width,
                low_width=low_width,
                aspp_width=aspp_width or width,
                rates=list(rates),
                style=style,
            )
        if multi_grid:
            dilate(self.encoder, multi_grid)
        if ceil_mode:
            ceil_pool(self.encoder)
        fused = self.decoder.channels
        self.classifier = classifier(fused, width, classes, fuse, style)
        self.representation = self.auxiliary = None
        if representation:
            self.representation = classifier(fused, width, width, fuse, style)
        if auxiliary:
            whole = style._replace(separable=False)
            self.auxiliary = classifier(channels[-2], 256, classes, 1, whole)
        self.align_corners = style.align_corners
        info = getattr(self.encoder, "pretrained_cfg", None) or {}
        self.mean, self.std = (
            tuple(info.get("mean", (0.5,) * 3)),
            tuple(info.get("std", (0.5,) * 3)),
        )
        if norm == "group":
            batch_to_group_norm(self)

    def encode(self, image: Tensor) -> tuple[Tensor, ...]:
        """Features of images (B, 3, H, W): (low, deep), with an auxiliary head (low, middle, deep);
        of a vision transformer its `taps`."""
        return tuple(self.encoder(image))

    def fuse(self, features: tuple[Tensor, ...]) -> Tensor:
        """The one map (B, C, h, w) that the classifier reads, of features."""
        return self.decoder(*features)

    def classify(self, fused: Tensor, size: torch.Size) -> Tensor:
        """Logits (B, K, *size) of a fused map."""
        return self._upsample(self.classifier(fused), size)

    def decode(self, features: tuple[Tensor, ...], size: torch.Size) -> Tensor:
        """Logits (B, K, *size) of features."""
        return self.classify(self.fuse(features), size)

    def auxiliary_logits(self, features: tuple[Tensor, ...], size: torch.Size) -> Tensor:
        """Logits (B, K, *size) of the auxiliary head, for a second term of a supervised loss:

        features = net.encode(batch.image)
        loss = ce(net.decode(features, size), label)
        loss += 0.4 * ce(net.auxiliary_logits(features, size), label)    # U2PL, MMSegmentation

        Raises:
            ValueError: the network was built without one.
        """
        if self.auxiliary is None:
            raise ValueError("this network has no auxiliary head: build it with auxiliary=True")
        return self._upsample(self.auxiliary(features[-2]), size)

    def forward(self, image: Tensor, perturb: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        features = self.encode(image)
        if perturb is not None:
            features = tuple(perturb(f) for f in features)
        return self.decode(features, image.shape[-2:])

    def _upsample(self, logits: Tensor, size: torch.Size) -> Tensor:
        return F.interpolate(logits, size, mode="bilinear", align_corners=self.align_corners)


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
