"""Published lists of labeled images: known by hash, imported (`importing`), never shipped.

`published.csv` holds what is known of each list: a name (family and number of images), the SHA-256
of its sorted ids, one per line, who ships exactly this set, and where it can be downloaded. The
families differ: of 662 labels, 93 are finely annotated in cps-662 and all in u2pl-662. An imported
list lies as NAME.txt in DATA_ROOT/splits/DATASET or in the user's cache; `sha256sum` of that file
is the published hash.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pooch

IDS = {
    "voc": re.compile(r"(?<!\w)\d{4}_\d{6}(?!\d)"),
    "cityscapes": re.compile(r"(?<![a-z])[a-z]+_\d{6}_\d{6}"),
}


@dataclass(frozen=True)
class Published:
    """What is known of one list; `role` is "labeled", or "whole" for a complete part."""

    dataset: str
    name: str
    role: str
    images: int
    sha256: str
    download: str
    shipped_by: tuple[str, ...]


@functools.cache
def published(dataset: str) -> tuple[Published, ...]:
    """The known lists of a dataset."""
    with open(Path(__file__).with_name("published.csv"), newline="") as file:
        return tuple(
            Published(
                **{
                    **row,
                    "images": int(row["images"]),
                    "shipped_by": tuple(row["shipped_by"].split()),
                }
            )
            for row in csv.DictReader(file)
            if row["dataset"] == dataset
        )


def known(dataset: str, ids: Iterable[str]) -> Published | None:
    """The published list with exactly these ids."""
    digest = sha256(ids)
    return next((p for p in published(dataset) if p.sha256 == digest), None)


def sha256(ids: Iterable[str]) -> str:
    """Of the sorted ids, one per line: the order of a file does not matter."""
    return hashlib.sha256(_text(ids).encode()).hexdigest()


def _text(ids: Iterable[str]) -> str:
    return "".join(f"{one}\n" for one in sorted(ids))


def image_ids(text: str, dataset: str) -> list[str]:
    """The ids of a list, whose lines are ids or paths that contain them.

    Raises:
        ValueError: empty, a line without an id, or an id twice.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError("empty")
    found: dict[str, None] = {}
    for line in lines:
        match = IDS[dataset].search(line) if dataset in IDS else None
        if dataset in IDS and not match:
            raise ValueError(f"{line[:60]!r} holds no {dataset} image id")
        one = match[0] if match else line
        if one in found:
            raise ValueError(f"{one} is listed twice")
        found[one] = None
    return list(found)


def folders(dataset: str, root: str) -> list[Path]:
    """Where lists of a dataset are looked for."""
    places = [Path(root, "splits")] if root else []
    return [place / dataset for place in [*places, Path(pooch.os_cache("s4book"), "splits")]]


def read(
    dataset: str, name: str, root: str, rules: tuple[str, ...] = ()
) -> tuple[list[str], list[str] | None]:
    """(labeled, unlabeled) ids of an imported list; unlabeled None means all other images.

    Raises:
        ValueError: not imported, or altered since; says how to import it, or what is valid.
    """
    expected = next((p for p in published(dataset) if p.name == name), None)
    places = folders(dataset, root)
    path = next((p for p in (place / f"{name}.txt" for place in places) if p.is_file()), None)
    if path is None and expected:
        raise ValueError(
            f"split={name!r}: published, but not imported into {places[0]}; "
            f"`s4 data splits --dataset {dataset} --from CLONE` (or --download) does that"
        )
    if path is None:
        valid = [*rules, *(p.name for p in published(dataset) if p.role == "labeled")]
        raise ValueError(
            f"split={name!r}: no list {name}.txt in {places[0]}; choose one of {', '.join(valid)}"
        )
    try:
        ids = image_ids(path.read_text("utf8"), dataset)
        others = path.with_name(f"{name}.unlabeled.txt")
        others = image_ids(others.read_text("utf8"), dataset) if others.is_file() else None
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from error
    if expected and sha256(ids) != expected.sha256:
        raise ValueError(f"{path}: altered, {mismatch([expected], ids)}")
    return ids, others


def write(folder: Path, name: str, ids: list[str], others: list[str] | None = None) -> str:
    """Store a list, and the unlabeled images where these are not all others; returns its name."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.txt").write_text(_text(ids))
    if others is not None:
        (folder / f"{name}.unlabeled.txt").write_text(_text(others))
    return name


def mismatch(candidates: Iterable[Published], ids: Iterable[str]) -> str:
    """In words: the hash of some ids, and those that it should have been one of."""
    hashes = ", ".join(f"{p.sha256[:12]} ({p.name})" for p in candidates)
    return f"SHA-256 of the sorted ids is {sha256(ids)[:12]}, expected {hashes}"
