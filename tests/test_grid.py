"""`s4 grid`: what a file asks for, the plan, the queue, and what a killed grid leaves behind."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, TINY

from s4lib import runs
from s4lib.cli import main
from s4lib.grid import Estimate, expand, read, seconds
from s4lib.methods import METHODS
from s4lib.protocols import protocol
from s4lib.run_folder import RunFolder
from s4lib.trainer import fit


@pytest.fixture
def file(tmp_path):
    def write(given: object) -> Path:
        path = tmp_path / "grid.yaml"
        path.write_text(given if isinstance(given, str) else yaml.safe_dump(given))
        return path

    return write


GRID = {"protocol": "mosaic-32", "method": "supervised", "seed": [0, 1], "set": TINY}

# ---------------------------------------------------------------- the file


def test_runs_are_all_combinations_and_the_seed_is_the_draw(file):
    grid = {
        "protocol": ["mosaic-16", "mosaic-32"],
        "method": ["supervised", "ps_mt"],
        "seed": [0, 3],
        "set": {"epochs": 5},
        "override": [{}, {"lr": 0.5, "epochs": 6}],
    }
    configs = read(file(grid))
    assert len(configs) == len({c.run_id for c in configs}) == 16
    assert configs[0] == protocol("mosaic-16", method="supervised", epochs=5)
    assert configs[-1] == protocol("mosaic-32", method="ps_mt", seed=3, draw=3, lr=0.5, epochs=6)
    assert configs[-1].warmup == 2  # as the protocol has it for this method


def test_arguments_of_methods_are_merged_and_one_draw_may_be_kept():
    (config,) = expand(
        {
            "protocol": "mosaic-32",
            "method": "ps_mt",
            "seed": 4,
            "set": {"draw": 0, "method_args": {"decay": 0.5, "ramp_epochs": 1.0}},
            "override": [{"method_args": {"decay": 0.6}}],
        }
    )
    assert (config.draw, config.seed) == (0, 4)
    assert config.method_args == {"decay": 0.6, "ramp_epochs": 1.0}


def test_all_methods_with_all_their_presets():
    configs = expand({"protocol": "mosaic-32", "method": "all", "preset": "all"})
    wanted = [(name, preset) for name, kind in METHODS.items() for preset in kind.presets]
    assert [(c.method, c.preset) for c in configs] == wanted


def test_of_blocks_that_overlap_each_run_is_there_once(file):
    assert len(read(file([GRID, {**GRID, "seed": [1, 2]}]))) == 3


WRONG = {
    "not YAML": "protocol: [mosaic-32",
    "no mapping: give protocol": "supervised",
    "asks for no run": [],
    "unknown key 'sed': choose from protocol": {**GRID, "sed": 1},
    "unknown key 'labeled': choose from protocol, method, preset, seed, set, override (": {
        **GRID,
        "labeled": 16,
    },
    "method is missing": {"protocol": "mosaic-32"},
    "protocol='mosaic-33': choose": {**GRID, "protocol": "mosaic-33"},
    "method='nope': choose all or from supervised": {**GRID, "method": ["supervised", "nope"]},
    "preset='nope': supervised has paper": {**GRID, "preset": "nope"},
    "seed='one': give one int": {**GRID, "seed": ["one"]},
    "seed=[]: give one int": {**GRID, "seed": []},
    "set has unknown option 'epoch'": {**GRID, "set": {"epoch": 3}},
    "override has unknown option 'seed' (it is a key of its own)": {
        **GRID,
        "override": [{"seed": 1}],
    },
    "override={'lr': 1}: give a list": {**GRID, "override": {"lr": 1}},
    "epochs=0: choose 1 or more": {**GRID, "set": {"epochs": 0}},
    "block 2: seed=-1: choose 0 or more": [GRID, {**GRID, "seed": -1, "set": {"draw": 0}}],
}


@pytest.mark.parametrize("words", WRONG)
def test_a_bad_file_is_refused_in_one_line_that_names_it(words, file, refused, tmp_path):
    error = refused("grid", file(WRONG[words]), "--out", tmp_path / "runs")
    assert "grid.yaml" in error and words in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--budget", "9", "give a time such as 90s, 9m"),
        ("--time", "h", "give a time such as 90s, 9m"),
        ("--retries", "-1", "retries=-1"),
        ("--nodes", "2", "needs --engine slurm"),
        ("--engine", "cloud", "slurm"),
    ],
)
def test_bad_options_are_refused(option, value, words, file, refused, tmp_path):
    assert words in refused("grid", file(GRID), "--out", tmp_path / "runs", option, value)


def test_what_could_not_be_trained_is_refused_before_anything_is(file, refused, tmp_path):
    bad = {**GRID, "override": [{}, {"net": "nope"}]}
    assert "nope" in refused("grid", file(bad), "--out", tmp_path / "runs")
    assert not list(tmp_path.glob("runs/*"))


def test_help_explains_the_file(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["grid", "--help"])
    printed = capsys.readouterr().out
    assert not stop.value.code
    for words in (
        "seed: [0, 1, 2]",
        "override:",
        "--budget",
        "--engine",
        "--partition",
        "Exit code",
    ):
        assert words in printed


def test_times_are_written_as_people_write_them():
    assert [seconds("budget", t) for t in ("90s", "9m", "1h30m", "1.5h")] == [90, 540, 5400, 5400]


GRIDS = ROOT / "book" / "grids"


@pytest.mark.parametrize("method", ["gta_seg", "ps_mt", "dual_teacher"])
def test_the_grid_of_changes_has_each_hyper_parameter_of_a_released_program_alone(method):
    usual = protocol("mosaic-32", method=method).method_args.items()
    grid = [c for c in read(GRIDS / "mosaic-changes.yaml") if c.method == method]
    changes = [dict(c.method_args.items() - usual) for c in grid if c.preset == "paper"]
    companions = {"warmup_epochs", "buffers", "period"}  # what some other change cannot do without
    for key, value in METHODS[method].presets["code"].items():
        if key != "buffers":
            alone = [c for c in changes if c.get(key) == value and c.keys() <= {key} | companions]
            assert alone, key


@pytest.mark.parametrize("name", ["camvid", "camvid-quick", "mosaic", "mosaic-rules"])
def test_the_grids_of_the_book_are_valid(name):
    configs = read(GRIDS / f"{name}.yaml")
    assert {c.draw for c in configs} == {c.seed for c in configs} == {0, 1, 2}
    if name == "mosaic-rules":
        assert len({c.split for c in configs}) == 3 and len(configs) == 9
        return
    assert {c.method for c in configs} == set(METHODS)
    assert len({c.labeled for c in configs}) == 2
    assert len(configs) == 6 * len(METHODS)


# ---------------------------------------------------------------- the plan


def test_a_dry_run_says_what_is_to_be_done_and_how_long_and_touches_nothing(
    file, tmp_path, tiny, trained_run, capsys
):
    out = tmp_path / "runs"
    path = file({**GRID, "method": ["supervised", "mean_teacher"], "seed": [0, 1, 2]})
    configs = {(c.method, c.draw): c for c in read(path)}
    fit(configs["supervised", 0], out=out)
    half = RunFolder(out, configs["supervised", 1])
    half.path.mkdir()
    half.log({"kind": "train", "step": 3, "of": 6})
    half.checkpoint.touch()
    record = RunFolder(out, configs["supervised", 0]).record()
    RunFolder(out, configs["supervised", 0]).write_record({**record, "seconds": 7200})
    before = sorted(tmp_path.rglob("*"))
    arguments = ["grid", str(path), "--out", str(out), "--dry_run", "--gpus_per_node", "0"]
    assert main(arguments) == 0
    assert sorted(tmp_path.rglob("*")) == before
    *lines, summary = capsys.readouterr().out.splitlines()
    states = [line.split(maxsplit=1)[1] for line in lines]
    wanted = ["recorded", "half done (50 %) 1.00 h", "to train 2.00 h", *3 * ["to train unknown"]]
    assert [" ".join(state.split()) for state in states] == wanted
    assert summary == (
        "6 runs: 1 recorded, 1 half done, 4 to train; "
        "about 3.00 h of training and 3 of unknown length"
    )


def test_hours_come_from_equal_runs_else_from_epochs_of_the_same_kind(tiny, trained_run):
    record = json.loads((trained_run / "record.json").read_text()) | {"seconds": 3600}
    config = tiny(method="mean_teacher", draw=1, seed=1)
    estimate = Estimate([record], cpu=True, processes=1)
    assert estimate(config) == 1
    assert estimate(replace(config, epochs=6, lr=0.1)) == 3
    assert estimate(replace(config, net="light")) is None
    assert estimate(replace(config, method="supervised")) is None
    assert Estimate([record], cpu=False, processes=1)(config) is None
    assert Estimate([record], cpu=True, processes=2)(config) is None


# ---------------------------------------------------------------- the queue


class Scripted:
    """An engine that trains in this process, except that it fails as often as it is told."""

    pause, detached = 0.0, False

    def __init__(self, out: Path, failures: dict[str, int], slots: int = 9):
        self.out, self.failures, self.slots = out, failures, slots
        self.started: list[str] = []
        self.stopped: list[str] = []

    def start(self, configs, running):
        free = configs[: self.slots - len(running)]
        for config in free:
            self.started.append(config.run_id)
            self.failures[config.run_id] = self.failures.get(config.run_id, 0) - 1
            if self.failures[config.run_id] < 0:
                fit(config, out=self.out, resume=True, wait=True)
        return [runs.Done(config) for config in free]

    def stop(self, workers, patience):
        self.stopped += [worker.config.run_id for worker in workers]


def test_what_fails_is_tried_again_a_bounded_number_of_times_and_the_others_go_on(tiny, tmp_path):
    configs = [tiny(epochs=1, draw=d) for d in range(3)]
    names = [config.run_id for config in configs]
    engine = Scripted(tmp_path, {names[0]: 99, names[1]: 2})
    found, failed = runs.work(configs, tmp_path, engine, retries=2)
    assert set(found) == set(names[1:]) and failed == configs[:1]
    assert [engine.started.count(name) for name in names] == [3, 3, 1]


def test_of_runs_that_somebody_else_trains_none_is_started(tiny, tmp_path):
    mine, other = (tiny(epochs=1, draw=d) for d in range(2))
    engine = Scripted(tmp_path, {})
    with RunFolder(tmp_path, other).locked(wait=False):
        until = time.monotonic() + 1
        found, failed = runs.work([other, mine], tmp_path, engine, deadline=until)
    assert engine.started == [mine.run_id] == list(found) and not failed


def test_what_older_code_recorded_is_kept_unless_asked_otherwise(tiny, tmp_path):
    config = tiny(epochs=1)
    record = fit(config, out=tmp_path)
    RunFolder(tmp_path, config).write_record({**record, "method_source": "older"})
    engine = Scripted(tmp_path, {})
    assert runs.work([config], tmp_path, engine)[0][config.run_id]["method_source"] == "older"
    assert not engine.started
    runs.forget_stale(config, tmp_path)
    found, _ = runs.work([config], tmp_path, engine, retrain=True)
    assert found[config.run_id]["method_source"] == record["method_source"]


# ---------------------------------------------------------------- processes


def grid_process(path: Path, out: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "s4lib", "grid", str(path), "--out", str(out)]
    return subprocess.Popen([*command, *options], stderr=subprocess.DEVNULL)


def assert_each_trained_once(path: Path, out: Path) -> None:
    """Every run has a record, and no step is in its log of losses twice or missing."""
    for config in read(path):
        folder = RunFolder(out, config)
        lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
        steps = [line["step"] for line in lines if line["kind"] == "train"]
        assert steps == list(range(10, lines[-1]["of"] + 1, 10))
        assert folder.record()["config"] == config.to_dict()


def kill_and_go_on(path: Path, out: Path, kills: int) -> None:
    """kill -9 of the grid, every third time as it starts, else at a random step; let it end."""
    chance, recorded = random.Random(0), {}
    folders = [RunFolder(out, config) for config in read(path)]
    for number in range(1, kills + 1):
        process = grid_process(path, out, "--slots", "2")
        goal = sum(f.steps()[0] for f in folders) + chance.randint(1, 40)
        pause, until = time.monotonic() + chance.uniform(0, 8), time.monotonic() + 120
        try:
            while (
                time.monotonic() < pause
                if number % 3 == 0
                else sum(f.steps()[0] for f in folders) < goal
            ):
                assert process.poll() is None and time.monotonic() < until
                time.sleep(0.01)
        finally:
            process.kill()
        assert process.wait() == -signal.SIGKILL
        assert all(r.stat().st_mtime_ns == before for r, before in recorded.items())
        recorded = {r: r.stat().st_mtime_ns for r in out.glob("*/record.json")}
    assert main(["grid", str(path), "--out", str(out), "--slots", "2"]) == 0
    assert all(r.stat().st_mtime_ns == before for r, before in recorded.items())
    assert_each_trained_once(path, out)


@pytest.mark.slow
def test_a_grid_that_is_killed_leaves_no_process_and_is_gone_on_with(file, tmp_path):
    path, out = (
        file({**GRID, "seed": 0, "set": {**TINY, "epochs": 30, "eval_every": 15}}),
        tmp_path,
    )
    (config,) = read(path)
    kill_and_go_on(path, out, 1)
    assert "stopped at step" in RunFolder(out, config).output.read_text()
    again = fit(config, out=tmp_path / "undisturbed")
    assert RunFolder(out, config).record()["networks"] == again["networks"]


@pytest.mark.slow
def test_a_grid_that_is_killed_ten_times_loses_and_repeats_nothing(file, tmp_path):
    some = {**TINY, "epochs": 20, "eval_every": 10}
    path = file({**GRID, "method": ["supervised", "mean_teacher"], "seed": [0, 1, 2], "set": some})
    kill_and_go_on(path, tmp_path / "runs", 10)


@pytest.mark.slow
def test_a_budget_ends_in_time_with_checkpoints(file, tmp_path):
    path, out = file({**GRID, "set": {**TINY, "epochs": 5000}}), tmp_path / "runs"
    begun = time.monotonic()
    process = grid_process(path, out, "--budget", "40s", "--slots", "2")
    assert process.wait() == 3
    assert 25 < time.monotonic() - begun < 50
    for config in read(path):
        folder = RunFolder(out, config)
        assert folder.checkpoint.exists() and not folder.busy()
        assert "stopped at step" in folder.output.read_text()


@pytest.mark.slow
def test_a_run_in_two_processes_whose_worker_fails_is_reported(file, tmp_path, capfd):
    path = file({**GRID, "override": [{}, {"labeled": 6, "batch": 3}]})  # 3 images in 2 ranks
    options = ["--gpus_per_node", "2", "--retries", "1", "--slots", "1"]
    assert main(["grid", str(path), "--out", str(tmp_path / "runs"), *options]) == 1
    said = capfd.readouterr().out
    assert said.count("failed: ") == 2 and "2 of 4 runs recorded, 2 failed" in said
    assert said.count("ValueError: batch=3: choose a multiple of the 2 ranks") == 2
    with contextlib.suppress(StopIteration):
        record = next((tmp_path / "runs").glob("*/record.json"))
        assert json.loads(record.read_text())["world_size"] == 2
