"""Where the time of a training step goes, measured from outside: no method knows of it."""

from __future__ import annotations

import functools
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from .. import method, mixing
from ..minimizer import Minimizer
from ..nets import SegNet


class Clocks:
    """Seconds by part; a part inside another counts as the inner one alone.

    On a CPU they are this process's own, whatever else the machine does.
    """

    def __init__(self, device: torch.device):
        self.device, self.spent, self.inner = device, {}, 0.0

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return time.perf_counter()
        return time.process_time()

    def timed(self, part: str, call: Callable) -> Callable:
        @functools.wraps(call)
        def run(*arguments, **options):
            before, self.inner, began = self.inner, 0.0, self.now()
            result = call(*arguments, **options)
            whole = self.now() - began
            self.spent[part] = self.spent.get(part, 0.0) + whole - self.inner
            self.inner = before + whole
            return result

        return run


@contextmanager
def parts_timed(built: method.Method, minimize: Minimizer, clocks: Clocks) -> Iterator[None]:
    """While it lasts, networks, backward passes, optimizers, EMA and mixing are timed."""
    changed = []

    def put(owner: object, name: str, part: str) -> None:
        changed.append((owner, name, owner.__dict__.get(name)))
        setattr(owner, name, clocks.timed(part, getattr(owner, name)))

    for name, net in built.named_modules():
        if isinstance(net, SegNet):
            for piece in ("encode", "fuse", "classify"):
                put(net, piece, f"forward {name}")
    put(torch.Tensor, "backward", "backward")
    put(minimize.scaler, "step", "optimizer")
    put(mixing.Mix, "__call__", "mixing")
    home = sys.modules[type(built).__module__]
    for name, value in list(vars(home).items()):
        if isinstance(value, types.FunctionType):
            if value is method.ema:
                put(home, name, "EMA")
            elif value.__module__ == mixing.__name__:
                put(home, name, "mixing")
    try:
        yield
    finally:
        for owner, name, before in reversed(changed):
            delattr(owner, name) if before is None else setattr(owner, name, before)
