"""What `s4 book` runs and keeps, what a failure says, and how an executed page is polished."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from s4lib.book import compile as book
from s4lib.progress import duration
from s4lib.protocols import PROFILES

ROOT = Path(__file__).parents[1]


def markdown(name, text):
    return {"cell_type": "markdown", "id": name, "metadata": {}, "source": text}


def code(name, text, *tags, outputs=()):
    meta = {"tags": list(tags)} if tags else {}
    cell = {"cell_type": "code", "id": name, "metadata": meta, "source": text}
    return {**cell, "execution_count": None, "outputs": list(outputs)}


def stream(text, name="stdout"):
    return {"output_type": "stream", "name": name, "text": text}


def notebook(*cells, **metadata):
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, **metadata}
    return {"nbformat": 4, "nbformat_minor": 5, "metadata": metadata, "cells": list(cells)}


@pytest.fixture
def repository(tmp_path):
    """A repository with one notebook that takes two parameters."""
    write(tmp_path, "good", "print(profile, seed)")
    return tmp_path


def write(root, name, text):
    (root / "notebooks").mkdir(exist_ok=True)
    parameters = code("parameters", 'profile = "quick"\nseed = 0', "parameters")
    cells = markdown("title", f"# {name}"), parameters, code("work", text)
    (root / "notebooks" / f"{name}.ipynb").write_text(json.dumps(notebook(*cells)), "utf8")


def build(root, *names, profile="smoke", **parameters):
    return book.build(list(names), profile, parameters, html=False, root=root)


# ---- requests that cannot be met


@pytest.mark.parametrize(
    ("names", "profile", "parameters", "words"),
    [
        (["good"], "smoke", {"sede": 1}, ["sede=1", "valid: profile, seed"]),
        (["bad"], "smoke", {}, ["'bad'", "valid: good"]),
        ([], "fast", {}, ["'fast'", f"valid: {', '.join(PROFILES)}"]),
    ],
)
def test_a_wrong_request_is_one_line_and_runs_nothing(
    repository, capsys, names, profile, parameters, words
):
    assert build(repository, *names, profile=profile, **parameters) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said and all(word in said for word in words)
    assert not (repository / "runs").exists()


def test_without_the_book_packages_the_module_imports_and_the_call_says_so(
    repository, capsys, monkeypatch
):
    monkeypatch.setattr(book, "find_spec", lambda name: None)
    assert build(repository) == 2
    assert 'pip install -e ".[book]"' in capsys.readouterr().err


# ---- running


def test_a_failure_is_explained_and_what_others_made_stays(repository, capsys):
    write(repository, "broken", "print('so far')\nraise RuntimeError('no such luck')")
    assert build(repository) == 1
    told = capsys.readouterr().err
    assert "notebooks/broken.ipynb, cell 3 (work): RuntimeError: no such luck" in told
    assert "runs/book/smoke/logs/broken.log" in told
    made = repository / "runs" / "book" / "smoke" / "notebooks"
    assert sorted(path.name for path in made.iterdir()) == ["broken.failed.ipynb", "good.ipynb"]
    executed = json.loads((made / "good.ipynb").read_text("utf8"))
    assert "smoke 0" in json.dumps(executed["cells"])
    assert executed["metadata"]["s4"]["versions"]["python"]

    write(repository, "broken", "print(seed)")  # mended: only this one runs again
    before = (made / "good.ipynb").stat().st_mtime_ns
    capsys.readouterr()
    assert build(repository) == 0
    assert "1 to run, 1 up to date" in capsys.readouterr().out
    assert sorted(path.name for path in made.iterdir()) == ["broken.ipynb", "good.ipynb"]
    assert (made / "good.ipynb").stat().st_mtime_ns == before
    assert build(repository) == 0
    assert "0 to run, 2 up to date" in capsys.readouterr().out


def test_the_key_changes_with_what_matters_and_with_nothing_else(repository):
    source = repository / "notebooks" / "good.ipynb"

    def key(**parameters):
        return book.key_of(source, parameters, repository)

    first = key(seed=1)
    assert key(seed=1) == first and key(seed=2) != first
    content = json.loads(source.read_text("utf8"))
    content["cells"][2]["id"] = "other"
    content["cells"][2]["execution_count"] = 7
    content["metadata"]["language_info"] = {"version": "3.13"}
    source.write_text(json.dumps(content), "utf8")
    assert key(seed=1) == first, "ids and noise do not matter"
    (repository / "s4lib" / "book").mkdir(parents=True)
    (repository / "s4lib" / "book" / "compile.py").write_text("", "utf8")
    assert key(seed=1) == first, "the machinery decides no result"
    for path in ("s4lib/losses.py", "book/records/quick.jsonl", "book/published/table.csv"):
        (repository / path).parent.mkdir(parents=True, exist_ok=True)
        (repository / path).write_text("x", "utf8")
        assert key(seed=1) != first, path
        first = key(seed=1)
    content["cells"][2]["source"] = "print(1)"
    source.write_text(json.dumps(content), "utf8")
    assert key(seed=1) != first


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_no_process_behind(repository, number):
    psutil = pytest.importorskip("psutil")
    child = "import subprocess, sys, time; print('up', flush=True); time.sleep(600)"
    write(
        repository,
        "long",
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True)\n"
        "open('started', 'w').close()\ntime.sleep(600)",
    )
    program = (
        "import sys; from pathlib import Path; from s4lib.book.compile import build\n"
        "sys.exit(build(['long'], 'smoke', html=False, root=Path(sys.argv[1])))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, "-c", program, repository], env=environment)
    deadline = time.monotonic() + 60
    while not (repository / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    family = psutil.Process(parent.pid).children(recursive=True)
    assert len(family) >= 3  # papermill, the kernel, the kernel's child
    parent.send_signal(number)
    assert parent.wait(timeout=40) == 128 + number
    gone, alive = psutil.wait_procs(family, timeout=5)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
    assert not list(repository.glob("runs/book/smoke/notebooks/[!.]*"))


@pytest.mark.parametrize(
    ("seconds", "words"), [(8.4, "8 s"), (185, "3 min 5 s"), (3725, "1 h 2 min")]
)
def test_durations_read_well(seconds, words):
    assert duration(seconds) == words


# ---- polishing executed notebooks


@pytest.fixture(scope="module")
def pages():
    """The Sphinx extension, which is no package."""
    path = ROOT / "book" / "_ext" / "executed_runs.py"
    spec = importlib.util.spec_from_file_location("executed_runs", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def polished(pages, *cells, **metadata):
    text = json.dumps(notebook(*cells, **metadata))
    result = pages.polish(text, root="/home/ada/s4book", home="/home/ada", host="box-17")
    return json.loads(result)["cells"]


def test_the_defaults_are_hidden_when_others_ran(pages):
    given = code("parameters", "seed = 0", "parameters")
    ran = code("injected", 'seed = 3\nroot = "/data/ada/set"', "injected-parameters")
    _, first, second = polished(pages, given, ran)
    assert "remove-cell" in first["metadata"]["tags"]
    assert "hide-input" in second["metadata"]["tags"]
    assert second["source"] == 'seed = 3\nroot = "…/set"'
    (_, alone) = polished(pages, given)
    assert "hide-input" in alone["metadata"]["tags"]


def test_progress_lines_keep_their_last_state(pages):
    outputs = [stream("start\nstep 1"), stream("\rstep 2\r"), stream("\rstep 3\n"), stream("end")]
    (*_, cell) = polished(pages, code("run", "", outputs=outputs))
    assert [o["text"] for o in cell["outputs"]] == ["start\nstep 3\nend"]


def test_nothing_of_one_machine_is_left(pages):
    error = {
        "output_type": "error",
        "ename": "E",
        "evalue": "no /home/ada/s4book/x.yaml",
        "traceback": ["/home/ada/s4book/.venv/lib/python3.11/site-packages/torch/a.py", "box-17:1"],
    }
    shown = {
        "output_type": "display_data",
        "metadata": {},
        "data": {"text/plain": "/home/ada/s4book and /home/ada/x", "image/png": "/home/ada/s4book"},
    }
    outputs = [stream("/home/ada/s4book/runs/1 on box-17"), error, shown]
    (*_, cell) = polished(pages, code("run", "", outputs=outputs))
    text, error, shown = cell["outputs"]
    assert text["text"] == "runs/1 on host"
    assert error["evalue"] == "no x.yaml"
    assert error["traceback"] == ["site-packages/torch/a.py", "host:1"]
    assert shown["data"]["text/plain"] == ". and ~/x"
    assert shown["data"]["image/png"] == "/home/ada/s4book", "pictures are left alone"


def test_outputs_that_need_a_server_go(pages):
    def shown(**data):
        return {"output_type": "display_data", "metadata": {}, "data": data}

    outputs = [
        shown(**{pages.WIDGETS: {}, "text/plain": "a widget"}),
        shown(**{pages.PLOTLY: {}, "text/html": "a plot"}),
    ]
    (*_, cell) = polished(pages, code("run", "", outputs=outputs))
    assert [list(o["data"]) for o in cell["outputs"]] == [["text/html"]]


def test_the_record_box_says_how_the_page_was_made(pages):
    def run(name, seed, draw):
        return {"run_id": name, "seed": seed, "draw": draw, "device": "cpu", "seconds": 40.0}

    shown = {"output_type": "display_data", "data": {"text/plain": "done"}}
    first = {**shown, "metadata": {"s4": {"runs": [run("a", 1, 0), run("b", 0, 2)]}}}
    again = {**shown, "metadata": {"s4": {"runs": [run("a", 1, 0)]}}}
    cells = polished(
        pages,
        markdown("title", "# A chapter\n\nIts claim."),
        code("run", "", outputs=[first, again]),
        papermill={
            "duration": 62.0,
            "start_time": "2026-11-20T10:00:00.1+00:00",
            "parameters": {"profile": "quick", "decay": 0.9, "data_root": "/data/ada/CamVid"},
        },
        s4={"profile": "quick", "commit": "abc123", "changed": True, "versions": {"torch": "2.11"}},
    )
    assert [c["source"] for c in cells[:3:2]] == ["# A chapter", "Its claim."]
    box = cells[1]["source"]
    for words in (
        "**Profile** `quick`",
        "**Duration** 1 min 2 s",
        "**Date** 20 November 2026",
        "**Commit** `abc123` with local changes",
        "**Device** cpu",
        "**Runs** 2, 1 min 20 s of training",
        "**Seeds** 0, 1",
        "**Label draws** 0, 2",
        "**Versions** torch 2.11",
        "**Parameters** `data_root = …/CamVid`, `decay = 0.9`",
    ):
        assert words in box
    assert len({cell["id"] for cell in cells}) == len(cells)


def test_a_chapter_that_was_not_run_says_so(pages):
    text = json.dumps(notebook(markdown("title", "# A chapter"), code("run", "1")))
    title, box, _ = json.loads(pages.not_executed(text, "cutmix", "camvid"))["cells"]
    assert title["source"] == "# A chapter"
    assert "Not executed" in box["source"] and "s4 book cutmix --profile camvid" in box["source"]


def test_a_caption_goes_with_the_picture_alone(pages):
    figure = {"figure": {"name": "fig-x", "caption": "A line."}}
    told = {"output_type": "display_data", "metadata": {}, "data": {"text/markdown": "told"}}
    drawn = {"output_type": "display_data", "metadata": {}, "data": {"image/svg+xml": "<svg/>"}}
    cell = code("both", "draw()", outputs=[told, drawn])
    cell["metadata"]["mystnb"] = figure
    *_, text, picture = polished(pages, cell)
    assert text["outputs"] == [told] and "mystnb" not in text["metadata"]
    assert text["source"] == "draw()"
    assert picture["outputs"] == [drawn] and picture["metadata"]["mystnb"] == figure
    assert picture["source"] and picture["metadata"]["tags"] == ["remove-input"]
    alone = code("alone", "draw()", outputs=[drawn])
    alone["metadata"]["mystnb"] = figure
    assert polished(pages, alone)[-1]["source"] == "draw()"
