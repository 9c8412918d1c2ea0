"""Run the notebooks that changed and compile the book: `s4 book`, `make book`.

The executed copy of `notebooks/x.ipynb` is `runs/book/<profile>/notebooks/x.ipynb`. Its metadata
hold the key of what it was made from, so that a second call runs only what changed. Papermill and
Jupyter Book are needed only here; the module imports without them and says so when it is called.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from ..interrupts import interruptible
from ..protocols import PROFILES
from ..runs import cores
from .headless import Job, explain, run, say

ROOT = Path(__file__).resolve().parents[2]
# These run the book but decide nothing that a page shows.
MACHINERY = ("compile.py", "headless.py", "cli.py", "grid.py", "slurm.py", "__main__.py")


def build(
    names: list[str],
    profile: str,
    parameters: dict | None = None,
    jobs: int | None = None,
    html: bool = True,
    root: Path = ROOT,
) -> int:
    """Run the named notebooks where they changed, then compile the book.

    Args:
        names: notebooks without `.ipynb`; empty for all of them.
        profile: one of `s4lib.protocols.PROFILES`.
        parameters: values for the notebooks' parameter cells; each goes to those that know it.
        jobs: notebooks at a time; by default one per core, or one where a GPU is expected.
        html: compile `_build/html` afterwards.
        root: the repository.

    Returns:
        The exit code: 0 fine; 1 a notebook or the compilation failed; 2 a request that cannot be
        met; 130 or 143 interrupted or terminated.
    """
    try:
        jobs_planned = plan(names, profile, parameters or {}, root)
    except ValueError as error:
        print(f"s4 book: {error}", file=sys.stderr)
        return 2
    todo = [job for job in jobs_planned if made_from(job.target) != job.key]
    say(f"profile {profile}: {len(todo)} to run, {len(jobs_planned) - len(todo)} up to date")
    try:
        with interruptible():
            failures = run(todo, jobs or (cores() if profile in ("smoke", "quick") else 1), root)
            if failures:
                print("\n".join(explain(job, root) for job in failures), file=sys.stderr)
                return 1
            return compile_html(profile, root) if html else 0
    except KeyboardInterrupt as stop:
        say("stopped; the same command goes on with what is missing")
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)


def plan(names: list[str], profile: str, parameters: dict, root: Path) -> list[Job]:
    """The jobs of a request, or a ValueError that says in one line what is wrong with it."""
    sources = {path.stem: path for path in sorted((root / "notebooks").glob("*.ipynb"))}
    needed = {"papermill": "papermill", "ipykernel": "ipykernel", "jupyter_book": "jupyter-book"}
    if missing := [package for module, package in needed.items() if not find_spec(module)]:
        raise ValueError(f'{", ".join(missing)} not installed: pip install -e ".[book]"')
    if not sources:
        raise ValueError("no notebooks found: it works in a clone of the book's repository")
    if profile not in PROFILES:
        raise ValueError(f"unknown profile {profile!r}; valid: {', '.join(PROFILES)}")
    if unknown := [name for name in names if name not in sources]:
        raise ValueError(f"unknown notebook {unknown[0]!r}; valid: {', '.join(sources)}")
    from papermill import inspect_notebook

    chosen = {name: sources[name] for name in names or sources}
    known = {name: inspect_notebook(str(path)) for name, path in chosen.items()}
    valid = sorted({parameter for of_one in known.values() for parameter in of_one})
    if unknown := [f"{name}={value!r}" for name, value in parameters.items() if name not in valid]:
        raise ValueError(f"unknown parameter {unknown[0]}; valid: {', '.join(valid) or 'none'}")
    planned, folder = [], root / "runs" / "book" / profile
    for name, path in chosen.items():
        given = {"profile": profile, **parameters}
        given = {key: value for key, value in given.items() if key in known[name]}
        target, log = folder / "notebooks" / path.name, folder / "logs" / f"{name}.log"
        planned.append(Job(name, path, target, log, given, key_of(path, given, root)))
    return planned


def key_of(source: Path, parameters: dict, root: Path) -> str:
    """A digest of all an execution depends on: cells, parameters, library, records."""
    cells = json.loads(source.read_text("utf8"))["cells"]
    facts = [[c["cell_type"], "".join(c["source"]), c["metadata"].get("tags", [])] for c in cells]
    library = [path for path in root.glob("s4lib/**/*.py") if path.name not in MACHINERY]
    data = [*root.glob("book/records/**/*"), *root.glob("book/published/**/*")]
    return _digest([facts, parameters], [*library, *data], root)


def made_from(executed: Path) -> str | None:
    """The key an executed copy was made from, None where there is no readable copy."""
    try:
        return json.loads(executed.read_text("utf8"))["metadata"]["s4"]["key"]
    except (OSError, ValueError, KeyError):
        return None


def compile_html(profile: str, root: Path) -> int:
    """Compile the pages, from scratch if anything they show has changed, else not at all.

    From scratch because Sphinx repeats no warning about a page that it does not read again, so
    that a second build would pass where the first failed.
    """
    index, stamp = root / "_build" / "html" / "index.html", root / "_build" / "pages.key"
    copies = (root / "runs" / "book" / profile / "notebooks").glob("[!.]*.ipynb")
    shown = [root / "_config.yml", root / "_toc.yml", root / "index.md"]
    shown += [path for path in root.glob("book/**/*") if "__pycache__" not in path.parts]
    shown += [*root.glob("notebooks/*.ipynb"), *copies]
    key = _digest([profile], shown, root)
    if index.exists() and stamp.exists() and stamp.read_text("utf8") == key:
        say(f"the pages are up to date: {_address(index, root)}")
        return 0
    say("compiling the pages")
    stamp.unlink(missing_ok=True)
    log = root / "runs" / "book" / profile / "logs" / "pages.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()"]
    command += ["build", ".", "-W", "-n", "--keep-going", "--all"]
    with log.open("wb") as file:
        code = subprocess.run(
            command,
            cwd=root,
            env={**os.environ, "S4_PROFILE": profile, "PYTHONUTF8": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
        ).returncode
    if code:
        text = log.read_text("utf8", errors="replace").splitlines()
        told = [line for line in text if "WARNING" in line or "ERROR" in line] or text[-15:]
        print("\n".join(told), file=sys.stderr)
        print(f"the pages did not compile; log  {log.relative_to(root)}", file=sys.stderr)
        return 1
    stamp.write_text(key, "utf8")
    say(f"the book is ready: {_address(index, root)}")
    return 0


def _address(index: Path, root: Path) -> str:
    """Where the first page is, and how to open it."""
    return f"{index.relative_to(root)}\n  open it in a browser: {index.as_uri()}"


def _digest(facts: list, paths: Iterable[Path], root: Path) -> str:
    """One digest of some facts and of the names and contents of some files."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for path in sorted(path for path in paths if path.is_file()):
        digest.update(f"{path.relative_to(root)}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
