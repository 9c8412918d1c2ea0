"""`s4 grid --engine slurm` on a real Slurm of two nodes on this machine, with what befalls jobs.

Needs root, the packages slurm-wlm and munge, and ../shared/slurm/slurm.conf (README there).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import TINY

from s4lib.grid import read
from s4lib.run_folder import RunFolder

pytestmark = pytest.mark.slow

GRID = {
    "protocol": "mosaic-32",
    "method": ["supervised", "mean_teacher"],
    "seed": [0, 1, 2],
    "set": {**TINY, "epochs": 240, "eval_every": 20},  # long enough to be found at work
}


def sh(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def notice(job: str) -> None:
    """Slurm's signal before a preemption or the time limit; fails for some of a job's steps."""
    subprocess.run(["scancel", "--signal=USR2", job], capture_output=True)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two nodes, n1 and n2; SLURM_CONF names their configuration while the tests run."""
    template = Path(__file__).parents[2] / "shared" / "slurm" / "slurm.conf"
    if not template.exists():
        pytest.skip("needs ../shared/slurm/slurm.conf, which does not lie beside this checkout")
    for name in ("slurmctld", "slurmd", "munged", "sbatch"):
        if not shutil.which(name):
            pytest.skip(f"needs {name}: apt-get install slurm-wlm munge")
    if os.geteuid():
        pytest.skip("needs root, as whom slurmd starts jobs")
    pytest.importorskip("submitit", reason="needs submitit: pip install submitit")
    folder = tmp_path_factory.mktemp("slurm")
    for part in ("log", "state"):
        (folder / part).mkdir()
    text = template.read_text().replace("HOST", socket.gethostname().partition(".")[0])
    (folder / "slurm.conf").write_text(text.replace("DIR", str(folder)))
    munge = Path("/run/munge/munged.pid")
    ours = not Path("/run/munge/munge.socket.2").exists()
    if ours:
        sh("install", "-d", "-o", "munge", "-g", "munge", "/run/munge")
        sh("runuser", "-u", "munge", "--", "munged")
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    for command in (["slurmctld"], ["slurmd", "-N", "n1"], ["slurmd", "-N", "n2"]):
        sh(*command)
    until = time.monotonic() + 30
    while "idle" not in sh("sinfo", "--noheader", "--format=%t %D").replace("idle 2", "idle"):
        assert time.monotonic() < until, (folder / "log" / "ctld.log").read_text()
        time.sleep(0.5)
    yield folder
    with contextlib.suppress(subprocess.CalledProcessError):
        sh("scancel", "--user=root")
        until = time.monotonic() + 60
        while sh("squeue", "-h") and time.monotonic() < until:
            time.sleep(0.5)
    for pid in [*folder.glob("*.pid"), *([munge] if ours else [])]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid.read_text()), signal.SIGTERM)
    del os.environ["SLURM_CONF"]
    if before:
        os.environ["SLURM_CONF"] = before


class Grid:
    """`s4 grid` on the cluster, in a process of its own, over a file of runs."""

    def __init__(self, tmp_path: Path, grid: dict):
        self.out, self.file, self.log = (tmp_path / n for n in ("runs", "grid.yaml", "grid.txt"))
        self.file.write_text(yaml.safe_dump(grid))
        self.configs = read(self.file)

    def start(self, *options: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "s4lib", "grid", str(self.file), "--out", str(self.out)]
        with open(self.log, "a") as log:
            return subprocess.Popen([*command, *options], stdout=log, stderr=log)

    def cluster(self, *options: str) -> subprocess.Popen:
        more = ["--gpus_per_node", "0", "--slurm_args", '{"cpus_per_task": 2}', "--time", "30m"]
        return self.start("--engine", "slurm", *more, *options)

    def jobs(self, state: str = "") -> dict[str, str]:
        """Nodes by job id, of jobs that are queued or running."""
        states = [f"--states={state}"] if state else []
        lines = sh("squeue", "-h", "--array", "--format=%i|%N", *states).splitlines()
        return dict(line.split("|") for line in lines)

    def step(self, job: str) -> int:
        """Steps that a job's run has done."""
        import submitit

        asked = submitit.SlurmJob(self.out / ".slurm", job).submission().function
        folder = RunFolder(self.out, asked.config)
        return folder.steps()[0] if folder.checkpoint.exists() else 0

    def await_running(self, node: str = "", beside: tuple[str, ...] = ()) -> str:
        """The id of a job that trains and has written a checkpoint."""
        until = time.monotonic() + 180
        while time.monotonic() < until:
            for job, where in self.jobs("RUNNING").items():
                if node in where and job not in beside and self.step(job):
                    return job
            time.sleep(0.3)
        raise AssertionError(f"{sh('squeue')}\n{self.log.read_text()}")

    def await_end(self, process: subprocess.Popen) -> int:
        """The grid's exit code. Jobs that wait two minutes after a requeue need not."""
        until = time.monotonic() + 900
        while process.poll() is None:
            assert time.monotonic() < until, f"{sh('squeue')}\n{self.log.read_text()}"
            for line in sh("squeue", "-h", "--array", "--format=%i|%r").splitlines():
                job, reason = line.split("|")
                if reason == "BeginTime":
                    with contextlib.suppress(subprocess.CalledProcessError):
                        sh("scontrol", "update", f"JobId={job}", "StartTime=now")
            time.sleep(1)
        return process.returncode

    def results(self, out: Path) -> list[tuple]:
        """Of every run: what it scored, and the very lines of its log of losses."""
        folders = [RunFolder(out, config) for config in self.configs]
        return [(f.record()["networks"], f.metrics.read_bytes()) for f in folders]


def test_whatever_befalls_its_jobs_a_grid_ends_with_every_record_once(cluster, tmp_path):
    grid = Grid(tmp_path, GRID)
    process = grid.cluster()
    try:
        killed = grid.await_running()
        sh("scancel", killed)
        requeued = grid.await_running(beside=(killed,))
        sh("scontrol", "requeue", requeued)
        noticed = grid.await_running(beside=(killed, requeued))
        notice(noticed)
        on_n2 = grid.await_running("n2", (killed, requeued, noticed))
        sh("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
        assert on_n2 not in grid.jobs("RUNNING")
        back = ["scontrol", "update", "NodeName=n2", "State=RESUME"]
        subprocess.run(back, capture_output=True)  # fails where slurmd's word has brought it back
        grid.await_running(beside=(on_n2,))
        process.kill()  # the grid itself; its jobs go on
        process.wait()
        submitted = len(list((grid.out / ".slurm").glob("*_submitted.pkl")))
        process = grid.cluster()
        assert grid.await_end(process) == 0, grid.log.read_text()
    finally:
        process.kill()
        process.wait()
    logs = [RunFolder(grid.out, config).output.read_text() for config in grid.configs]
    assert "stopped at step" in "".join(logs)
    assert submitted == 7  # six, and the one that was killed
    assert len(list((grid.out / ".slurm").glob("*_submitted.pkl"))) == submitted  # none anew
    found = grid.results(grid.out)
    for _, lines in found:
        steps = [(line["kind"], line["step"]) for line in map(json.loads, lines.splitlines())]
        assert len(steps) == len(set(steps)) == 72 + 12  # logged, evaluated
    here = tmp_path / "here"
    grid.out = here
    assert grid.start("--engine", "local", "--slots", "2").wait(900) == 0, grid.log.read_text()
    assert grid.results(here) == found


def test_a_run_over_two_nodes_is_stopped_queued_again_and_ends(cluster, tmp_path):
    short = {**GRID["set"], "epochs": 80}
    grid = Grid(tmp_path, {**GRID, "method": "mean_teacher", "seed": 0, "set": short})
    process = grid.cluster("--nodes", "2")
    try:
        notice(grid.await_running())
        assert grid.await_end(process) == 0, grid.log.read_text()
    finally:
        process.kill()
        process.wait()
    folder = RunFolder(grid.out, grid.configs[0])
    assert folder.record()["world_size"] == 2
    assert "stopped at step" in folder.output.read_text()


def test_a_spent_budget_leaves_checkpoints_and_no_job(cluster, tmp_path):
    grid = Grid(tmp_path, {**GRID, "seed": 0, "set": {**GRID["set"], "epochs": 5000}})
    assert grid.await_end(grid.cluster("--budget", "80s")) == 3, grid.log.read_text()
    assert "2 left when the budget was spent" in grid.log.read_text()
    assert not grid.jobs()
    assert all(RunFolder(grid.out, config).checkpoint.exists() for config in grid.configs)
