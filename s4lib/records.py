"""Records of finished runs: read, compare within a label draw, say what the data carry."""

from __future__ import annotations

import functools
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import torch

from .config import Config
from .run_folder import write_atomically

HERE = Path(__file__).resolve().parent.parent
RUNS = Path(
    os.environ.get("S4_RUNS") or (HERE / "runs" if (HERE / "notebooks").is_dir() else "runs")
)
COMMITTED = HERE / "book" / "records"
KIND = ("protocol", "method", "preset")  # records that differ in these are of different settings


def load(*places: str | Path) -> list[dict]:
    """Records from .jsonl files and folders of them or of runs; of equal run ids, the last.

    Raises:
        ValueError: a line that is not a record; names file and line.
    """
    found: dict[str, dict] = {}
    for place in map(Path, places):
        files = (
            [place]
            if place.is_file()
            else sorted([*place.glob("*.jsonl"), *place.glob("*/record.json")])
        )
        for file in files:
            for number, line in enumerate(file.read_text().splitlines(), 1):
                try:
                    record = json.loads(line)
                    found[record["run_id"]] = record
                except (json.JSONDecodeError, KeyError, TypeError):
                    raise ValueError(f"{file}, line {number}: not a record") from None
    return list(found.values())


def save(records: Iterable[dict], file: Path) -> None:
    """Write a .jsonl file, whole or not at all, without where the data lay. Raises OSError."""
    kept = [{**record, "config": {**record["config"], "data_root": ""}} for record in records]
    text = "".join(f"{json.dumps(record)}\n" for record in kept)
    write_atomically(file, lambda output: output.write(text.encode()))


def setting(config: Config) -> str:
    """A hash that is equal for configs which differ in draw and seed only."""
    return replace(config, draw=0, seed=0).hash


def like(records: Iterable[dict], config: Config) -> list[dict]:
    """The records whose config differs from `config` in draw and seed only; of equals, the last."""
    kind, wanted = {key: getattr(config, key) for key in KIND}, setting(config)
    near = (r for r in records if all(r["config"].get(k, v) == v for k, v in kind.items()))
    found = {r["run_id"]: r for r in near if setting(Config.from_dict(r["config"])) == wanted}
    return sorted(found.values(), key=lambda r: (r["config"]["draw"], r["config"]["seed"]))


def surroundings(device: torch.device) -> dict:
    """What a result may depend on and a config does not say: device, versions, commit, time."""
    cuda = device.type == "cuda"
    versions = {name: metadata.version(name) for name in ("torch", "torchvision", "timm", "numpy")}
    return {
        "device": torch.cuda.get_device_name(device)
        if cuda
        else f"CPU, {torch.get_num_threads()} thread(s)",
        "versions": {"python": platform.python_version(), **versions},
        "commit": commit(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


@functools.cache
def commit() -> str:
    """Short commit of this checkout, with a + if files differ from it; "" outside a checkout."""
    git = functools.partial(subprocess.run, cwd=HERE, capture_output=True, text=True)
    try:
        name = git(["git", "rev-parse", "--short", "HEAD"])
        changed = git(["git", "status", "--porcelain", "--untracked-files=no"])
    except OSError:
        return ""
    if name.returncode:
        return ""
    return name.stdout.strip() + "+" * bool(changed.stdout.strip())


def score(record: dict, network: str = "", when: str = "last") -> float:
    """mIoU in % of a network (by default the deployed), at the last or best evaluation."""
    return record["networks"][network or record["deployed"]][when]["miou"]


@dataclass(frozen=True)
class Summary:
    """Mean of n values, with sample standard deviation."""

    mean: float
    std: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.1f} ± {self.std:.1f}" if self.n > 1 else f"{self.mean:.1f}"


def summary(values: Iterable[float]) -> Summary:
    values = list(values)
    mean = sum(values) / len(values)
    std = (
        math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
        if len(values) > 1
        else math.nan
    )
    return Summary(mean, std, len(values))


@dataclass(frozen=True)
class Difference:
    """Paired difference of two methods in mIoU points, with a confidence interval of the mean."""

    mean: float
    low: float
    high: float
    values: tuple[float, ...]

    @property
    def verdict(self) -> str:
        """ "better", "worse", or, where the interval holds zero, "not distinguishable"."""
        if not self.low <= 0 <= self.high and len(self.values) > 1:
            return "better" if self.mean > 0 else "worse"
        return "not distinguishable"

    def __str__(self) -> str:
        if len(self.values) < 2:
            return f"{self.mean:+z.1f} (one pair, no interval)"
        return f"{self.mean:+z.1f} [{self.low:+z.1f}, {self.high:+z.1f}]"


def paired(
    ours: Iterable[dict],
    base: Iterable[dict],
    level: float = 0.95,
    value: Callable[[dict], float] = score,
) -> Difference:
    """Difference ours - base within each common (draw, seed), and its Student-t interval.

    Raises:
        ValueError: no draw and seed in common, or more than one record for the same draw and seed.
    """
    sides = [_by_draw(records) for records in (ours, base)]
    common = sorted(sides[0].keys() & sides[1].keys())
    if not common:
        raise ValueError("no label draw and seed that both methods were run with")
    return difference([value(sides[0][key]) - value(sides[1][key]) for key in common], level)


def difference(values: Iterable[float], level: float = 0.95) -> Difference:
    """Of paired differences, one or more: their mean and its Student-t interval."""
    from scipy import stats

    s = summary(values := tuple(values))
    half = stats.t.ppf((1 + level) / 2, s.n - 1) * s.std / math.sqrt(s.n) if s.n > 1 else math.nan
    return Difference(s.mean, s.mean - half, s.mean + half, values)


def _by_draw(records: Iterable[dict]) -> dict[tuple[int, int], dict]:
    found = {}
    for record in records:
        key = record["config"]["draw"], record["config"]["seed"]
        if key in found:
            raise ValueError(
                f"two records for draw {key[0]}, seed {key[1]}: select one method and setting first"
            )
        found[key] = record
    return found


def stale(record: dict) -> bool:
    """True if code that decides its numbers has changed since the record was made."""
    from .build import method_source

    config = record["config"]
    return record["method_source"] != method_source(config["method"], config["dataset"])
