"""Import published lists of labeled images: from clones of repositories, or from their servers."""

from __future__ import annotations

import re
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

import pooch

from ..progress import Progress
from . import lists

URL = "https://raw.githubusercontent.com"
NAMED = {"voc": ("pascal", "voc"), "cityscapes": ("cityscapes", "city")}  # in paths of clones
LABELED = re.compile(r"(?<!un)(labeled|supervised)")
UNLABELED = re.compile(r"un(labeled|supervised)")
NEAR = 20  # ids by which a list may differ from a known one and still be called near


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
    chosen: dict[str, list[str]] = {}
    near = _stored(dataset, into)
    for path, text in texts.items():
        labels = LABELED.search(Path(path).name)
        if not labels and UNLABELED.sub(r"\1", path) in texts.keys() - {path}:
            continue  # looked at with its partner
        try:
            ids = lists.image_ids(text, dataset)
        except ValueError as error:
            if labels:
                refused[path] = str(error)
            continue
        found = lists.known(dataset, ids)
        if found:
            near[found.name] = ids
        if found or labels:
            chosen[path] = ids
    for path, ids in chosen.items():
        try:
            taken[path] = _import(path, ids, texts, dataset, into, allow_unknown, near)
        except ValueError as error:
            refused[path] = str(error)
    if not taken and not refused:
        shippers = sorted({s.split(":")[0] for p in lists.published(dataset) for s in p.shipped_by})
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
    found = lists.known(dataset, ids)
    if found and found.role == "whole":
        return lists.write(into / dataset, found.name, ids)
    name = found.name if found else "-".join(Path(path).with_suffix("").parts)
    partner = str(Path(path).with_name(LABELED.sub(r"un\1", Path(path).name)))
    others = None
    if partner != path and partner in texts:
        try:
            others = lists.image_ids(texts[partner], dataset)
        except ValueError as error:
            raise ValueError(f"{name}: {partner}: {error}") from error
        both = sorted(set(ids) & set(others))
        if both:
            count = f"{len(both)} image is" if len(both) == 1 else f"{len(both)} images are"
            raise ValueError(f"{name}: {count} both labeled and unlabeled, first {both[0]}")
    if not found:
        if not allow_unknown:
            raise ValueError(_why_unknown(dataset, path, ids, near))
        return lists.write(into / dataset, name, ids, others)
    whole = next(p for p in lists.published(dataset) if p.name == "all")
    if others is not None and lists.sha256([*ids, *others]) != whole.sha256:
        raise ValueError(
            f"{name}: labeled and unlabeled are {len(ids) + len(others)} images together, but not "
            f"the {whole.images} of {dataset} train ({lists.mismatch([whole], [*ids, *others])})"
        )
    return lists.write(into / dataset, name, ids)


def _stored(dataset: str, into: Path) -> dict[str, list[str]]:
    """Known lists that are imported already, by name."""
    paths = ((p.name, into / dataset / f"{p.name}.txt") for p in lists.published(dataset))
    return {name: path.read_text().split() for name, path in paths if path.is_file()}


def _is_of(dataset: str, path: str, text: str) -> bool:
    """Whether a file lists images of the dataset; an empty one, whether its path says so."""
    if dataset not in lists.IDS:
        return "labeled" in Path(path).name
    if not text.strip():
        return any(word in path.lower() for word in NAMED[dataset])
    return lists.IDS[dataset].search(text) is not None


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
    labeled = [p for p in lists.published(dataset) if p.role == "labeled"]
    place = f"/{Path(path).with_suffix('')}/"
    named = [p for p in labeled if any(f"/{s.split(':')[1]}/" in place for s in p.shipped_by)]
    same = named or [p for p in labeled if p.images == len(ids)]
    if not same:
        return f"unknown: no published list has {len(ids)} images (--allow-unknown takes it)"
    return f"unknown: {lists.mismatch(same, ids)} (--allow-unknown takes it)"


def download(dataset: str, names: Iterable[str], into: Path) -> list[str]:
    """Fetch published lists from the repositories that ship them; returns the names.

    Raises:
        ValueError: unknown name, no connection, or a file that is not the published list.
    """
    wanted = {p.name: p for p in lists.published(dataset)}
    names = list(names) or list(wanted)
    unknown = [name for name in names if name not in wanted]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no published list: choose one of {', '.join(wanted)}")
    bar = Progress("download", len(names))
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(names, 1):
            url = f"{URL}/{wanted[name].download}"
            try:
                pooch.HTTPDownloader(timeout=30, stream=False)(url, f"{folder}/{name}", None)
                text = Path(folder, name).read_text("utf8", errors="replace")
                ids = lists.image_ids(text, dataset)
            except (OSError, ValueError) as error:
                raise ValueError(f"{url}: {' '.join(str(error).split())[:160]}") from error
            if lists.sha256(ids) != wanted[name].sha256:
                raise ValueError(f"{url}: another list, {lists.mismatch([wanted[name]], ids)}")
            lists.write(into / dataset, name, ids)
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
