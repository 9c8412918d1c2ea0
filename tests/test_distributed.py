"""Two gloo processes against one; ranks.py does the work of both in a single launch."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import torch
from conftest import equal

from s4lib import distributed, trainer
from s4lib.trainer import fit

TESTS = Path(__file__).parent
pytestmark = pytest.mark.slow  # to start two processes takes long: `.ci/run` and `make slow`


@pytest.fixture(scope="session")
def folder(tmp_path_factory, request) -> Path:
    """Where ranks.py left its results; launched once, also under pytest-xdist."""
    asked = [getattr(item, "callspec", None) for item in request.session.items]
    names = {call.params.get("name") for call in asked if call}
    presets = [name for name in ranks.EACH_PRESET if name in names]
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    where = base / "ranks"
    with open(base / "ranks.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not where.exists():
            where.mkdir()
            launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node=2"]
            paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
            done = subprocess.run(
                [sys.executable, "-m", *launcher, str(TESTS / "ranks.py"), str(where), *presets],
                capture_output=True,
                text=True,
                timeout=300,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
            )
            (where / "log.txt").write_text(done.stdout + done.stderr)
    return where


@pytest.fixture(scope="session")
def found(folder) -> dict:
    assert (folder / "found.pt").exists(), (folder / "log.txt").read_text()[-3000:]
    return torch.load(folder / "found.pt", weights_only=False)  # ours, of a minute ago


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "last.pt", weights_only=True)["method"]


@pytest.mark.parametrize("name", [*ranks.EACH_PRESET, *ranks.AGAINST_ONE])
def test_ranks_end_bit_equal_buffers_included(found, name):
    assert found["world"] == 2
    (first, networks), (second, others) = found[name]
    assert first == second
    assert networks == others


@pytest.mark.parametrize("name", ranks.AGAINST_ONE)
def test_two_half_batches_are_one_whole_batch(found, folder, tmp_path, name):
    config = ranks.AGAINST_ONE[name]
    with ranks.precision(name):
        record = fit(config, out=tmp_path)
    outs = tmp_path, folder / "runs" / name
    one, two = (weights(out / config.run_id) for out in outs)
    tolerance = 1e-4 if "batch norm" in name else 1e-5
    torch.testing.assert_close(two, one, rtol=0, atol=tolerance)
    start = trainer.build_method(config, 8).state_dict()["student.classifier.0.0.weight"]
    assert (one["student.classifier.0.0.weight"] - start).abs().max() > 1e-3
    networks = found[name][0][1]
    for network, results in record["networks"].items():
        assert networks[network]["last"]["miou"] == pytest.approx(results["last"]["miou"], abs=0.2)


def test_a_resumed_run_of_two_processes_is_bit_equal_to_an_uninterrupted_one(found, folder):
    run_id = ranks.RESUMED.run_id
    killed, whole = folder / "killed" / run_id, folder / "uninterrupted" / run_id
    states = [torch.load(f / "last.pt", weights_only=True) for f in (killed, whole)]
    for part in ("step", "method", "minimizer", "sums", "best", "last"):
        assert equal(states[0][part], states[1][part]), part
    assert (killed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert (whole / "metrics.jsonl").read_text().count('"train"') == 3


@pytest.mark.parametrize("name", ranks.EVALUATED)
def test_sharded_evaluation_counts_every_image_once(found, name):
    """Also with an odd number of images, and with one process that has none."""
    single = ranks.evaluation(ranks.EVALUATED[name])
    for matrix in found[f"evaluation, {name}"]:
        assert torch.equal(matrix, single)
    assert single.sum() == len(ranks.EVALUATED[name]) * 32 * 32


@pytest.mark.parametrize("name", ["kept", "valid", "all", "mse"])
def test_losses_do_not_depend_on_who_holds_the_void_pixels(found, name):
    """Mean over processes = the loss of the whole batch, value and gradient."""
    whole, gradient = ranks.void_losses(slice(None))[name]
    values, gradients = zip(*(rank[name] for rank in found["void"]), strict=True)
    torch.testing.assert_close(torch.stack(values).mean(), whole)
    torch.testing.assert_close(torch.cat(gradients) / 2, gradient, rtol=1e-5, atol=1e-8)


def test_a_flag_of_one_process_is_seen_by_all(found):
    assert found["any"] == [True, True]


def test_alone_nothing_is_shared():
    value = torch.tensor([1.0, 2.0])
    assert distributed.world() == 1 and distributed.rank() == 0
    assert torch.equal(distributed.mean(value), value)
    assert not distributed.any_process(False, torch.device("cpu"))
    net = torch.nn.BatchNorm2d(2)
    assert distributed.synchronise_batch_norm(net, torch.device("cpu")) is net
