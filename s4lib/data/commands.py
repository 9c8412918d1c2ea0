"""`s4 data check` and `s4 data splits`: what lies in a folder, and who gets labels."""

from __future__ import annotations

from pathlib import Path

from ..parser import Parser
from . import DATASETS, importing, lists, open_dataset
from .check import check
from .splits import RULES, split

TEXT = """\
s4 data check ROOT [--dataset NAME]       open every file and say whether training would work
s4 data splits --dataset NAME             published lists of labeled images; import or draw some

`s4 data COMMAND --help` explains each."""


def main(arguments: list[str]) -> int:
    """Run `s4 data ...`; returns the exit code.

    Raises:
        ValueError: bad input, in one line.
    """
    commands = {"check": check_folder, "splits": splits}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(TEXT)
        return 0
    if arguments[0] not in commands:
        raise ValueError(f"{arguments[0]!r} is no command of data: choose {' or '.join(commands)}")
    return commands[arguments[0]](arguments[1:])


def check_folder(arguments: list[str]) -> int:
    parser = Parser(
        prog="s4 data check",
        description="Open every image and annotation of a dataset; exit code 1 if training on it "
        "would fail.",
    )
    parser.add_argument("root", help="the dataset's folder")
    parser.add_argument("--dataset", default="", help="by default the one whose layout it has")
    options = parser.parse_args(arguments)
    report, problems = check(Path(options.root), options.dataset)
    print(report)
    return 1 if problems else 0


def splits(arguments: list[str]) -> int:
    parser = Parser(
        prog="s4 data splits",
        description="Without further options, list the published splits of a dataset. Import them "
        "from a clone of a repository that ships some (--from) or from its server (--download); "
        "exit code 1 if a list was refused. Or draw your own (--labeled).",
    )
    parser.add_argument("--dataset", required=True, choices=list(DATASETS))
    parser.add_argument("--data_root", default="", help="the dataset's folder")
    parser.add_argument(
        "--into",
        default="",
        help="folder that gets DATASET/NAME.txt; by default splits in data_root, or else the "
        "user's cache",
    )
    parser.add_argument("--from", dest="source", default="", help="a clone, or a .tar.gz of lists")
    parser.add_argument("--allow-unknown", action="store_true", help="import unpublished lists too")
    parser.add_argument(
        "--download", nargs="*", default=None, metavar="NAME", help="no name means all"
    )
    parser.add_argument("--labeled", type=int, nargs="+", default=[], help="draw these many")
    parser.add_argument("--draw", type=int, default=0)
    parser.add_argument("--rule", choices=[r for r in RULES if "-" not in r], default="plain")
    parser.add_argument(
        "--nested", action="store_true", help="smaller draws are part of the larger"
    )
    options = parser.parse_args(arguments)
    dataset, root = options.dataset, options.data_root
    into = Path(options.into) if options.into else lists.folders(dataset, root)[0].parent
    if options.source:
        taken, refused = importing.collect(
            Path(options.source), dataset, into, options.allow_unknown
        )
        for path, name in taken.items():
            print(f"{name:14} {path}")
        for path, why in refused.items():
            print(f"refused: {path}: {why}")
        print(f"{len(set(taken.values()))} lists in {into / dataset}, {len(refused)} refused")
        return 1 if refused else 0
    if options.download is not None:
        names = importing.download(dataset, options.download, into)
        print(f"{len(names)} lists in {into / dataset}")
        return 0
    if options.labeled:
        return _draw(options, into)
    for p in lists.published(dataset):
        here = "imported" if (into / dataset / f"{p.name}.txt").is_file() else ""
        print(f"{p.name:14} {p.images:6} {p.sha256[:12]} {here:9}{' '.join(p.shipped_by)}")
    if not lists.published(dataset):
        print(f"no list of {dataset} is published: draw your own with --labeled")
    return 0


def _draw(options, into: Path) -> int:
    """Draw labeled images by a rule; print what to set, and write the ids where asked to."""
    rule = f"nested-{options.rule}" if options.nested else options.rule
    if rule not in RULES:
        raise ValueError(f"--nested with --rule {options.rule}: choose plain or balanced")
    images = open_dataset(options.dataset, "train", root=options.data_root)
    for labeled in sorted(options.labeled):
        drawn = split(images, options.dataset, labeled, options.draw, name=rule)
        shown = [set(images.label(i).unique().tolist()) for i in drawn.labeled]
        rarest = min(range(len(images.classes)), key=lambda k: sum(k in s for s in shown))
        count = sum(rarest in s for s in shown)
        print(
            f"split={rule} labeled={labeled} draw={options.draw}: {drawn.sha256[:12]}, "
            f"{images.classes[rarest]}, its rarest class, in {count} images"
        )
        if options.into:
            ids = [images.ids[i] for i in drawn.labeled]
            lists.write(into / options.dataset, f"{rule}-{labeled}-d{options.draw}", ids)
    return 0
