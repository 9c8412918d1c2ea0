"""Your own images, in a folder.

    dataset.yaml                  classes: [background, crack, rust]
                                  colors: [[0, 0, 0], [228, 87, 86], [76, 152, 103]]    optional
                                  void: [254]                            optional; 255 always is
    images/ANY/NAME.jpg           photographs, in folders or not
    labels/ANY/NAME.png           one index (or palette) PNG for each image that is annotated
    train.txt val.txt test.txt    optional: lines of ids, which are ANY/NAME

Without val.txt, every fifth annotated image that no list names is "val"; without train.txt, "train"
is every image that is in no other part. "test" needs its list.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml

from .images import SUFFIXES, ImageFiles
from .voc import palette

EVERY = 5


class Folder(ImageFiles):
    """Your own images; see the module's text for the layout. Classes come from dataset.yaml."""

    classes = ()
    colors = np.zeros((0, 3), dtype=np.uint8)

    def __init__(self, part: str, *, root: str = "", size: tuple[int, int] | None = None):
        super().__init__()
        self.size = size
        place = Path(root)
        if not root or not (place / "images").is_dir():
            raise ValueError(f"data_root={root!r}: no folder images in it, which folder needs")
        self.classes, self.colors, self.void = described(place / "dataset.yaml")
        files: dict[str, Path] = {}
        for path in sorted((place / "images").rglob("*")):
            if path.suffix.lower() in SUFFIXES:
                name = path.relative_to(place / "images").with_suffix("").as_posix()
                if name in files:
                    raise ValueError(f"{path}: {files[name].name} has the same name")
                files[name] = path
        masks = {p: None for p in (place / "labels").rglob("*.png")}
        labels = {name: place / "labels" / f"{name}.png" for name in files}
        labels = {name: path for name, path in labels.items() if path in masks}
        stray = masks.keys() - labels.values()
        if stray:
            raise ValueError(f"{min(stray)}: belongs to no image of {place / 'images'}")
        self.ids = _parts(place, list(files), labels.keys())[part]
        if not self.ids:
            raise ValueError(
                f"data_root={root!r}: no image is {part}"
                + ("; it needs a list test.txt" if part == "test" else "")
            )
        self.pairs = [(files[name], labels.get(name)) for name in self.ids]
        bare = sum(label is None for _, label in self.pairs)
        self.note = f"{len(self.ids)} images" + (f", {bare} without annotation" if bare else "")


def described(path: Path) -> tuple[tuple[str, ...], np.ndarray, tuple[int, ...]]:
    """(class names, their colours, values of void) of a dataset.yaml.

    Raises:
        ValueError: missing, or not as expected; says what is.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; it must list the classes")
    try:
        given = yaml.safe_load(path.read_text("utf8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())[:120]})") from error
    valid = ("classes", "colors", "void")
    if not isinstance(given, dict) or not set(given) <= set(valid) or "classes" not in given:
        raise ValueError(
            f"{path}: expected classes, and optional colors and void, and nothing else"
        )
    names, void = given["classes"], given.get("void") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: classes={names!r}: expected a list of names")
    if not 2 <= len(set(names)) == len(names) <= 255:
        raise ValueError(f"{path}: classes={names!r}: expected 2 to 255 different names")
    if not isinstance(void, list) or not all(v in range(len(names), 256) for v in void):
        raise ValueError(f"{path}: void={void!r}: expected a list of {len(names)} to 255")
    colors = given.get("colors") or palette(len(names)).tolist()
    rgb = lambda c: isinstance(c, list) and len(c) == 3 and all(v in range(256) for v in c)  # noqa: E731
    if not isinstance(colors, list) or len(colors) != len(names) or not all(map(rgb, colors)):
        raise ValueError(f"{path}: colors: expected one [red, green, blue] of 0 to 255 per class")
    return tuple(names), np.array(colors, dtype=np.uint8), tuple(void)


def _parts(place: Path, names: list[str], annotated) -> dict[str, list[str]]:
    """The ids of each part, from the lists that are there. Raises ValueError for a wrong one."""
    parts: dict[str, list[str]] = {}
    listed: dict[str, str] = {}
    for part in ("train", "val", "test"):
        path = place / f"{part}.txt"
        if path.is_file():
            parts[part] = [line.strip() for line in path.read_text("utf8").splitlines()]
            parts[part] = [name for name in parts[part] if name]
            for name in parts[part]:
                if name in listed:
                    raise ValueError(f"{path}: {name!r} is already listed in {listed[name]}.txt")
                listed[name] = part
            unknown = set(parts[part]).difference(names)
            if unknown:
                raise ValueError(f"{path}: {min(unknown)!r} is no image of {place / 'images'}")
    free = [name for name in names if name not in listed]
    parts.setdefault("val", [name for name in free if name in annotated][EVERY - 1 :: EVERY])
    taken = {*listed, *parts["val"]}
    parts.setdefault("train", [name for name in names if name not in taken])
    return {"test": [], **parts}
