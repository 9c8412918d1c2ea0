"""Published lists of labeled images: known by hash, imported from clones, never shipped.

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
import tarfile
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pooch

from ..progress import Progress

URL = "https://raw.githubusercontent.com"
IDS = {
    "voc": re.compile(r"(?<!\w)\d{4}_\d{6}(?!\d)"),
    "cityscapes": re.compile(r"(?<![a-z])[a-z]+_\d{6}_\d{6}"),
}
NAMED = {"voc": ("pascal", "voc"), "cityscapes": ("cityscapes", "city")}  # in paths of clones
LABELED = re.compile(r"(?<!un)(labeled|supervised)")
UNLABELED = re.compile(r"un(labeled|supervised)")
NEAR = 20  # ids by which a list may differ from a known one and still be called near


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
        raise ValueError(f"split={name!r}: no list {name}.txt in {places[0]}; {_one_of(valid)}")
    try:
        ids = image_ids(path.read_text("utf8"), dataset)
        others = path.with_name(f"{name}.unlabeled.txt")
        others = image_ids(others.read_text("utf8"), dataset) if others.is_file() else None
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from error
    if expected and sha256(ids) != expected.sha256:
        raise ValueError(f"{path}: altered, {_expected([expected], ids)}")
    return ids, others


def _one_of(valid: list[str]) -> str:
    return f"choose one of {', '.join(valid)}"


def collect(
    source: Path, dataset: str, into: Path, allow_unknown: bool = False
) -> tuple[dict[str, str], dict[str, str]]:
    """Import the lists of a clone, or of a tarball in it: ({path: name}, {path: why refused}).

    Files called *labeled* or *supervised* are lists of labels; their partner's name has *unlabeled*
    or *unsupervised* instead. Others are looked at only if their hash is known (val, all). With
    both, labeled and unlabeled must be disjoint and together the dataset's training images.

    Args:
        into: folder that gets DATASET/NAME.txt, sorted ids.
        allow_unknown: take lists of unknown hash too, named after their path.

    Raises:
        ValueError: no such place, or no list of the dataset in it.
    """
    texts = {path: text for path, text in _texts(source).items() if _is_of(dataset, path, text)}
    taken: dict[str, str] = {}
    refused: dict[str, str] = {}
    lists: dict[str, list[str]] = {}
    near = _stored(dataset, into)
    for path, text in texts.items():
        labels = LABELED.search(Path(path).name)
        if not labels and UNLABELED.sub(r"\1", path) in texts.keys() - {path}:
            continue  # looked at with its partner
        try:
            ids = image_ids(text, dataset)
        except ValueError as error:
            if labels:
                refused[path] = str(error)
            continue
        found = known(dataset, ids)
        if found:
            near[found.name] = ids
        if found or labels:
            lists[path] = ids
    for path, ids in lists.items():
        try:
            taken[path] = _import(path, ids, texts, dataset, into, allow_unknown, near)
        except ValueError as error:
            refused[path] = str(error)
    if not taken and not refused:
        shippers = sorted({s.split(":")[0] for p in published(dataset) for s in p.shipped_by})
        expected = f", such as a clone of {', '.join(shippers)}" if shippers else " (*labeled*.txt)"
        raise ValueError(f"{source}: no list of {dataset} images in it; expected some{expected}")
    return taken, refused


def _import(
    path: str,
    ids: list[str],
    texts: dict[str, str],
    dataset: str,
    into: Path,
    allow_unknown: bool,
    near: dict[str, list[str]],
) -> str:
    """Write one list; returns its name."""
    found = known(dataset, ids)
    if found and found.role == "whole":
        return write(into / dataset, found.name, ids)
    name = found.name if found else "-".join(Path(path).with_suffix("").parts)
    partner = str(Path(path).with_name(LABELED.sub(r"un\1", Path(path).name)))
    others = None
    if partner != path and partner in texts:
        try:
            others = image_ids(texts[partner], dataset)
        except ValueError as error:
            raise ValueError(f"{name}: {partner}: {error}") from error
        both = sorted(set(ids) & set(others))
        if both:
            count = f"{len(both)} image is" if len(both) == 1 else f"{len(both)} images are"
            raise ValueError(f"{name}: {count} both labeled and unlabeled, first {both[0]}")
    if not found:
        if not allow_unknown:
            raise ValueError(_why_unknown(dataset, path, ids, near))
        return write(into / dataset, name, ids, others)
    whole = next(p for p in published(dataset) if p.name == "all")
    if others is not None and sha256([*ids, *others]) != whole.sha256:
        raise ValueError(
            f"{name}: labeled and unlabeled are {len(ids) + len(others)} images together, but not "
            f"the {whole.images} of {dataset} train ({_expected([whole], [*ids, *others])})"
        )
    return write(into / dataset, name, ids)


def write(folder: Path, name: str, ids: list[str], others: list[str] | None = None) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.txt").write_text(_text(ids))
    if others is not None:
        (folder / f"{name}.unlabeled.txt").write_text(_text(others))
    return name


def _stored(dataset: str, into: Path) -> dict[str, list[str]]:
    """Known lists that are imported already, by name."""
    paths = ((p.name, into / dataset / f"{p.name}.txt") for p in published(dataset))
    return {name: path.read_text().split() for name, path in paths if path.is_file()}


def _is_of(dataset: str, path: str, text: str) -> bool:
    """Whether a file lists images of the dataset; an empty one, whether its path says so."""
    if dataset not in IDS:
        return "labeled" in Path(path).name
    if not text.strip():
        return any(word in path.lower() for word in NAMED[dataset])
    return IDS[dataset].search(text) is not None


def _expected(candidates: Iterable[Published], ids: Iterable[str]) -> str:
    hashes = ", ".join(f"{p.sha256[:12]} ({p.name})" for p in candidates)
    return f"SHA-256 of the sorted ids is {sha256(ids)[:12]}, expected {hashes}"


def _why_unknown(dataset: str, path: str, ids: list[str], near: dict[str, list[str]]) -> str:
    """What an unknown list should have been: the nearest at hand, else by path, else by number."""
    differences = {name: set(ids) ^ set(other) for name, other in near.items()}
    name = min(differences, key=lambda name: len(differences[name]), default="")
    if name and len(differences[name]) <= NEAR:
        only = {"lacks": set(near[name]) - set(ids), "adds": set(ids) - set(near[name])}
        parts = [
            f"{verb} {min(some)}" + (f" and {len(some) - 1} others" if len(some) > 1 else "")
            for verb, some in only.items()
            if some
        ]
        return f"unknown: {name}, but {' and '.join(parts)} (--allow-unknown takes it)"
    labeled = [p for p in published(dataset) if p.role == "labeled"]
    place = f"/{Path(path).with_suffix('')}/"
    named = [p for p in labeled if any(f"/{s.split(':')[1]}/" in place for s in p.shipped_by)]
    same = named or [p for p in labeled if p.images == len(ids)]
    if not same:
        return f"unknown: no published list has {len(ids)} images (--allow-unknown takes it)"
    return f"unknown: {_expected(same, ids)} (--allow-unknown takes it)"


def download(dataset: str, names: Iterable[str], into: Path) -> list[str]:
    """Fetch published lists from the repositories that ship them; returns the names.

    Raises:
        ValueError: unknown name, no connection, or a file that is not the published list.
    """
    wanted = {p.name: p for p in published(dataset)}
    names = list(names) or list(wanted)
    unknown = [name for name in names if name not in wanted]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no published list: {_one_of(list(wanted))}")
    bar = Progress("download", len(names))
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(names, 1):
            url = f"{URL}/{wanted[name].download}"
            try:
                pooch.HTTPDownloader(timeout=30, stream=False)(url, f"{folder}/{name}", None)
                ids = image_ids(Path(folder, name).read_text("utf8", errors="replace"), dataset)
            except (OSError, ValueError) as error:
                raise ValueError(f"{url}: {' '.join(str(error).split())[:160]}") from error
            if sha256(ids) != wanted[name].sha256:
                raise ValueError(f"{url}: another list, {_expected([wanted[name]], ids)}")
            write(into / dataset, name, ids)
            bar.update(number, name)
    bar.close()
    return names


def _texts(source: Path) -> dict[str, str]:
    """{path within `source`: text} of all .txt files, in .tar.gz archives too."""
    if not source.exists():
        raise ValueError(f"{source}: no such file or folder")
    inside = source if source.is_dir() else source.parent
    files = sorted(source.rglob("*")) if source.is_dir() else [source]
    texts = {}
    for file in files:
        name = file.relative_to(inside).as_posix()
        if file.suffix == ".txt" and file.is_file():
            texts[name] = file.read_text("utf8", errors="replace")
        elif file.name.endswith((".tar.gz", ".tgz")):
            try:
                with tarfile.open(file) as archive:  # read in memory: nothing is unpacked
                    for member in archive:
                        if member.isfile() and member.name.endswith(".txt"):
                            text = archive.extractfile(member).read().decode("utf8", "replace")
                            texts[f"{name}/{member.name}"] = text
            except (tarfile.TarError, EOFError, OSError) as error:
                what = str(error).splitlines()[0]
                raise ValueError(f"{file}: not a readable archive ({what})") from error
    return texts
