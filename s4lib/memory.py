"""Memory banks: for each class a ring of its newest embeddings, whose tensors are buffers.

bank = Bank(self.keys, self.seen, self.lengths)  # of a method that has registered `buffers(...)`
bank.push(embedding, where)                      # the same on every process
negatives = bank.rows(torch.arange(K), u)        # (K, ..., D), uniform draws u in [0, 1)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import distributed


class Bank(NamedTuple):
    """Rings of all K classes, one after the other in one matrix, so that they may differ in length.

    The last row of `keys` is none of theirs: there goes what is not kept.
    """

    keys: Tensor  # (sum of lengths + 1, D) float32
    seen: Tensor  # (K,) int64, how many were ever pushed
    lengths: Tensor  # (K,) int64, how many are kept

    @property
    def size(self) -> Tensor:
        """(K,) how many there are."""
        return self.seen.minimum(self.lengths)

    @property
    def start(self) -> Tensor:
        return self.lengths.cumsum(0) - self.lengths

    @torch.no_grad()
    def push(self, new: Tensor, where: Tensor) -> None:
        """Give class k the embeddings `new` (N, D) at `where[k]` (K, N) bool, of all processes.

        Those of process 0 first; a ring that is full forgets its oldest.
        """
        new = distributed.gather(new.float())
        where = distributed.gather(where.T.to(torch.uint8).contiguous()).T > 0
        order, length = where.cumsum(1), self.lengths[:, None]
        count = where.sum(1, keepdim=True)
        slot = self.start[:, None] + (self.seen[:, None] + order - 1) % length
        newest = where & (order > count - length)
        for one in torch.where(newest, slot, len(self.keys) - 1):
            self.keys.index_copy_(0, one, new)
        self.keys[-1].zero_()
        self.seen.add_(count[:, 0])

    def rows(self, which: Tensor, u: Tensor) -> Tensor:
        """Embeddings (C, ..., D) of classes `which` (C,) at `u` (C, ...): 0 the oldest, 1 the end.

        With uniform `u` a draw with replacement. Zeros, or what else lies there, if there are none.
        """
        wide = (-1, *[1] * (u.ndim - 1))
        seen, size, length, start = (
            x[which].view(wide) for x in (self.seen, self.size, self.lengths, self.start)
        )
        return self.keys[start + (seen - size + place(u, size)) % length]


def buffers(lengths: list[int], width: int) -> dict[str, Tensor]:
    """The tensors of an empty bank, to be registered as buffers; raises ValueError if none fits."""
    if not lengths or min(lengths) < 1:
        raise ValueError(f"lengths={lengths}: choose one or more per class")
    length = torch.tensor(lengths)
    keys = torch.zeros(sum(lengths) + 1, width)
    return {"keys": keys, "seen": torch.zeros_like(length), "lengths": length}


def place(u: Tensor, count: Tensor) -> Tensor:
    """Uniform draws u in [0, 1) as whole numbers below `count`; 0 if that is 0."""
    return (u * count).long().minimum(count - 1).clamp(min=0)


def channels(module: nn.Module) -> int:
    """Outputs of a module's last convolution: K of a SegNet's `classifier`, D of
    `representation`."""
    return [m for m in module.modules() if isinstance(m, nn.Conv2d)][-1].out_channels
