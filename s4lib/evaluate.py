"""Evaluation of every network of a method in one pass over the images, shared among processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from . import distributed
from .data.images import Images
from .method import Method
from .metrics import confusion, iou, miou

BATCH = 32


def normaliser(
    mean: Sequence[float], std: Sequence[float], device: torch.device
) -> Callable[[Tensor], Tensor]:
    """A function from uint8 RGB (B, 3, H, W) to what a network with this mean and std expects."""
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (mean, std))
    return lambda image: ((image.to(device).float() / 255 - mean) / std).contiguous(
        memory_format=torch.channels_last
    )


def evaluated(method: Method) -> dict[str, nn.Module]:
    """Networks to evaluate by name; what is deployed too, if it is none of them (an ensemble)."""
    networks = method.networks()
    return networks if method.deployed in networks else {**networks, method.deployed: method}


@torch.no_grad()
def confusion_matrices(
    networks: dict[str, nn.Module],
    images: Images,
    indices: Sequence[int],
    normalise: Callable[[Tensor], Tensor],
    device: torch.device,
) -> dict[str, Tensor]:
    """(K, K) confusion matrix of each network over whole images, equal on every process.

    Process r takes every world-th image from the r-th on, so that each image counts exactly once.
    """
    modes = {name: net.training for name, net in networks.items()}
    classes = len(images.classes)
    sums = {
        name: torch.zeros(classes, classes, dtype=torch.int64, device=device) for name in networks
    }
    for net in networks.values():
        net.eval()
    mine = list(indices)[distributed.rank() :: distributed.world()]
    chunks = [mine[i : i + BATCH] for i in range(0, len(mine), BATCH)]
    for samples in ([images[i] for i in chunk] for chunk in chunks):
        for _, group in groupby(samples, key=lambda sample: sample[0].shape):
            image, label = (torch.stack(part) for part in zip(*group, strict=True))
            image, label = normalise(image), label.to(device)
            for name, net in networks.items():
                sums[name] += confusion(net(image).argmax(1), label, classes)
    for name, net in networks.items():
        net.train(modes[name])
    return {name: distributed.total(value) for name, value in sums.items()}


def scores(matrices: dict[str, Tensor]) -> dict[str, dict]:
    """{network: {"miou": %, "iou": [% per class, None where absent]}} of confusion matrices."""
    return {
        name: {
            "miou": round(miou(m), 4),
            "iou": [None if v != v else round(v, 4) for v in iou(m).tolist()],
        }
        for name, m in matrices.items()
    }
