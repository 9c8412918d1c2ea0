"""Run notebooks without a browser: papermill in child processes, a few at a time, none orphaned.

A job reads a notebook's source and leaves an executed copy under its final name only when every
cell has run; what a failed one got done is kept beside it as `<name>.failed.ipynb`.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..progress import duration

# What a child's environment says where the caller's does not. The warning is tqdm's, which timm's
# imports set off: it misses a widget that a static page could not show anyway.
ENVIRONMENT = {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
    "PYTHONWARNINGS": "ignore:IProgress not found",
    "PYTHONUNBUFFERED": "1",
}


@dataclass
class Job:
    """One notebook to run: what from, what to, and the child process at work on it."""

    name: str
    source: Path
    target: Path
    log: Path
    parameters: dict
    key: str
    facts: dict = field(default_factory=dict)
    process: subprocess.Popen | None = None
    started: float = 0.0

    @property
    def partial(self) -> Path:
        return self.target.with_name(f".{self.name}.partial.ipynb")

    @property
    def failed(self) -> Path:
        return self.target.with_name(f"{self.name}.failed.ipynb")


def run(todo: list[Job], at_a_time: int, root: Path) -> list[Job]:
    """Run all jobs, a few at a time; return those that failed. An interrupt stops them all."""
    waiting, running, failures = list(todo), [], []
    try:
        while waiting or running:
            while waiting and len(running) < at_a_time:
                running.append(_start(waiting.pop(0), root))
            time.sleep(0.2)
            _show(running, len(todo) - len(waiting) - len(running), len(todo))
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                if not _finish(job):
                    failures.append(job)
    finally:
        stop([job.process for job in running])
    return failures


def _start(job: Job, root: Path) -> Job:
    """Start papermill for one job, in a process group of its own, writing to the job's log."""
    for folder in (job.target.parent, job.log.parent):
        folder.mkdir(parents=True, exist_ok=True)
    job.partial.unlink(missing_ok=True)
    given = job.log.with_suffix(".yaml")
    given.write_text(json.dumps(job.parameters, default=str), "utf8")  # JSON is YAML
    command = [sys.executable, "-m", "papermill", job.source, job.partial, "-f", given]
    command += ["--cwd", root, "-k", "python3", "--no-progress-bar", "--log-output"]
    job.facts = {"key": job.key, "profile": job.log.parents[1].name, **_surroundings(root)}
    with job.log.open("wb") as log:
        job.process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=root,
            env={**ENVIRONMENT, **os.environ},
            start_new_session=True,
        )
    job.started = time.monotonic()
    if not sys.stdout.isatty():
        say(f"  {job.name}: started")
    return job


def _finish(job: Job) -> bool:
    """Store what an ended child left: the executed copy, or the partial one if it failed."""
    took = duration(time.monotonic() - job.started)
    if job.process.returncode == 0:
        notebook = json.loads(job.partial.read_text("utf8"))
        notebook["metadata"]["s4"] = job.facts
        job.partial.write_text(json.dumps(notebook, indent=1, ensure_ascii=False), "utf8")
        job.partial.replace(job.target)
        job.failed.unlink(missing_ok=True)
        say(f"  {job.name}: ran in {took}")
        return True
    if job.partial.exists():
        job.partial.replace(job.failed)
    say(f"  {job.name}: FAILED after {took}")
    return False


def explain(job: Job, root: Path) -> str:
    """Which cell of a failed job raised what, and where to read more."""
    where, error = _first_error(job)
    if not error:
        lines = job.log.read_text("utf8", errors="replace").splitlines()
        error = next((line.strip() for line in reversed(lines) if line.strip()), "no message")
        if job.process.returncode < 0:
            error = f"killed by signal {-job.process.returncode}; the log ends with: {error}"
    text = f"{job.source.relative_to(root)}{where}: {error}\n  log  {job.log.relative_to(root)}"
    return text + (f"\n  kept {job.failed.relative_to(root)}" if job.failed.exists() else "")


def _first_error(job: Job) -> tuple[str, str]:
    """Cell and message of the first error in what a failed job left; empty if there is none."""
    try:
        cells = json.loads(job.failed.read_text("utf8"))["cells"]
    except (OSError, ValueError):
        return "", ""
    ids = [cell.get("id") for cell in json.loads(job.source.read_text("utf8"))["cells"]]
    for cell in cells:
        for output in cell.get("outputs", []):
            if output["output_type"] == "error":
                name = cell.get("id")
                number = ids.index(name) + 1 if name in ids else "?"
                message = f"{output['ename']}: {output['evalue']}".splitlines()[0]
                return f", cell {number} ({name})", message
    return "", ""


def stop(processes: list[subprocess.Popen], patience: float = 10.0) -> None:
    """End children with all their descendants: kindly first, so that training can save itself.

    Kernels and training processes live in sessions of their own, hence the walk down the tree.
    """
    if not processes:
        return
    import psutil  # comes with ipykernel

    family = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            parent = psutil.Process(process.pid)
            family += [parent, *parent.children(recursive=True)]
    for act in ("terminate", "kill"):
        for member in family:
            with suppress(psutil.NoSuchProcess):
                getattr(member, act)()
        _, family = psutil.wait_procs(family, timeout=patience)


def _surroundings(root: Path) -> dict:
    """The commit and the versions a notebook runs with."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "timm"):
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    commit = _git(root, "rev-parse", "--short=10", "HEAD")
    changed = commit and _git(root, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "changed": bool(changed), "versions": versions}


def _git(root: Path, *words: str) -> str:
    """One answer of git, empty where there is no git, no repository or no commit."""
    try:
        answer = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True)
    except OSError:
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def _show(running: list[Job], done: int, total: int) -> None:
    """The live line of a terminal: how many are done, which run and for how long."""
    if sys.stdout.isatty() and running:
        now = time.monotonic()
        parts = [f"{job.name} {duration(now - job.started)}" for job in running]
        line = f"  {done}/{total} done, running: {', '.join(parts)}"
        width = shutil.get_terminal_size().columns or 80  # some pseudo-terminals say 0
        print(f"\r\x1b[K{line[: width - 1]}", end="", flush=True)


def say(text: str) -> None:
    """Print a line that stays, above the live line if there is one."""
    print(f"\r\x1b[K{text}" if sys.stdout.isatty() else text, flush=True)
