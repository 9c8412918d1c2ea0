"""Perturbations of networks and features: what a prediction is asked to be stable against."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from .config import one_of
from .losses import full_precision


@contextlib.contextmanager
def stochastic_depth(net: nn.Module, rate: float) -> Iterator[None]:
    """Within this context, `net` is a random sub-model of itself: it skips residual blocks.

    Of n blocks, block i is skipped with probability rate * i / (n - 1) (timm's linear rule), drawn
    anew per image and forward pass from torch's generator, whatever mode `net` is in; a branch that
    stays is divided by its probability to stay, so that its expectation does not change. Attention
    and MLP of a transformer block are skipped independently. Huang et al. (2016); timm's DropPath.

    Args:
        net: contains timm's ResNet or transformer blocks; is left as it was found.
        rate: of the last block, in [0, 1); at 0 nothing changes, not even drop paths of its own.

    Raises:
        ValueError: a rate outside [0, 1), or no residual block to skip at a rate above 0.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate={rate}: stochastic depth (drop_path) needs 0 <= rate < 1")
    names = "drop_path", "drop_path1", "drop_path2"  # where timm's blocks keep theirs, or None
    blocks = [b for b in net.modules() if any(hasattr(b, name) for name in names)]
    blocks = [b for b in blocks if rate and getattr(b, "has_skip", True)]
    if rate and not blocks:
        raise ValueError(
            f"rate={rate}: this network has no residual block for stochastic depth (drop_path) to "
            f"skip; valid is 0"
        )
    found = [
        (block, name, getattr(block, name), rate * i / max(1, len(blocks) - 1))
        for i, block in enumerate(blocks)
        for name in names
        if hasattr(block, name)
    ]
    try:
        for block, name, _, probability in found:
            setattr(block, name, DropPath(probability))
        yield
    finally:
        for block, name, was, _ in found:
            if was is None:
                delattr(block, name)  # an attribute again, no longer a module
            setattr(block, name, was)


def complementary_dropout(features: Sequence[Tensor], kept: float = 0.5) -> tuple[Tensor, ...]:
    """Channels that one strong view loses are those that the other keeps (UniMatch V2).

    A fair coin per image and channel doubles the channel in one view and zeroes it in the other, so
    that the two views' mean stays; a random share `kept` of the images, rounded down, is left alone
    (UniMatch-V2@f6afb4d, model/semseg/dpt.py). Features with equally many channels share the coins.

    Args:
        features: maps (2B, C, h, w), the first view's images before the second's.
        kept: share of images without dropout, in [0, 1].

    Raises:
        ValueError: an odd number of images, or a share outside [0, 1].
    """
    images, odd = divmod(len(features[0]), 2)
    if odd:
        raise ValueError(f"{2 * images + 1} images: complementary dropout needs two views of each")
    if not 0 <= kept <= 1:
        raise ValueError(f"kept={kept}: choose a share from 0 to 1")
    alone = torch.randperm(images)[:, None] < int(images * kept)
    masks = {}
    for channels in dict.fromkeys(f.shape[1] for f in features):
        first = torch.where(alone, 1.0, 2.0 * (torch.rand(images, channels) < 0.5))
        both = torch.cat([first, 2 - first])[..., None, None]
        masks[channels] = both.to(features[0].device, features[0].dtype, non_blocking=True)
    return tuple(f * masks[f.shape[1]] for f in features)


def adversarial(
    x: Tensor,
    nets: Sequence[nn.Module],
    size: torch.Size,
    valid: Tensor | None = None,
    *,
    noise: str = "gaussian",
    xi: float = 0.1,
    eps: float = 2.0,
    iters: int = 1,
    norm: str = "sample",
    floor: float = 0.0,
) -> Tensor:
    """The change of length `eps` of a fused map `x` that changes most what `nets` see in it.

    Virtual adversarial training (Miyato et al., 2018): the gradient of KL(p(x) || p(x + xi d)) with
    respect to d, normalised; p is the softmax of the nets' mean logits, d begins as noise. With two
    teachers it is T-VAT (PS-MT, supplementary, eq. 1 and 2), with the student itself plain VAT.

    It is computed without autocast and TF32, which round `xi d` away beside `x`: for DeepLabV3+'s
    map of 304 x 64 x 64 the cosine of the result with that of float64 is 1.00 in float32, but 0.36
    where convolutions round as TF32 does (emulated), which is torch's default on a GPU.

    Args:
        x: (B, C, h, w); no gradient flows back into it.
        nets: SegNets, whose classifiers are in evaluation mode meanwhile.
        size: of the logits (H, W).
        valid: (B, H, W) bool, the pixels whose prediction counts; None counts all.
        noise: "gaussian", or "uniform" about zero, from torch's generator.
        xi: length at which the difference of predictions is measured.
        eps: length of the result.
        iters: number of gradients (power iterations); 0 returns noise.
        norm: length is that of an image's whole map ("sample") or at each of its places ("pixel").
        floor: what is added to a length before dividing by it: 1e-8 in PS-MT@058cdc3 and in
            CCT@65d4e5b, where it exceeds the gradient's own length.

    Returns:
        (B, C, h, w) float32 (float64 for float64), zero where there is no gradient.

    Raises:
        ValueError: unknown `noise` or `norm`.
    """
    one_of("noise", noise, "gaussian", "uniform")
    dims = {"sample": (1, 2, 3), "pixel": 1}[one_of("norm", norm, "sample", "pixel")]

    def unit(v: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(v, dim=dims, keepdim=True) + floor
        return torch.where(length > 0, v / length, 0)

    def logits(x: Tensor) -> Tensor:
        return sum(net.classify(x, size) for net in nets) / len(nets)

    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    d = unit(torch.randn_like(x) if noise == "gaussian" else torch.rand_like(x) - 0.5)
    with _exactly(x.device.type, *(net.classifier for net in nets)):
        with torch.no_grad():
            probs = logits(x).softmax(1)
        for _ in range(iters):
            d = d.detach().requires_grad_()
            log_probs = logits(x + xi * d).log_softmax(1)
            kl = F.kl_div(log_probs, probs, reduction="none").sum(1)
            kl = kl if valid is None else torch.where(valid, kl, 0)
            (gradient,) = torch.autograd.grad(kl.sum() / len(x), d)
            d = unit(gradient)
    return eps * d.detach()


@contextlib.contextmanager
def _exactly(device: str, *modules: nn.Module) -> Iterator[None]:
    """With gradients, in the precision given; the modules in evaluation mode, then as before."""
    cudnn, modes = torch.backends.cudnn, [module.training for module in modules]
    kept = {"benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic}
    precise = cudnn.flags(enabled=cudnn.enabled, allow_tf32=False, **kept)
    for module in modules:
        module.eval()
    try:
        with torch.enable_grad(), full_precision(device), precise:
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.train(mode)
