"""`s4 renew FILE`: records made by older code stay valid if the new code gives the same numbers.

Most changes of the core are meant to change no number: a faster loader, a new option. Rather than
train everything again after each, one run of each method and preset is repeated and compared.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch

from . import records
from .build import method_source
from .config import Config
from .trainer import fit


def renew(
    file: Path, jobs: int = 1, data_root: str = "", say: Callable[[str], None] = print
) -> list[str]:
    """Repeat one stale record of each method and preset in `file`; if all its numbers come out the
    same, they all get the present fingerprint, and `renewed` says by which repetition.

    The file is rewritten after each comparison, so that an interrupted renewal can go on. Numbers
    are equal to the last digit or not at all, which they are only on a machine and with versions
    like those of the record.

    Args:
        data_root: where the dataset of these records lies; mosaic needs none.

    Returns:
        a line for each group whose numbers changed; its records are left as they were, stale.
    """
    found = records.load(file)
    stale = sorted(filter(records.stale, found), key=_group)
    groups = [list(group) for _, group in itertools.groupby(stale, _group)]
    say(f"{file}: {len(found)} records, {len(stale)} stale, {len(groups)} runs to repeat")
    changed = []
    with ProcessPoolExecutor(jobs, get_context("spawn"), _one_thread) as pool:
        shortest = [min(group, key=lambda record: record["seconds"]) for group in groups]
        waiting = {pool.submit(_repeat, old, data_root): i for i, old in enumerate(shortest)}
        for done in as_completed(waiting):
            group, old, new = groups[waiting[done]], shortest[waiting[done]], done.result()
            before, after = records.score(old), records.score(new)
            if any(old[key] != new[key] for key in ("networks", "split_sha256", "steps")):
                changed.append(f"{old['run_id']}: {before:.2f} mIoU became {after:.2f}")
                say(f"changed  {changed[-1]}; its {len(group)} records stay stale")
                continue
            for record in group:
                record["renewed"] = {
                    "by": old["run_id"],
                    "commit": new["commit"],
                    "from": record["method_source"],
                }
                record["method_source"] = _source(record)
            records.save(found, file)
            say(f"same     {old['run_id']}: {before:.2f} mIoU, renews {len(group)} records")
    return changed


def _group(record: dict) -> tuple[str, ...]:
    config = record["config"]
    return config["protocol"], config["method"], config["preset"], record["method_source"]


def _repeat(record: dict, data_root: str) -> dict:
    config = replace(Config.from_dict(record["config"]), data_root=data_root)
    with tempfile.TemporaryDirectory() as out:
        new = fit(config, out=out)
    return json.loads(json.dumps(new))  # as it would be read from a file


def _source(record: dict) -> str:
    return method_source(record["config"]["method"], record["config"]["dataset"])


def _one_thread() -> None:
    torch.set_num_threads(1)
