"""What a step costs beside the forward and backward passes that its algorithm names.

Both are timed in turns, in processor time of one thread, which other programs on the machine
lengthen little. The step is the whole one: drawing boxes, labels, losses, optimizer and averages.
"""

from __future__ import annotations

import statistics
import time

import pytest
import torch
from torch import nn

from s4lib.method import Batch, Clock, Method
from s4lib.methods import METHODS
from s4lib.minimizer import Minimizer
from s4lib.nets import build_net
from s4lib.protocols import protocol

CLASSES, CROP, TIMES = 21, 129, 7
NETWORKS = {"unimatch": "unimatch-resnet50", "gta_seg": "u2pl-resnet50"}


def batch_of(method: Method) -> Batch:
    """Two labeled and two unlabeled images."""
    g = torch.Generator().manual_seed(0)

    def images() -> torch.Tensor:
        drawn = torch.randn(2, 3, CROP, CROP, generator=g)
        return drawn.contiguous(memory_format=torch.channels_last)

    label = torch.randint(0, CLASSES, (2, CROP, CROP), generator=g)
    strong = tuple(images() for _ in range(method.strong_views))
    return Batch(images(), label, images(), strong, torch.ones_like(label, dtype=torch.bool))


def backward(net: nn.Module, *logits: torch.Tensor) -> None:
    sum(x.mean() for x in logits).backward(inputs=list(net.parameters()))
    net.zero_grad()


def passes_of_unimatch(method: Method, batch: Batch) -> None:
    """Labeled and weak images together, weak ones decoded a second time; strong views; backward."""
    net = method.student
    features = net.encode(torch.cat([batch.image, batch.weak]))
    fused = net.fuse(tuple(torch.cat([f, f[len(batch.image) :]]) for f in features))
    backward(net, net.classify(fused, batch.image.shape[-2:]), net(torch.cat(batch.strong)))


def passes_of_gta_seg(method: Method, batch: Batch) -> None:
    """The teacher's forward; forward and backward of the assistant and of the student."""
    with torch.no_grad():
        method.teacher(batch.weak)
    backward(method.assistant, method.assistant(batch.weak))
    backward(method.student, method.student(batch.image))


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_costs_little_more_than_its_passes(name):
    torch.manual_seed(0)
    method = METHODS[name](lambda **_: build_net(NETWORKS[name], CLASSES))
    method = method.to(memory_format=torch.channels_last).train()
    batch, late = batch_of(method), Clock(5, 1, 10)  # after a warm-up
    minimizer = Minimizer(method, protocol("voc-classic-183", method=name), torch.device("cpu"))

    def step() -> None:
        minimizer.begin(late)
        method.step(batch, late, minimizer)

    def passes() -> None:
        {"unimatch": passes_of_unimatch, "gta_seg": passes_of_gta_seg}[name](method, batch)

    def seconds(run) -> float:
        start = time.process_time()
        run()
        return time.process_time() - start

    step()  # makes the optimizer's state
    passes()
    pairs = [(seconds(step), seconds(passes)) for _ in range(TIMES)]
    ratio = statistics.median(a / b for a, b in pairs)
    print(f"{name}: {ratio:.3f} of {statistics.median(b for _, b in pairs):.2f} s")
    assert ratio <= 1.05, pairs
