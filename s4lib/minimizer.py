"""`minimize(loss, *nets)`: one optimizer per trainable child, one learning-rate rule for all."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import distributed
from .config import Config
from .method import Clock, Method, trainable
from .schedules import linear_warmup, poly


class Minimizer:
    """Zero gradients, backward into exactly the given networks, average over processes, update.

    With `accumulate` > 1 it only adds up gradients, and returns False, until the last batch of an
    update.
    """

    def __init__(self, method: Method, config: Config, device: torch.device):
        self.nets = {name: net for name, net in method.named_children() if trainable(net)}
        self.method, self.config = method, config
        # One kernel for all weights; and with a loss scale, nothing to wait for.
        self.fused = True if device.type == "cuda" else None
        self.optimizers = {name: self._optimizer(net, config) for name, net in self.nets.items()}
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
        self.updates_now = True
        self.step = 0
        self.first_bad_step = torch.full((), -1, device=device)

    def _optimizer(self, net: nn.Module, config: Config) -> torch.optim.Optimizer:
        parts: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, p in net.named_parameters():
            inside = name.split(".")[:2]  # "encoder.stem...", or "0.encoder.stem..." in a list
            factor = config.encoder_lr if "encoder" in inside else 1.0
            decay = config.weight_decay if config.decay_all or p.ndim > 1 else 0.0
            parts.setdefault((factor, decay), []).append(p)
        groups = [
            {"params": params, "factor": factor, "weight_decay": decay}
            for (factor, decay), params in parts.items()
        ]
        if config.optimizer == "adamw":
            return torch.optim.AdamW(groups, lr=config.lr, fused=self.fused)
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.9, fused=self.fused)

    def begin(self, clock: Clock, last: bool = True) -> float:
        """Set the learning rates of the step; `last` says that this batch completes an update.

        Returns the first child's.
        """
        rates, warm, own = {}, clock.epoch < self.config.warmup, clock.phase(self.config.warmup)
        for name, optimizer in self.optimizers.items():
            if not warm and self.method.restarts(name, own):
                optimizer.state.clear()
            rates[name] = poly(0 if warm else self.method.schedule(name, own), self.config.power)
            rates[name] *= self.config.lr * linear_warmup(clock, self.config.lr_warmup)
            for group in optimizer.param_groups:
                group["lr"] = rates[name] * group["factor"]
        self.step, self.updates_now = clock.step, last
        return next(iter(rates.values()))

    def __call__(self, loss: Tensor, *nets: nn.Module) -> bool:
        names = [name for name, net in self.nets.items() if any(net is n for n in nets)]
        if len(names) != len(nets):
            raise ValueError(
                f"minimize: choose among the trainable children {', '.join(self.nets)}"
            )
        # Remember the first step with a bad loss without waiting for the device to compute it.
        fine = torch.isfinite(loss.detach()) | (self.first_bad_step >= 0)
        self.first_bad_step = torch.where(fine, self.first_bad_step, self.step)
        parameters = [p for net in nets for p in net.parameters() if p.requires_grad]
        self.scaler.scale(loss / self.config.accumulate).backward(inputs=parameters)
        if not self.updates_now:
            return False
        distributed.average_gradients(parameters)
        for name in names:
            optimizer = self.optimizers[name]
            if self.config.clip:
                self.scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(self.nets[name].parameters(), self.config.clip)
            self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        return True

    def check(self) -> None:
        """Raise FloatingPointError if a loss, on any process, or a weight is infinite or NaN."""
        bad = int(self.first_bad_step)
        if distributed.any_process(bad >= 0, self.first_bad_step.device):
            where = f"at step {bad}" if bad >= 0 else f"before step {self.step}, on another process"
            raise FloatingPointError(
                f"the loss is not a finite number {where}; try a smaller lr, or clip"
            )
        norms = torch._foreach_norm([p for net in self.nets.values() for p in net.parameters()])
        if not torch.isfinite(torch.stack(norms)).all():  # a finite loss may have a NaN gradient
            raise FloatingPointError(f"the weights are no finite numbers after step {self.step}")

    def state_dict(self) -> dict:
        optimizers = {name: o.state_dict() for name, o in self.optimizers.items()}
        return {"optimizers": optimizers, "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.scaler.load_state_dict(state["scaler"])
