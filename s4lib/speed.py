"""What makes training faster and is not part of any algorithm: compiled networks, kept memory."""

from __future__ import annotations

import ctypes
import sys
import warnings

import torch

from .method import Method
from .nets import SegNet

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Let this process keep large blocks that it frees, for those that it will ask for next.

    glibc gives them back to the system and gets them again page by page, which is 8 % of a training
    step on a CPU. Does nothing where the C library is another.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def compile_networks(method: Method, device: torch.device) -> bool:
    """Compile the encoder, decoder and heads of every network, in place: names of weights stay.

    Where torch.compile does not work (no C++ compiler or Triton), warns and leaves them as they
    are; returns whether they are compiled.
    """
    try:
        torch.compile(torch.sin)(torch.ones(8, device=device))
    except Exception as error:  # whatever is missing, the answer is the same
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(f"compile=true has no effect, torch.compile fails: {reason}", stacklevel=2)
        return False
    # Networks share their code, and each with its own modes and batch sizes is a version of it.
    torch._dynamo.config.recompile_limit = 256
    for net in method.modules():
        if isinstance(net, SegNet):
            for part in net.children():
                part.compile(dynamic=False)
    return True
