"""What a step keeps in memory for its backward pass, counted on tensors without values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..losses import ce
from ..nets import build_net


def kept_for_backward(net: str, classes: int, batch: int, crop: tuple[int, int]) -> dict[str, int]:
    """Bytes kept by the parts of a supervised step in float32, weights not counted.

    Args:
        net: name of a network, as in `Config.net`.
        batch: images of `crop` (height, width) pixels.
    """
    with torch.device("meta"):
        built = build_net(net, classes).train()
        image = torch.empty(batch, 3, *crop)
        label = torch.empty(batch, *crop, dtype=torch.long)
    counted = {p.untyped_storage()._cdata for p in built.parameters()}
    features, encoder = _kept(lambda: built.encode(image), counted)
    fused, decoder = _kept(lambda: built.fuse(features), counted)
    logits, classifier = _kept(lambda: built.classify(fused, crop), counted)
    _, loss = _kept(lambda: ce(logits, label), counted)
    return {"encoder": encoder, "decoder": decoder, "classifier": classifier, "loss": loss}


def _kept(part: Callable[[], Tensor], counted: set[int]) -> tuple[Tensor, int]:
    """What `part` returns, and the bytes it keeps that are not `counted` yet."""
    found = 0

    def pack(x: Tensor) -> Tensor:
        nonlocal found
        storage = x.untyped_storage()
        if storage._cdata not in counted:
            counted.add(storage._cdata)
            found += storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        return part(), found
