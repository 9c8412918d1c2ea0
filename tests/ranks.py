"""What two processes do for test_distributed.py, all in one launch.

    torchrun ranks.py FOLDER PRESET ...

Each check puts what it found into one dictionary; rank 0 writes them to FOLDER/found.pt.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import PRESETS, read_once, tiny_config

from s4lib import distributed, trainer
from s4lib.config import Config
from s4lib.data import open_dataset
from s4lib.data.mosaic import Mosaic
from s4lib.evaluate import count
from s4lib.losses import IGNORE, ce, mse
from s4lib.nets import build_net
from s4lib.run_folder import RunFolder
from s4lib.trainer import Run, fit

GROUP = {"net_args": {"norm": "group"}, "optimizer": "sgd", "lr": 0.05, "weight_decay": 0.0}
COMMON = {"net": "light", "epochs": 2}
SHORT = {"size": [16, 16], "unlabeled": 4, "epochs": 3, "eval_every": 3}  # a step an epoch

# Compared with one process on the same global batches.
AGAINST_ONE: dict[str, Config] = {
    "supervised, group norm": tiny_config(**COMMON, **GROUP),
    "mean_teacher, group norm": tiny_config(method="mean_teacher", **COMMON, **GROUP),
    "supervised, group norm, clip": tiny_config(**COMMON, **GROUP, clip=0.1),
    "supervised, group norm, void": tiny_config(
        **COMMON, **GROUP, outside="void", scale=(0.5, 1.0)
    ),
    "supervised, group norm, adamw, double": tiny_config(**COMMON, net_args={"norm": "group"}),
    "mean_teacher, group norm, adamw, double": tiny_config(
        method="mean_teacher", **COMMON, net_args={"norm": "group"}
    ),
    "supervised, batch norm": tiny_config(**COMMON, optimizer="sgd", lr=0.05),
}
EACH_PRESET: dict[str, Config] = {
    f"{name}, {preset}": tiny_config(method=name, preset=preset, **SHORT)
    for name, preset in (parameters.values for parameters in PRESETS)
}
RESUMED = tiny_config(method="cutmix_seg", **COMMON)
KILL_AT = 5  # steps of 6: after the first checkpoint
EVALUATED = {"even": range(6), "odd": range(7), "one": range(1)}


@contextlib.contextmanager
def precision(name: str):
    """Networks in double precision, where a check's name says so.

    Adam divides gradients near zero by their own size: what float32 rounds in them, a sum over
    processes in another order, becomes steps of the size of the learning rate.
    """
    build = trainer.build_method

    def double(*given):
        method = build(*given).double()
        for net in method.children():
            net.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(), *inputs[1:]))
        return method

    trainer.build_method = double if "double" in name else build
    yield
    trainer.build_method = build


def plain_normalise(image: torch.Tensor) -> torch.Tensor:
    return image.float() / 255 - 0.5


def fixed_net() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_net("tiny", 8)


def evaluation(indices: range) -> torch.Tensor:
    images = open_dataset("mosaic", "val", size=(32, 32))
    cpu = torch.device("cpu")
    return count({"net": fixed_net()}, images, indices, plain_normalise, cpu)["net"].confusion


def void_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, label, keep of four images; the last two are nearly all void."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 5, 8, 8, generator=g)
    label = torch.randint(0, 5, (4, 8, 8), generator=g)
    label[2:, 1:] = IGNORE
    return logits, label, torch.rand(4, 8, 8, generator=g) < 0.5


def void_losses(part: slice) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """{name: (loss, gradient)} of a part of the batch."""
    found = {}
    logits, label, keep = (x[part] for x in void_batch())
    kinds = {
        over: lambda x, over=over: ce(x, label, keep=keep, over=over)
        for over in ("kept", "valid", "all")
    }
    kinds["mse"] = lambda x: mse(x, torch.full_like(x, 0.2), valid=label != IGNORE)
    for name, loss in kinds.items():
        x = logits.clone().requires_grad_()
        value = loss(x)
        value.backward()
        found[name] = value.detach(), x.grad
    return found


def gather(value: object) -> list:
    values = [None] * distributed.world()
    dist.all_gather_object(values, value)
    return values


def digest(method: torch.nn.Module) -> str:
    state = method.state_dict()
    return hashlib.sha256(b"".join(v.numpy().tobytes() for v in state.values())).hexdigest()


class Killed(Exception):
    pass


def kill(done: int, total: int, text: str) -> None:
    if done == KILL_AT:
        raise Killed


def main(folder: Path, presets: list[str]) -> None:
    Mosaic.read = read_once
    trainer.LOG_EVERY = 2
    distributed.start("cpu")
    found: dict[str, object] = {"world": distributed.world()}
    for name, config in {**AGAINST_ONE, **{name: EACH_PRESET[name] for name in presets}}.items():
        with precision(name), torch.random.fork_rng():
            run = Run(config, RunFolder(folder / "runs" / name, config), torch.device("cpu"))
            record = run.train(False, lambda *report: None)
        found[name] = gather((digest(run.method), record["networks"]))
    try:
        fit(RESUMED, out=folder / "killed", progress=kill)
    except Killed:
        dist.barrier()
    found["resumed"] = fit(RESUMED, out=folder / "killed", resume=True)["networks"]
    fit(RESUMED, out=folder / "uninterrupted")
    for name, indices in EVALUATED.items():
        found[f"evaluation, {name}"] = gather(evaluation(indices))
    rank = distributed.rank()
    found["void"] = gather(void_losses(slice(2 * rank, 2 * rank + 2)))
    found["any"] = gather(distributed.any_process(rank == 1, torch.device("cpu")))
    if rank == 0:
        torch.save(found, folder / "found.pt")
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
