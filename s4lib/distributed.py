"""Several processes under `torchrun`: start, average gradients, agree. Idle in a single one."""

from __future__ import annotations

import os
import re

import torch
import torch.distributed as dist
from torch import Tensor, nn


def launched() -> bool:
    """True in a process that torchrun started."""
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


def start(device: str) -> torch.device:
    """Resolve `device` (auto, cpu, cuda, cuda:N); join torchrun's process group if there is one.

    Raises:
        ValueError: no device, or CUDA is asked for and absent.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise ValueError(f"device={device!r}: choose auto, cpu, cuda or cuda:N")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"device={device!r}, but torch finds no CUDA device here: use device=cpu or device=auto"
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # One thread adds in one order, so that results do not depend on a machine's cores; and two
        # runs side by side, each with as many threads as cores, are many times slower than with one
        # each.
        torch.set_num_threads(1)
    if launched():
        if device.startswith("cuda"):
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return torch.device(device)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def total(value: Tensor) -> Tensor:
    """Sum of `value` over processes (no gradient)."""
    if dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
    return value


def mean(value: Tensor) -> Tensor:
    return total(value) / world()


def gather(value: Tensor) -> Tensor:
    """`value` of all processes, of equal shape, concatenated in their order (no gradient)."""
    if not dist.is_initialized():
        return value.detach()
    parts = [torch.empty_like(value) for _ in range(world())]
    dist.all_gather(parts, value.detach().contiguous())
    return torch.cat(parts)


def any_process(flag: bool, device: torch.device) -> bool:
    return flag if world() == 1 else bool(total(torch.tensor(float(flag), device=device)) > 0)


@torch.no_grad()
def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Replace each gradient by its mean over processes; a missing one counts as zero."""
    if world() == 1:
        return
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    flat /= world()
    for p, g in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad.copy_(g.view_as(p))


@torch.no_grad()
def broadcast(module: nn.Module) -> None:
    """Give every process rank 0's parameters and buffers."""
    if dist.is_initialized():
        for value in module.state_dict().values():
            dist.broadcast(value, 0)


def synchronise_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """BN over the global batch: torch's SyncBatchNorm on CUDA; ours on CPU, which it refuses."""
    if world() == 1:
        return module
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.__class__ = _synchronised(type(child))
    return module


def _synchronised(kind: type) -> type:
    """`kind` (BatchNorm2d, or timm's with an activation) with statistics over all processes."""
    if not issubclass(kind, _SyncStatistics):
        kind = type(f"Sync{kind.__name__}", (_SyncStatistics, kind), {})
    return kind


class _Sum(torch.autograd.Function):
    """All-reduce whose gradient is the all-reduce of the gradient."""

    @staticmethod
    def forward(ctx, value):
        return total(value)

    @staticmethod
    def backward(ctx, grad):
        return total(grad)


class _SyncStatistics:
    """Mixed into a BatchNorm2d class: mean and variance of the batch come from all processes."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        count = torch.full((1,), x.numel() / x.shape[1], device=x.device)
        sums = _Sum.apply(torch.cat([x.sum((0, 2, 3)), x.square().sum((0, 2, 3)), count]))
        n = sums[-1].detach()
        mean, square = sums[:-1].view(2, -1) / n
        var = square - mean.square()
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.detach(), self.momentum)
            self.running_var.lerp_(var.detach() * n / (n - 1).clamp(min=1), self.momentum)
        scale = self.weight * (var.clamp(min=0) + self.eps).rsqrt()
        x = x * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]
        for extra in ("drop", "act"):  # timm's BatchNormAct2d
            x = getattr(self, extra)(x) if hasattr(self, extra) else x
        return x
