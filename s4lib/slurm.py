"""Runs as jobs of a Slurm cluster, through submitit: one array, torchrun over a job's nodes inside.

What is queued or running is asked of Slurm itself, by the jobs' name, so that a grid which was
killed and started again watches the jobs it left behind and submits none twice. A job that reaches
its time limit or is preempted writes its checkpoint and is queued again; one whose node is lost
Slurm queues again. Folders of runs must lie where all nodes see them, with working flock.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import math
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from . import records
from .config import Config
from .run_folder import Busy, RunFolder
from .runs import Worker, forget_stale, launch

TIME_LIMITS = 1000  # how often a job may reach its limit and go on; each brings a checkpoint nearer
SIGNAL_DELAY = 90  # seconds from Slurm's signal to the end of the time limit


@dataclass
class Job:
    """What a node does for one run: start the processes, have them stop when Slurm says so."""

    config: Config
    out: Path
    gpus: int
    retrain: bool
    process: subprocess.Popen | None = field(default=None, repr=False)
    stopping: bool = False

    def __call__(self) -> None:
        import submitit

        here = submitit.JobEnvironment()
        signal.signal(signal.SIGTERM, lambda number, frame: self.stop())  # scancel, preemption
        if self.retrain and here.node == 0:  # the other nodes' processes wait for this one's
            with contextlib.suppress(Busy):
                forget_stale(self.config, self.out)
        nodes = ["--standalone"]
        if here.num_nodes > 1:
            port = 20_000 + int(os.environ["SLURM_JOB_ID"]) % 20_000
            nodes = [f"--nnodes={here.num_nodes}", f"--node_rank={here.node}"]
            nodes += [f"--master_addr={os.environ['SLURM_LAUNCH_NODE_IPADDR']}"]
            nodes += [f"--master_port={port}"]
        hidden = {} if self.gpus else {"CUDA_VISIBLE_DEVICES": ""}
        # Slurm signals all processes of a job; this one only is to act on the notice.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
        self.process = launch(self.config, self.out, self.gpus, hidden, nodes)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
        if self.stopping:
            self.stop()
        while self.process.poll() is None:  # wait() would keep `checkpoint` from waiting
            time.sleep(0.2)
        self.process.stdin.close()
        if self.process.returncode and not self.stopping and here.node == 0:
            log = RunFolder(self.out, self.config).output
            raise RuntimeError(f"exit code {self.process.returncode}, see {log}")

    def stop(self) -> None:
        self.stopping = True
        if self.process:
            self.process.stdin.close()

    def checkpoint(self):
        """What submitit is to queue again after Slurm's notice, when the checkpoint is written."""
        import submitit

        self.stop()
        until = time.monotonic() + SIGNAL_DELAY - 20
        while self.process and self.process.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        return submitit.helpers.DelayedSubmission(replace(self, process=None, stopping=False))


@dataclass
class Queued:
    """A run that is a job of the cluster."""

    config: Config
    job: str
    engine: Slurm

    def ended(self) -> bool:
        return self.job not in self.engine.jobs()


class Slurm:
    """Trains in jobs of a cluster.

    Args:
        nodes, gpus: nodes of a run, and GPUs and so processes on each; 0 is one without a GPU.
        slots: jobs that may run at a time.
        minutes: time limit of a job; runs may need several.
        partition: of the cluster; empty is its default.
        more: other parameters of submitit's Slurm executor, for instance {"account": "us"}.

    Raises:
        ValueError: no Slurm or no submitit here, or a parameter that submitit does not know.
    """

    pause = 3.0
    detached = True

    def __init__(
        self,
        out: Path,
        *,
        nodes: int,
        gpus: int,
        slots: int,
        minutes: int,
        partition: str,
        more: dict,
        retrain: bool,
    ):
        try:
            import submitit
        except ImportError:
            raise ValueError("engine='slurm' needs submitit: pip install 's4lib[slurm]'") from None
        missing = [name for name in ("sbatch", "squeue", "srun") if not shutil.which(name)]
        if missing:
            raise ValueError(f"engine='slurm' needs {missing[0]}, which is not on this machine")
        self.out, self.gpus, self.retrain = out.resolve(), gpus, retrain
        self.name = f"s4-{hashlib.sha256(str(self.out).encode()).hexdigest()[:8]}"
        self.folder = self.out / ".slurm"
        self.executor = submitit.SlurmExecutor(self.folder, max_num_timeout=TIME_LIMITS)
        given = {
            "job_name": self.name,
            "time": minutes,
            "nodes": nodes,
            "ntasks_per_node": 1,
            "signal_delay_s": SIGNAL_DELAY,
            "setup": [f"export PYTHONPATH={records.HERE}:$PYTHONPATH"],
            **({"gpus_per_node": gpus} if gpus else {}),
            **({"array_parallelism": slots} if slots else {}),
            **({"partition": partition} if partition else {}),
            **more,
            "additional_parameters": {"requeue": True, **more.get("additional_parameters", {})},
        }
        try:
            self.executor.update_parameters(**given)
        except ValueError as error:
            raise ValueError(f"slurm_args: {' '.join(str(error).split())}") from None
        self.runs: dict[str, str] = {}  # of jobs, by id
        self.asked, self.answer = -math.inf, ()

    def jobs(self) -> tuple[str, ...]:
        """Ids of our jobs that are queued or running; the last answer if Slurm gives none."""
        if time.monotonic() - self.asked > self.pause / 2:
            me = ["--user", getpass.getuser(), "--name", self.name]
            command = ["squeue", "--noheader", "--array", "--format=%i", *me]
            told = subprocess.run(command, capture_output=True, text=True)
            if told.returncode == 0:
                self.asked, self.answer = time.monotonic(), tuple(told.stdout.split())
        return self.answer

    def start(self, configs: list[Config], running: list[Worker]) -> list[Worker]:
        left = {self._run(job): job for job in self.jobs()}
        known = [Queued(c, left[c.run_id], self) for c in configs if c.run_id in left]
        new = [c for c in configs if c.run_id not in left]
        return known + (self._submit(new) if new else [])

    def stop(self, workers: list[Worker], patience: float) -> None:
        ids = [worker.job for worker in workers if not worker.ended()]
        if not ids:
            return
        subprocess.run(["scancel", *ids], capture_output=True)  # SIGTERM; after KillWait SIGKILL
        until = time.monotonic() + patience
        while not all(worker.ended() for worker in workers) and time.monotonic() < until:
            time.sleep(0.5)

    def _submit(self, configs: list[Config]) -> list[Worker]:
        import submitit

        try:
            with self.executor.batch():
                jobs = [
                    self.executor.submit(Job(c, self.out, self.gpus, self.retrain)) for c in configs
                ]
        except (submitit.core.utils.FailedJobError, subprocess.SubprocessError) as error:
            raise ValueError(f"sbatch: {' '.join(str(error).split())[-300:]}") from None
        self.asked = -math.inf
        self.runs |= {job.job_id: c.run_id for job, c in zip(jobs, configs, strict=True)}
        return [Queued(c, job.job_id, self) for job, c in zip(jobs, configs, strict=True)]

    def _run(self, job: str) -> str:
        """The id of the run that a job trains, from the file it was submitted with."""
        import submitit

        if job not in self.runs:
            try:
                asked = submitit.SlurmJob(self.folder, job).submission().function
                self.runs[job] = asked.config.run_id
            except FileNotFoundError:  # its grid was killed before it had written the file
                return ""
        return self.runs[job]
