"""`s4 grid FILE.yaml`: many runs from one file, on this machine or a Slurm cluster."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from argparse import RawDescriptionHelpFormatter
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path

import torch
import yaml

from . import records
from .config import Config
from .interrupts import interruptible
from .methods import METHODS
from .parser import Parser
from .protocols import protocol
from .run_folder import RunFolder
from .runs import Local, Overview, check, recorded, work

TEXT = """\
Train all runs that a YAML file asks for. What is recorded is skipped, what is half done is resumed,
what failed is tried again; so the same command goes on after whatever happened.

  protocol: mosaic-32               # or a list; `s4 protocols`
  method: [supervised, gta_seg]     # or all; `s4 methods`
  preset: paper                     # or a list, or all that the method has
  seed: [0, 1, 2]                   # also the label draw, unless set or override say otherwise
  set: {data_root: data/CamVid}     # options of `s4 train` for every run
  override:                         # variants: options of `s4 train`, one mapping each
    - {labeled: 16}
    - {labeled: 32, method_args: {decay: 0.9}}

Runs are all combinations of protocol, override, method, preset and seed. A list of such mappings is
the union of theirs. Exit code: 0 all recorded, 1 something failed, 3 the budget is spent."""
AXES = ("protocol", "method", "preset", "seed")
KEYS = (*AXES, "set", "override")
OPTIONS = [f.name for f in fields(Config) if f.name not in AXES]  # of a run, under set or override
PACE = (  # options that decide how long an epoch takes
    "dataset size crop unlabeled eval_images eval_every evaluation net net_args method batch "
    "unlabeled_batch accumulate amp augment"
).split()


def main(arguments: list[str]) -> int:
    """Run `s4 grid ...`; returns the exit code.

    Raises:
        ValueError: bad input, in one line.
    """
    begun = time.monotonic()
    options = _options(arguments)
    configs = read(options.file)
    out = Path(options.out)
    known = {r["run_id"]: r for r in records.load(*options.records)}
    engine = _engine(options, out)
    plan, left = planned(configs, out, known, options)
    if options.dry_run:
        print(plan)
        return 0
    check(left)
    print(plan.splitlines()[-1])
    show = Overview(Path(options.file).stem, len(configs))
    deadline = begun + seconds("budget", options.budget) if options.budget else math.inf
    try:
        with interruptible():
            found, failed = work(
                configs,
                out,
                engine,
                known=known,
                retrain=options.retrain_stale,
                retries=options.retries,
                deadline=deadline,
                show=show,
            )
    except KeyboardInterrupt as stop:
        show.close("stopped")
        jobs = (
            f"; its jobs go on, `scancel --name {engine.name}` ends them" if engine.detached else ""
        )
        print(f"s4: stopped{jobs}; the same command goes on", file=sys.stderr)
        return 128 + (stop.args[0] if stop.args else 2)
    show.close("done" if len(found) == len(configs) else "")
    for config in failed:
        log = RunFolder(out, config).output
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        lines = [
            x for x in lines if re.match(r"(\[rank\d+\]: )?\w*(Error|Exception): ", x)
        ] or lines
        print(f"failed: {config.run_id}: {lines[-1] if lines else 'no message'} ({log})")
    unfinished = len(configs) - len(found) - len(failed)
    text = f"{len(found)} of {len(configs)} runs recorded, {len(failed)} failed"
    print(text + (f", {unfinished} left when the budget was spent" if unfinished else ""))
    return 1 if failed else 3 if unfinished else 0


def _options(arguments: list[str]):
    parser = Parser(prog="s4 grid", description=TEXT, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("file", help="YAML file of runs")
    parser.add_argument("--out", default="runs", help="folder of all runs")
    parser.add_argument("--dry_run", action="store_true", help="print the plan, train nothing")
    parser.add_argument("--budget", default="", help="time after which to stop: 9m, 1h30m, 2d")
    parser.add_argument("--retries", type=int, default=2, help="of a run that failed")
    parser.add_argument(
        "--retrain_stale", action="store_true", help="also train what older code has recorded"
    )
    parser.add_argument(
        "--records",
        nargs="*",
        default=[],
        help="folders or .jsonl files of records that will do, unless stale",
    )
    parser.add_argument("--engine", choices=["local", "slurm"], default="local")
    parser.add_argument(
        "--slots", type=int, default=0, help="runs at a time; 0: as many as GPUs or cores allow"
    )
    parser.add_argument(
        "--gpus_per_node",
        type=int,
        default=None,
        help="GPUs, and so processes, of a run on each node; by default 1, or 0 where none is",
    )
    parser.add_argument("--nodes", type=int, default=1, help="of a run (slurm)")
    parser.add_argument(
        "--time", default="4h", help="limit of a job, which may take several (slurm)"
    )
    parser.add_argument("--partition", default="", help="of the cluster (slurm)")
    parser.add_argument(
        "--slurm_args", type=dict, default={}, help="of submitit's executor, as JSON: account, mem"
    )
    options = parser.parse_args(arguments)
    if options.gpus_per_node is None:
        here = options.engine == "slurm" or torch.cuda.is_available()
        options.gpus_per_node = int(here)
    for name, least in (("retries", 0), ("slots", 0), ("gpus_per_node", 0), ("nodes", 1)):
        if options[name] < least:
            raise ValueError(f"{name}={options[name]}: choose {least} or more")
    seconds("time", options.time)
    return options


def _engine(options, out: Path):
    if options.engine == "local":
        if options.nodes > 1:
            raise ValueError(f"nodes={options.nodes}: more than one needs --engine slurm")
        return Local(out, options.gpus_per_node, options.slots, options.retrain_stale)
    from .slurm import Slurm

    return Slurm(
        out,
        nodes=options.nodes,
        gpus=options.gpus_per_node,
        slots=options.slots,
        minutes=max(1, round(seconds("time", options.time) / 60)),
        partition=options.partition,
        more=options.slurm_args,
        retrain=options.retrain_stale,
    )


def seconds(name: str, text: str) -> float:
    """Seconds of a time like 90s, 9m, 1h30m or 2d. Raises ValueError for another text."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([dhms])", text)
    if not parts or "".join(map("".join, parts)) != text:
        raise ValueError(f"{name}={text!r}: give a time such as 90s, 9m, 1h30m or 2d")
    return sum(float(n) * {"d": 86400, "h": 3600, "m": 60, "s": 1}[unit] for n, unit in parts)


# ---------------------------------------------------------------- the file


def read(path: str | Path) -> list[Config]:
    """The runs of a file, each once, in its order. Raises ValueError naming file and key."""
    try:
        given = yaml.safe_load(Path(path).read_text("utf8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    blocks = given if isinstance(given, list) else [given]
    found: dict[str, Config] = {}
    for number, block in enumerate(blocks, 1):
        try:
            found |= {config.run_id: config for config in expand(block)}
        except ValueError as error:
            where = f"{path}, block {number}" if len(blocks) > 1 else path
            raise ValueError(f"{where}: {error}") from None
    if not found:
        raise ValueError(f"{path}: asks for no run")
    return list(found.values())


def expand(block: dict) -> list[Config]:
    """All combinations that a mapping asks for. Raises ValueError naming the key."""
    if not isinstance(block, dict):
        raise ValueError(f"{block!r} is no mapping: give {', '.join(KEYS)}")
    for key in block:
        if key not in KEYS:
            own = " (options of a run go under set or override)" if key in OPTIONS else ""
            raise ValueError(f"unknown key {key!r}: choose from {', '.join(KEYS)}{own}")
    for key in ("protocol", "method"):
        if key not in block:
            raise ValueError(f"{key} is missing")
    common = _options_of("set", block.get("set") or {})
    variants = block.get("override", [{}])
    if not isinstance(variants, list) or not variants:
        raise ValueError(f"override={variants!r}: give a list of mappings")
    variants = [_options_of("override", variant or {}) for variant in variants]
    methods = list(METHODS) if block["method"] == "all" else _axis(block, "method", str)
    for name in methods:
        if name not in METHODS:
            raise ValueError(f"method={name!r}: choose all or from {', '.join(METHODS)}")
    return [
        protocol(name, method=method, preset=preset, **_merged(common, variant, seed))
        for name in _axis(block, "protocol", str)
        for variant in variants
        for method in methods
        for preset in _presets(block, method)
        for seed in _axis(block, "seed", int, [0])
    ]


def _axis(block: dict, key: str, kind: type, default: Sequence = ()) -> list:
    values = block.get(key, default)
    values = values if isinstance(values, list) else [values]
    wrong = [v for v in values if not isinstance(v, kind) or isinstance(v, bool)]
    if wrong or not values:
        raise ValueError(f"{key}={(wrong or [values])[0]!r}: give one {kind.__name__} or several")
    return values


def _presets(block: dict, method: str) -> list[str]:
    valid = METHODS[method].presets
    names = list(valid) if block.get("preset") == "all" else _axis(block, "preset", str, ["paper"])
    for name in names:
        if name not in valid:
            raise ValueError(f"preset={name!r}: {method} has {', '.join(valid)}")
    return names


def _options_of(key: str, values: dict) -> dict:
    if not isinstance(values, dict):
        raise ValueError(f"{key}={values!r}: give options of `s4 train` with their values")
    for name in values:
        if name not in OPTIONS:
            axis = " (it is a key of its own)" if name in AXES else ""
            raise ValueError(
                f"{key} has unknown option {name!r}{axis}: `s4 train --help` lists all"
            )
    return values


def _merged(common: dict, variant: dict, seed: int) -> dict:
    both = {"draw": seed, "seed": seed, **common, **variant}
    arguments = {**common.get("method_args", {}), **variant.get("method_args", {})}
    return {**both, **({"method_args": arguments} if arguments else {})}


# ---------------------------------------------------------------- the plan


def planned(
    configs: Sequence[Config], out: Path, known: dict[str, dict], options
) -> tuple[str, list[Config]]:
    """What is to be done, a line per run and one for all; and the runs that are not recorded."""
    processes = options.nodes * max(options.gpus_per_node, 1)
    measured = [*known.values(), *records.load(out, records.COMMITTED)]
    estimate = Estimate(measured, cpu=options.gpus_per_node == 0, processes=processes)
    lines, counts, left, total, unknown = [], defaultdict(int), [], 0.0, 0
    for config in configs:
        folder = RunFolder(out, config)
        done, of = folder.steps() if folder.checkpoint.exists() else (0, 1)
        record, hours = recorded(config, out, known, options.retrain_stale), None
        if record is not None:
            state = "recorded by older code" if records.stale(record) else "recorded"
        else:
            left.append(config)
            hours = estimate(config)
            unknown += hours is None
            if folder.record() is not None:
                state, done = "to train again", 0
            else:
                state = f"half done ({100 * done // of} %)" if done else "to train"
            state += ", running" * folder.busy()
            hours = None if hours is None else hours * (1 - done / of)
            total += hours or 0
        counts[state.partition(" (")[0].partition(",")[0]] += 1
        cost = "" if record is not None else "unknown" if hours is None else f"{hours:.2f} h"
        lines.append(f"{config.run_id:58} {state:24} {cost}".rstrip())
    summary = ", ".join(f"{count} {state}" for state, count in counts.items())
    times = [f"about {total:.2f} h of training"] if len(left) > unknown else []
    times += [f"{unknown} of unknown length"] if unknown else []
    text = " and ".join(times) or "nothing to do"
    return "\n".join([*lines, f"{len(configs)} runs: {summary}; {text}"]), left


class Estimate:
    """Hours that a run will take, from records of runs on the same kind and number of devices.

    First those that differ in draw and seed only, then those whose epochs should take as long.
    """

    def __init__(self, known: Iterable[dict], cpu: bool, processes: int):
        self.same, self.paces = defaultdict(list), defaultdict(list)
        for record in known:
            if record["device"].startswith("CPU") != cpu or record["world_size"] != processes:
                continue
            config = Config.from_dict(record["config"])
            self.same[records.setting(config)].append(record["seconds"])
            self.paces[_pace(config)].append(record["seconds"] / config.epochs)

    def __call__(self, config: Config) -> float | None:
        same = self.same.get(records.setting(config))
        pace = [s * config.epochs for s in self.paces.get(_pace(config), [])]
        found = same or pace
        return sum(found) / len(found) / 3600 if found else None


def _pace(config: Config) -> str:
    return json.dumps({key: config.to_dict()[key] for key in PACE}, sort_keys=True)
