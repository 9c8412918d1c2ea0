"""Encoders: timm models that give features, edited into the papers' variants.

The papers' ResNets "v1c" with a 64-64-128 stem are timm's `resnet50s` and `resnet101s` (equal keys
and values; `resnet50c`, 32-32-64, is MMSegmentation's), whose dilations `multi_grid` multiplies.
"""

from __future__ import annotations

from collections.abc import Sequence

import timm
import torch.nn.functional as F
from torch import Tensor, nn

from .weights import first_line


def pyramid(
    name: str,
    arguments: dict,
    *,
    pretrained: bool,
    output_stride: int,
    skip_stride: int,
    deep_index: int | None,
    middle: bool,
) -> nn.Module:
    """A timm model that gives (low, deep) features, or (low, middle, deep), where middle is the one
    before deep.

    Raises:
        ValueError: unknown model, or one that gives no pyramid of features at these strides.
    """
    given = {"features_only": True, "pretrained": pretrained, **arguments}
    if output_stride != 32:
        given["output_stride"] = output_stride
    try:
        strides = timm.create_model(name, **{**given, "pretrained": False}).feature_info.reduction()
        deep = len(strides) - 1 if deep_index is None else deep_index
        low = strides.index(skip_stride)
        indices = (low, deep - 1, deep) if middle else (low, deep)
        return timm.create_model(name, out_indices=indices, **given)
    except (RuntimeError, TypeError, AssertionError, ValueError, AttributeError) as error:
        raise ValueError(
            f"encoder={name!r} with output_stride={output_stride}, skip_stride={skip_stride}: "
            f"timm says {first_line(error)!r}; valid are timm.list_models() that give a pyramid "
            f"of features"
        ) from error


def dilate(encoder: nn.Module, multi_grid: Sequence[int]) -> None:
    """Multiply, in place, the dilation of each block of the last stage of a ResNet.

    Raises:
        ValueError: the encoder's `layer4` has another number of blocks.
    """
    blocks = getattr(encoder, "layer4", ())
    if len(blocks) != len(multi_grid):
        raise ValueError(
            f"multi_grid={list(multi_grid)}: give one factor per block of the encoder's layer4, "
            f"which has {len(blocks)}"
        )
    for block, factor in zip(blocks, multi_grid, strict=True):
        for conv in block.modules():
            if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3):
                conv.dilation = tuple(factor * d for d in conv.dilation)
                conv.padding = conv.dilation


def ceil_pool(encoder: nn.Module) -> None:
    """Let a ResNet's max-pool round sizes up, in place. Raises ValueError if there is none."""
    pool = getattr(encoder, "maxpool", None)
    if not isinstance(pool, nn.MaxPool2d):
        raise ValueError("ceil_mode=True: this encoder has no max-pool")
    pool.ceil_mode = True


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


class Tokens(nn.Module):
    """Patch tokens of a timm vision transformer after the blocks `taps`, each through its last
    LayerNorm, as maps (B, C, h / patch, w / patch).

    An image whose size is no multiple of the patch is first resized to the nearest one, as UniMatch
    V2 does in evaluation. Position embeddings are resized by timm: bicubic like DINOv2's, but with
    antialiasing where they shrink, and exactly to size.

    Raises:
        ValueError: unknown model, no vision transformer, or no such block.
    """

    def __init__(self, name: str, arguments: dict, *, pretrained: bool, taps: Sequence[int]):
        super().__init__()
        given = {"num_classes": 0, "dynamic_img_size": True, "pretrained": pretrained, **arguments}
        try:
            self.vit = timm.create_model(name, **given)
            blocks, self.patch = len(self.vit.blocks), self.vit.patch_embed.patch_size
        except (RuntimeError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"encoder={name!r}: decoder 'dpt' needs a vision transformer, but timm says "
                f"{first_line(error)!r}"
            ) from error
        if len(taps) != 4 or list(taps) != sorted(set(taps) & set(range(blocks))):
            raise ValueError(f"taps={list(taps)}: give four rising block numbers below {blocks}")
        self.taps, self.channels = list(taps), [self.vit.embed_dim] * 4
        self.pretrained_cfg = self.vit.pretrained_cfg

    def forward(self, image: Tensor) -> list[Tensor]:
        size = [
            max(1, int(n / p + 0.5)) * p for n, p in zip(image.shape[2:], self.patch, strict=True)
        ]
        if size != list(image.shape[2:]):
            image = F.interpolate(image, size, mode="bilinear", align_corners=True)
        return self.vit.forward_intermediates(
            image, indices=self.taps, norm=True, intermediates_only=True
        )
