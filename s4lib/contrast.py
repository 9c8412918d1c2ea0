"""Pixel contrast: which pixels attract and repel which, and InfoNCE over them.

Maps are (B, K, h, w) or (B, D, h, w) at the size of embeddings; samples are (K, N) bool over the
N = B h w pixels in the order (image, y, x), so that nothing depends on how many there are of each.
U2PL@ab3d2be, u2pl/utils/loss_helper.py compute_contra_memobank_loss and utils.py label_onehot.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import one_of
from .losses import IGNORE, full_precision
from .memory import Bank, place


class Samples(NamedTuple):
    """What of a batch each class takes, each (K, N) bool."""

    members: Tensor  # whose mean is the prototype
    anchors: Tensor  # those that are drawn towards it
    negatives: Tensor  # those that go into its memory


def onehot(label: Tensor, classes: int, merged: bool = False) -> Tensor:
    """(B, K, H, W) bool of labels (B, H, W); nothing is True where IGNORE.

    `merged` is what U2PL's label_onehot gives: image 0 has the classes of all images, where itself
    is not IGNORE (that of another image counts as class 0); the others have none.
    """
    known, k = label != IGNORE, torch.arange(classes, device=label.device)[:, None, None]
    if not merged:
        return label[:, None] == k
    found = (torch.where(known, label, 0)[:, None] == k).any(0, keepdim=True) & known[:1]
    return torch.cat([found, found.new_zeros(len(label) - 1, *found.shape[1:])])


def shrink(x: Tensor, size: torch.Size) -> Tensor:
    """Labels or masks (B, H, W) at a smaller `size`, nearest neighbour, in their own type."""
    return F.interpolate(x[:, None].float(), size, mode="nearest")[:, 0].to(x.dtype)


@torch.no_grad()
def entropy(logits: Tensor) -> Tensor:
    """(B, H, W) of softmax(logits), in nats."""
    log_probs = logits.float().log_softmax(1)
    return -(log_probs.exp() * log_probs).sum(1)


@torch.no_grad()
def entropy_split(unsure: Tensor, valid: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """(low, high) masks (B, H, W): the `share` of `valid` pixels with the lowest entropy `unsure`,
    and that with the highest, both with what equals the quantile (linearly interpolated)."""
    known = torch.where(valid, unsure, math.nan)
    low, high = known.nanquantile(share), known.nanquantile(1 - share)
    return valid & (unsure <= low), valid & (unsure >= high)


def pixels(x: Tensor) -> Tensor:
    """(B, C, h, w) as (N, C)."""
    return x.movedim(1, -1).flatten(0, 2)


@torch.no_grad()
def u2pl_samples(
    label: Tensor,
    probs: Tensor,
    low: Tensor,
    high: Tensor,
    labeled: int,
    *,
    sure: float = 0.3,
    ranks: tuple[int, int] = (3, 20),
    negatives: str = "unlike",
    most: float = 1.0,
) -> Samples:
    """U2PL's anchors, prototypes and negatives of each class.

    Args:
        label: (B, K, h, w) bool, of labels and pseudo-labels.
        probs: (B, K, h, w), the teacher's.
        low, high: (B, h, w) bool, pixels of low entropy and of high; on labeled images both are
            the annotated pixels.
        labeled: how many of the B images, the first, are labeled.
        sure: probability of the class above which a member is an anchor.
        ranks: (low, high) of the class among the pixel's classes by probability, 0 the most
            likely. A negative of class c is an annotated pixel of another class where c's rank is
            below `low`, or a high-entropy one where it is in [low, high).
        negatives: "unlike" is that; "alike", the released code, asks of a negative of c that its
            label is c, which leaves none of a labeled image.
        most: a negative's probability of the class is below.

    Raises:
        ValueError: unknown `negatives`.
    """
    one_of("negatives", negatives, "unlike", "alike")
    members = label & low[:, None]
    rank = probs.argsort(1, descending=True).argsort(1)
    unlikely = (rank >= ranks[0]) & (rank < ranks[1])
    taken = torch.cat([(rank < ranks[0])[:labeled] & ~label[:labeled], unlikely[labeled:]])
    taken &= high[:, None] & (probs < most)
    if negatives == "alike":
        taken &= label
    return Samples(*(pixels(x).T for x in (members, members & (probs > sure), taken)))


def prototype_nce(
    rep: Tensor,
    rep_teacher: Tensor,
    samples: Samples,
    bank: Bank,
    u_anchor: Tensor,
    u_negative: Tensor,
    temperature: float = 0.5,
    queue_of: str = "class",
) -> Tensor:
    """InfoNCE of drawn anchors with their class's prototype and negatives, a 0-d tensor.

    The mean over anchors, and then over the classes that have a member; zero if fewer than two do.
    A class without anchor, or whose memory is empty, adds zero. Similarities are cosines.

    Args:
        rep: (B, D, h, w), gets the gradient; rep_teacher: likewise, of which prototypes are means.
        u_anchor: (K, Q), u_negative: (K, Q, M), uniform draws in [0, 1), with replacement: anchor
            floor(u n) of the n in their order, negative floor(u n) of a memory, the oldest first.
        queue_of: "class", negatives of a class come from its own memory; "place", the released
            code: class i < V, where V classes have members, meets the memory of the i-th of those,
            and classes from V on have no term. The same as long as no class is missing.

    Raises:
        ValueError: unknown `queue_of`.
    """
    one_of("queue_of", queue_of, "class", "place")
    members, anchors = samples.members, samples.anchors
    rep, rep_teacher = pixels(rep).float(), pixels(rep_teacher).detach().float()
    present, classes = members.any(1), torch.arange(len(members), device=members.device)
    valid, queue, term = present.sum(), classes, present
    if queue_of == "place":
        queue, term = (~present).int().argsort(stable=True), classes < valid
    count = anchors.sum(1)
    term = term & (count > 0) & (bank.size[queue] > 0)
    at = torch.searchsorted(anchors.cumsum(1), place(u_anchor, count[:, None]) + 1)
    keys = bank.rows(queue, u_negative).detach()  # (K, Q, M, D)
    length = torch.linalg.vector_norm(keys, dim=-1).clamp(min=1e-8)
    with full_precision(rep.device.type):  # which would round products
        anchor = F.normalize(rep[at.clamp(max=len(rep) - 1)], dim=-1)  # (K, Q, D)
        prototype = members.float() @ rep_teacher / members.sum(1, keepdim=True).clamp(min=1)
        near = torch.einsum("kqd,kd->kq", anchor, F.normalize(prototype, dim=-1))
        far = torch.einsum("kqd,kqmd->kqm", anchor, keys) / length
    logits = torch.cat([near[..., None], far], 2) / temperature
    loss = torch.where(term, -logits.log_softmax(2)[..., 0].mean(1), 0).sum()
    return loss / valid.clamp(min=1) * (valid > 1)


def pixel_nce(
    rep: Tensor,
    target: Tensor,
    label: Tensor,
    classes: int,
    u_anchor: Tensor,
    u_negative: Tensor,
    temperature: float = 0.07,
    same_image: bool = False,
    debias: bool = True,
) -> Tensor:
    """InfoNCE of drawn pixels with themselves in another view, a 0-d tensor; mean over anchors.

    Negatives are pixels of that view with another (pseudo-)label and in another image; an anchor
    without any adds zero. Similarities are cosines. PC2Seg (Zhong et al., 2021), whose details
    are not public: see s4lib/methods/pc2seg.py.

    Args:
        rep: (B, D, h, w), gets the gradient; target: the other view's, likewise, gets none.
        label: (B, h, w) int64, IGNORE is neither anchor nor negative.
        u_anchor: (Q,), u_negative: (Q, M), uniform draws in [0, 1), with replacement, among the
            pixels that may be one in the order (image, y, x).
        same_image: negatives may be in the anchor's image; `debias`: they need another label.
    """
    k, n = torch.arange(classes, device=rep.device)[:, None], label.numel()
    image = torch.arange(len(rep), device=rep.device).repeat_interleave(n // len(rep))
    rep, target = (F.normalize(pixels(x).float(), dim=1) for x in (rep, target.detach()))
    label = label.flatten()
    known = (label != IGNORE).cumsum(0)
    anchor = torch.searchsorted(known, place(u_anchor, known[-1]) + 1).clamp(max=n - 1)
    pools = (label != IGNORE) & ((label != k) | (not debias))  # (K, N), one after the other
    order, count = pools.flatten().cumsum(0), pools.sum(1)
    of = label[anchor].clamp(max=classes - 1)
    number = (count.cumsum(0) - count)[of, None] + place(u_negative, count[of, None]) + 1
    negative = torch.searchsorted(order, number) % n
    allowed = (image[anchor][:, None] != image[negative]) | same_image
    allowed &= (count[of] > 0)[:, None]
    near = (rep[anchor] * target[anchor]).sum(1, keepdim=True)
    with full_precision(rep.device.type):  # which would round products
        far = torch.einsum("qd,qmd->qm", rep[anchor], target[negative])
    logits = torch.cat([near, far.masked_fill(~allowed, -math.inf)], 1) / temperature
    return torch.where(known[-1] > 0, -logits.log_softmax(1)[:, 0].mean(), 0)
