"""Semi-supervised semantic segmentation: train, evaluate, use, and make the book.

  s4 train --protocol mosaic-32 --method mean_teacher   train one run; --resume continues it
  s4 grid FILE.yaml --dry_run                           many runs: a plan; without it, all of them
  s4 eval RUN --part test                               evaluate a trained run's networks
  s4 predict RUN photo.jpg folder/ --out maps           class maps of any images
  s4 methods [NAME]                                     the methods; one method's settings
  s4 protocols [NAME]                                   the protocols; one's values
  s4 data check ROOT                                    would training work on this folder?
  s4 data splits --dataset voc                          published splits: list, import, draw
  s4 records runs --out book/records/mine.jsonl         collect records in one file
  s4 renew book/records/mine.jsonl                      is a record of older code still true?
  s4 bench data --dataset camvid --data_root DIR        images a second that one core prepares
  s4 bench step --suite voc --out bench.json            speed and memory of training steps
  s4 bench ranks --ranks 1 2 4                          speed in several processes
  s4 book [NOTEBOOK ...] --profile quick                run notebooks and compile the book

`s4 COMMAND --help` explains each. Bad input is one line on standard error and exit code 2.
"""

from __future__ import annotations

import inspect
import math
import os
import re
import signal
import subprocess
import sys
import typing
from pathlib import Path

import jsonargparse

from .config import Config
from .parser import Parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = {
        "train": train,
        "grid": grid,
        "eval": evaluate_run,
        "predict": predict,
        "methods": methods,
        "protocols": protocols,
        "data": data,
        "records": collect_records,
        "renew": renew_records,
        "bench": bench,
        "book": book,
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__.strip())
        return 0
    try:
        if arguments[0] not in commands:
            raise ValueError(f"{arguments[0]!r} is no command: choose one of {', '.join(commands)}")
        return commands[arguments[0]](arguments[1:])
    except (ValueError, FloatingPointError, OSError) as error:
        if os.environ.get("S4_DEBUG"):
            raise
        where = (
            f"{error.filename}: {error.strerror}"
            if isinstance(error, OSError) and error.filename
            else error
        )
        print(f"s4: {where}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"s4: {stop or 'stopped'}", file=sys.stderr)
        return 128 + getattr(stop, "signal", signal.SIGINT)


def _parser(command: str, description: str) -> Parser:
    return Parser(prog=f"s4 {command}", description=description)


def train_config(arguments: list[str]) -> tuple[Config, jsonargparse.Namespace]:
    """The Config that command-line arguments and YAML files ask for, and the other options.

    The protocol gives the defaults; a YAML file changes them; flags change both.
    """
    from .protocols import PROFILES, profile_protocol, settings

    parser = _parser(
        "train", "Train one run. Protocol first, then --config files, then flags decide each value."
    )
    parser.add_argument(
        "--config",
        action="config",
        help="YAML file of any of these options (papermill -f takes it too)",
    )
    parser.add_argument(
        "--profile",
        default="quick",
        choices=list(PROFILES),
        help="with dataset, names the protocol",
    )
    parser.add_argument("--out", default="runs", help="folder of all runs")
    parser.add_argument("--resume", action="store_true", help="continue an unfinished run")
    parser.add_argument(
        "--restart", action="store_true", help="throw away what there is of this run"
    )
    parser.add_argument(
        "--gpus", type=int, default=0, help="processes to start through torchrun; 0 is this one"
    )
    parser.add_class_arguments(Config, as_group=False)
    texts = re.findall(r"^ {8}(\w+): (.+(?:\n {12}.+)*)", Config.__doc__, re.MULTILINE)
    texts = {name: " ".join(text.split()).rstrip(".") for name, text in texts}
    for action in parser._actions:  # each field's help is its line in the docstring
        action.help = texts.get(action.dest, action.help)
    parser.set_defaults(protocol="")
    first = parser.parse_args(arguments)
    name = first.protocol or profile_protocol(first.profile, first.dataset)
    own = settings(name, first.method)
    method_args = own.pop("method_args", {})
    parser.set_defaults({"protocol": name, **own})
    values = parser.parse_args(arguments).as_dict()
    options = {
        key: values.pop(key) for key in ("config", "profile", "out", "resume", "restart", "gpus")
    }
    values |= {"protocol": name, "method_args": {**method_args, **values["method_args"]}}
    return Config.from_dict(values), jsonargparse.Namespace(options)


def train(arguments: list[str]) -> int:
    config, options = train_config(arguments)
    from . import distributed
    from .build import build_method, open_data
    from .progress import Progress
    from .records import score
    from .runs import torchrun
    from .trainer import fit

    if options.gpus > 1 and not distributed.launched():
        build_method(config, len(open_data(config)[0].classes))  # complain before processes start
        command = torchrun(options.gpus, "s4lib", "train", *arguments)
        return subprocess.call(command, env={"OMP_NUM_THREADS": "1", **os.environ})
    bar = None

    def show(done: int, total: int, text: str) -> None:
        nonlocal bar
        if distributed.rank() == 0:
            bar = bar or Progress(config.run_id, total)
            bar.update(done, text)

    try:
        record = fit(
            config, out=options.out, resume=options.resume, restart=options.restart, progress=show
        )
    finally:
        if bar:
            bar.close()
    if distributed.rank() == 0:
        for name in record["networks"]:
            last, best = score(record, name), score(record, name, "best")
            print(f"{name}: {last:.2f} mIoU at the last evaluation, {best:.2f} at the best")
        print(Path(options.out) / config.run_id)
    distributed.stop()
    return 0


def grid(arguments: list[str]) -> int:
    from .grid import main

    return main(arguments)


def evaluate_run(arguments: list[str]) -> int:
    parser = _parser("eval", "Evaluate the networks of a trained run, class by class.")
    parser.add_argument("run", help="the run's folder")
    parser.add_argument("--checkpoint", choices=["last", "best"], default="last")
    parser.add_argument("--part", choices=["train", "val", "test"], default="val")
    parser.add_argument(
        "--data_root", default="", help="where the dataset lies now, if it has moved"
    )
    parser.add_argument(
        "--evaluation", default="", help="rule other than the run's own (whole, u2pl-centre, ...)"
    )
    parser.add_argument("--eval_args", type=dict, default={}, help="changes to that rule, as JSON")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(arguments)
    from . import trained
    from .data import open_dataset
    from .evaluate import count, evaluated, evaluation, scores
    from .metrics import bootstrap

    run = trained.load(options.run, options.checkpoint, options.device)
    root = options.data_root or run.config.data_root
    images = open_dataset(run.config.dataset, options.part, root=root, size=run.config.size or None)
    rule = options.evaluation or run.config.evaluation
    how = evaluation(rule, options.eval_args if options.evaluation else run.config.eval_args)
    counts = count(
        evaluated(run.method),
        images,
        range(len(images)),
        run.normalise,
        run.device,
        how,
        thorough=True,
    )
    results = scores(counts, how.absent)
    width = max(map(len, (*images.classes, "boundary mIoU")))
    print(" " * width, *(f"{name:>10}" for name in results))
    for i, name in enumerate(images.classes):
        print(
            f"{name:{width}}",
            *(
                f"{r['iou'][i]:10.2f}" if r["iou"][i] is not None else f"{'-':>10}"
                for r in results.values()
            ),
        )
    intervals = [bootstrap(c.confusion, absent=how.absent) for c in counts.values()]
    rows = {
        "mIoU": [f"{r['miou']:.2f}" for r in results.values()],
        "95 % from": [f"{low:.2f}" for low, _ in intervals],
        "95 % to": [f"{high:.2f}" for _, high in intervals],
        "boundary mIoU": [f"{r['boundary_miou']:.2f}" for r in results.values()],
        "ECE": [f"{r['ece']:.4f}" for r in results.values()],
    }
    for name, cells in rows.items():
        print(f"{name:{width}}", *(f"{cell:>10}" for cell in cells))
    return 0


def predict(arguments: list[str]) -> int:
    parser = _parser(
        "predict",
        "Class maps of images: NAME.png holds indices (with a palette), NAME_color.png colours.",
    )
    parser.add_argument("run", help="the run's folder")
    parser.add_argument("inputs", nargs="+", help="image files and folders of images")
    parser.add_argument("--out", default="predictions", help="folder for the maps")
    parser.add_argument("--checkpoint", choices=["last", "best"], default="last")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(arguments)
    from . import trained
    from .progress import Progress

    run = trained.load(options.run, options.checkpoint, options.device)
    files = trained.image_files(options.inputs)
    bar = Progress("predict", len(files))
    for number, file in enumerate(files, 1):
        trained.write_maps(run.predict(file), run.colors, Path(options.out), file.stem)
        bar.update(number, file.name)
    bar.close()
    print(f"{2 * len(files)} maps in {options.out}")
    return 0


def methods(arguments: list[str]) -> int:
    parser = _parser("methods", "List the methods, or one method's presets and hyper-parameters.")
    parser.add_argument("name", nargs="?", default=None)
    options = parser.parse_args(arguments)
    from .methods import METHODS
    from .passes import citation, passes

    if options.name is None:
        print("method         deployed  forward teaching backward  from; passes are of a late step")
        for name, kind in METHODS.items():
            forward, teaching, backward = passes(name)
            print(
                f"{name:14} {kind.deployed:11}{forward:6g} {teaching:8g} {backward:8g}  "
                f"{citation(name)}",
                flush=True,
            )
        return 0
    if options.name not in METHODS:
        raise ValueError(f"method={options.name!r}: choose one of {', '.join(METHODS)}")
    kind = METHODS[options.name]
    print(f"{inspect.getdoc(sys.modules[kind.__module__])}\n\n{inspect.getdoc(kind)}\n")
    for name, (type_, default, meaning) in kind.hyper_parameters().items():
        print(f"{name}: {_type_text(type_)} = {default!r}\n    {meaning}")
    for preset, values in kind.presets.items():
        print(f"preset {preset}:", ", ".join(f"{k}={v!r}" for k, v in values.items()) or "defaults")
    return 0


def _type_text(kind: object) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        low, high = arguments[1]
        return f"{arguments[0].__name__} from {low}" + (f" to {high}" if high < math.inf else "")
    if origin is typing.Literal:
        return " | ".join(map(repr, arguments))
    return getattr(kind, "__name__", str(kind)) if origin is None else str(kind)


def protocols(arguments: list[str]) -> int:
    parser = _parser("protocols", "List the protocols, or what one of them sets.")
    parser.add_argument("name", nargs="?", default=None)
    options = parser.parse_args(arguments)
    from .protocols import PROTOCOLS, settings

    if options.name is None:
        print("\n".join(PROTOCOLS))
        return 0
    for key, value in settings(options.name).items():
        print(f"{key}: {value}")
    return 0


def data(arguments: list[str]) -> int:
    from .data.commands import main

    return main(arguments)


def collect_records(arguments: list[str]) -> int:
    parser = _parser("records", "Collect records of finished runs in one file, a line each.")
    parser.add_argument("places", nargs="+", help="folders of runs, or .jsonl files")
    parser.add_argument("--out", required=True, help="the .jsonl file to write")
    options = parser.parse_args(arguments)
    from . import records

    found = sorted(records.load(*options.places), key=lambda record: record["run_id"])
    if not found:
        raise ValueError(f"{', '.join(options.places)}: no record of a finished run")
    records.save(found, Path(options.out))
    print(f"{len(found)} records in {options.out}")
    return 0


def renew_records(arguments: list[str]) -> int:
    parser = _parser(
        "renew", "Repeat a run of each method whose code has changed; equal numbers stay valid."
    )
    parser.add_argument("file", type=Path, help="a .jsonl file of records, rewritten in place")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--data_root", default="", help="where the dataset lies; mosaic needs none")
    options = parser.parse_args(arguments)
    from .renew import renew

    if not options.file.is_file():
        raise ValueError(f"{options.file}: no such file of records")
    return 1 if renew(options.file, options.jobs, options.data_root) else 0


def bench(arguments: list[str]) -> int:
    from .bench import commands, data, ranks

    texts = {
        "data": (data.main, "Measure how many training images a second one core prepares."),
        "step": (commands.main, "Speed and memory of training steps, by part, on noise."),
        "eval": (commands.main, "Images a second of an evaluation, on noise."),
        "ranks": (ranks.main, "Training steps in several processes, apart and together, on noise."),
    }
    what = arguments[0] if arguments and arguments[0] in texts else "data"
    main, text = texts[what]
    parser = _parser("bench", text)
    parser.add_argument("what", choices=list(texts))
    return main(parser, arguments)


def book(arguments: list[str]) -> int:
    parser = _parser("book", "Run notebooks with papermill and compile the book into _build/html.")
    parser.add_argument("names", nargs="*", default=[], help="notebooks to run; none means all")
    parser.add_argument("--profile", default="quick")
    parser.add_argument(
        "--jobs",
        type=int,
        default=None,
        help="notebooks at a time; by default one per core, or one on a GPU",
    )
    parser.add_argument(
        "-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE")
    )
    parser.add_argument("-f", "--file", default="", help="YAML file of parameters")
    parser.add_argument("--no-html", action="store_true", help="run the notebooks only")
    options = parser.parse_args(arguments)
    import yaml

    from .book.compile import build

    try:
        given = yaml.safe_load(Path(options.file).read_text()) if options.file else {}
        given = {
            **(given or {}),
            **{name: yaml.safe_load(value) for name, value in options.parameter},
        }
    except (yaml.YAMLError, TypeError) as error:
        raise ValueError(
            f"{options.file}: not a YAML file of parameters ({str(error).splitlines()[0]})"
        ) from error
    profile = given.pop("profile", options.profile)
    return build(options.names, profile, given, options.jobs, not options.no_html)


if __name__ == "__main__":
    sys.exit(main())
