"""The `s4` command, in this process: results, and one line with exit code 2 for bad input."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY
from PIL import Image

from s4lib import passes
from s4lib.cli import main, train_config
from s4lib.config import Config
from s4lib.data.mosaic import Mosaic
from s4lib.methods import METHODS
from s4lib.protocols import protocol


@pytest.fixture
def tiny_yaml(tmp_path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


# ---------------------------------------------------------------- what works


def test_train_prints_its_scores_and_leaves_a_run(tmp_path, tiny_yaml, capsys):
    out = tmp_path / "runs"
    assert main(["train", "--config", str(tiny_yaml), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    (folder,) = out.iterdir()
    assert "student" in printed and "mIoU" in printed and str(folder) in printed
    files = {path.name for path in folder.iterdir()} - {".lock"}
    always = "config.json classes.json metrics.jsonl last.pt best.pt counts.pt record.json"
    assert files == set(always.split())
    config = Config.from_dict(json.loads((folder / "config.json").read_text()))
    assert config.run_id == folder.name and config.net == "tiny"


def test_a_trained_run_is_not_trained_again(trained_run, tmp_path, tiny_yaml, capsys):
    out = tmp_path / "runs"
    shutil.copytree(trained_run, out / trained_run.name)
    before = (out / trained_run.name / "last.pt").stat().st_mtime_ns
    arguments = ["train", "--config", str(tiny_yaml), "--method", "mean_teacher"]
    assert main([*arguments, "--out", str(out)]) == 0
    assert "teacher" in capsys.readouterr().out
    assert (out / trained_run.name / "last.pt").stat().st_mtime_ns == before


def test_flags_override_yaml_which_overrides_the_protocol(tmp_path):
    path = tmp_path / "some.yaml"
    path.write_text("protocol: mosaic-16\nlr: 0.5\nepochs: 4\nmethod_args: {weight: 3.0}\n")
    config, options = train_config(["--config", str(path), "--epochs", "7", "--out", "x"])
    assert (config.protocol, config.labeled, config.lr, config.epochs) == ("mosaic-16", 16, 0.5, 7)
    assert config.method_args == {"weight": 3.0} and options.out == "x"
    assert not options.resume and not options.restart


def test_dataset_and_profile_name_the_protocol():
    config, _ = train_config(["--dataset", "camvid", "--profile", "smoke"])
    assert config == protocol("camvid-smoke")
    assert train_config([])[0] == protocol("mosaic-32")


def test_values_with_structure_are_given_as_json():
    arguments = ["--size", "[32,48]", "--method_args", '{"threshold": 0.9}', "--scale", "[1,2]"]
    config, _ = train_config(["--method", "pseudo_label", *arguments])
    assert config.size == (32, 48) and config.scale == (1.0, 2.0)
    assert config.method_args == {"threshold": 0.9}


def test_a_runs_own_config_file_trains_it_again(trained_run):
    config, _ = train_config(["--config", str(trained_run / "config.json")])
    assert config.run_id == trained_run.name


HELP = {
    (): ["train", "eval", "predict", "methods", "book"],
    ("train",): ["--protocol", "--method", "--config", "--resume", "--lr", "--out", "--device"],
    ("eval",): ["--checkpoint", "--part", "--data_root"],
    ("predict",): ["inputs", "--out", "--checkpoint"],
    ("methods",): ["name"],
    ("book",): ["--profile", "--jobs", "--parameter", "--no-html"],
}


@pytest.mark.parametrize("command", HELP)
def test_help_exits_with_0_and_names_the_options(command, capsys):
    try:
        code = main([*command, "--help"])
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr().out
    assert not code
    assert all(word in printed for word in HELP[command])


def test_train_help_explains_every_field(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for words in ("learning rate at the start", "network by name", "largest gradient norm"):
        assert words in printed


def test_methods_are_listed_with_source_deployed_network_and_passes(capsys, monkeypatch):
    counts = dict.fromkeys(METHODS, passes.Passes(1, 0, 1))  # to count them all takes a while
    counts["gta_seg"] = passes.passes("gta_seg")
    monkeypatch.setattr(passes, "passes", counts.get)
    assert main(["methods"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert list(lines) == ["method", *METHODS]
    assert lines["gta_seg"].split()[1:5] == ["teacher", "2", "1", "2"]
    assert lines["gta_seg"].endswith("Jin, Wang and Lin, NeurIPS 2022")


@pytest.mark.parametrize("name", METHODS)
def test_one_methods_presets_and_hyper_parameters_are_printed(name, capsys):
    assert main(["methods", name]) == 0
    printed = capsys.readouterr().out
    assert all(f"preset {preset}: " in printed for preset in METHODS[name].presets)
    for values in METHODS[name].presets.values():
        assert all(f"{key}: " in printed for key in values)


@pytest.mark.parametrize("checkpoint", ["last", "best"])
def test_eval_repeats_the_records_numbers(trained_run, capsys, checkpoint, monkeypatch):
    record = json.loads((trained_run / "record.json").read_text())
    monkeypatch.setattr("s4lib.data.mosaic.LENGTHS", {"train": 512, "val": 6, "test": 6})
    assert main(["eval", str(trained_run), "--checkpoint", checkpoint, "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["student", "teacher"]
    *per_class, miou, low, high, boundary, ece = lines[1:]
    assert [line.split()[0] for line in per_class] == list(Mosaic.classes)
    wanted = record["networks"]["student"][checkpoint]
    assert miou.startswith("mIoU")
    assert float(miou.split()[1]) == pytest.approx(wanted["miou"], abs=0.006)
    assert float(low.split()[-2]) < wanted["miou"] < float(high.split()[-2])
    assert boundary.startswith("boundary mIoU") and 0 < float(ece.split()[1]) < 1
    for line, value in zip(per_class, wanted["iou"], strict=True):
        shown = line.split()[1]
        assert shown == "-" if value is None else float(shown) == pytest.approx(value, abs=0.006)


def test_predict_writes_indices_with_a_palette_and_the_same_in_colours(
    trained_run, tmp_path, capsys
):
    folder, out = tmp_path / "photos", tmp_path / "maps"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (50, 40)), ("b.jpg", (33, 21)), ("skipped.txt", None)):
        if size:
            Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), np.uint8)).save(folder / name)
        else:
            (folder / name).write_text("no image")
    arguments = ["predict", str(trained_run), str(folder), "--out", str(out), "--device", "cpu"]
    assert main(arguments) == 0
    assert "4 maps" in capsys.readouterr().out
    assert {p.name for p in out.iterdir()} == {"a.png", "a_color.png", "b.png", "b_color.png"}
    for stem, size in (("a", (50, 40)), ("b", (33, 21))):
        with Image.open(out / f"{stem}.png") as index:
            assert index.mode == "P" and index.size == size
            values, shown = np.array(index), np.array(index.convert("RGB"))
        with Image.open(out / f"{stem}_color.png") as image:
            colours = np.array(image.convert("RGB"))
        assert values.max() < len(Mosaic.classes)
        assert np.array_equal(colours, Mosaic.colors[values])
        assert np.array_equal(shown, colours)


# ---------------------------------------------------------------- what does not

BAD = {
    "method": (["--method", "mixmatch"], ["mixmatch", *METHODS]),
    "preset": (["--method", "mean_teacher", "--preset", "mine"], ["mine", "paper", "code"]),
    "hyper-parameter": (
        ["--method", "mean_teacher", "--method_args", '{"depth": 1}'],
        ["'depth'", "decay", "ramp"],
    ),
    "hyper-parameter of none": (["--method_args", '{"depth": 1}'], ["'depth'", "Supervised"]),
    "hyper-parameter value": (
        ["--method", "mean_teacher", "--method_args", '{"buffers": "mean"}'],
        ["buffers='mean'", "copy", "ema", "keep"],
    ),
    "hyper-parameter type": (
        ["--method", "mean_teacher", "--method_args", '{"decay": "slow"}'],
        ["decay='slow'", "float"],
    ),
    "protocol": (["--protocol", "voc-92"], ["voc-92", "mosaic-32", "camvid-quick"]),
    "profile": (["--profile", "fast"], ["fast", "smoke", "quick"]),
    "key": (["--learning_rate", "1"], ["learning_rate"]),
    "type": (["--epochs", "ten"], ["epochs", "ten", "int"]),
    "choice": (["--amp", "fp8"], ["amp", "fp8"]),
    "number": (["--batch", "0"], ["batch=0"]),
    "net": (["--net", "huge"], ["huge", "light", "tiny"]),
    "net key": (["--net_args", '{"depth": 1}'], ["'depth'", "encoder", "width"]),
    "net value": (["--net_args", '{"width": "wide"}'], ["width"]),
    "encoder": (["--net_args", '{"encoder": "resnet1"}'], ["resnet1"]),
    "weights": (["--weights", "nowhere.pth"], ["nowhere.pth", "no such file"]),
    "device": (["--device", "tpu"], ["device='tpu'", "cpu", "cuda"]),
    "dataset": (["--protocol", "mosaic-32", "--dataset", "coco"], ["coco", "mosaic", "camvid"]),
    "missing dataset": (
        ["--protocol", "camvid-smoke", "--data_root", "nowhere", "--size", "[18,24]"],
        ["nowhere"],
    ),
    "too many labels": (["--labeled", "5000"], ["labeled=5000", "512"]),
    "config file": (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line_with_exit_code_2_and_leaves_nothing(
    what, tmp_path, tiny_yaml, refused, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    arguments, words = BAD[what]
    error = refused("train", "--config", tiny_yaml, "--out", "runs", *arguments)
    assert all(word in error for word in words), error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("epochs: ten\n", "epochs"),
        ("learning_rate: 1\n", "learning_rate"),
        ("a: [\n", "parsing config"),
    ],
)
def test_a_bad_config_file_is_refused(tmp_path, refused, text, word):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    error = refused("train", "--config", path, "--out", tmp_path / "runs")
    assert word in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_cuda_asked_for_and_absent_is_refused(tmp_path, tiny_yaml, refused):
    error = refused("train", "--config", tiny_yaml, "--device", "cuda", "--out", tmp_path / "runs")
    assert "CUDA" in error and "device=cpu" in error
    assert not (tmp_path / "runs").exists()


def test_weights_of_another_architecture_are_refused(tmp_path, tiny_yaml, refused):
    path = tmp_path / "other.pth"
    torch.save({"some.weight": torch.zeros(2)}, path)
    arguments = ["--config", tiny_yaml, "--weights", path, "--out", tmp_path / "runs"]
    assert "another architecture" in refused("train", *arguments)
    assert not (tmp_path / "runs").exists()


def test_an_unknown_command_lists_the_commands(refused):
    error = refused("trian")
    assert all(word in error for word in ("trian", "train", "eval", "predict", "book"))


def test_an_unknown_method_name_lists_the_methods(refused):
    assert "cutmix_seg" in refused("methods", "mixmatch")


def test_broken_camvid_images_are_named(camvid, tmp_path, refused):
    path = camvid / "train" / "frame_000.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    arguments = ["--protocol", "camvid-smoke", "--size", "[18,24]", "--net", "tiny"]
    arguments += ["--data_root", camvid, "--labeled", "2", "--device", "cpu"]
    error = refused("train", *arguments, "--out", tmp_path / "runs")
    assert "frame_000.jpg" in error
    assert not (tmp_path / "runs").exists()


def test_a_run_that_is_none_is_refused(tmp_path, refused):
    for command in (["eval", tmp_path], ["predict", tmp_path, "x.png"]):
        assert "config.json" in refused(*command)


@pytest.fixture
def copied_run(trained_run, tmp_path) -> Path:
    """A finished run that may be spoilt."""
    return Path(shutil.copytree(trained_run, tmp_path / "runs" / trained_run.name))


class Malicious:
    """A pickle of it would write a file."""

    def __init__(self, victim: Path):
        self.victim = victim

    def __reduce__(self):
        return Path.touch, (self.victim,)


SPOILT = {
    "missing": lambda path, victim: path.unlink(),
    "empty": lambda path, victim: path.write_bytes(b""),
    "truncated": lambda path, victim: path.write_bytes(path.read_bytes()[:-500]),
    "noise": lambda path, victim: path.write_bytes(b"hello, world" * 100),
    "other tensors": lambda path, victim: torch.save({"a": torch.zeros(1)}, path),
    "a list": lambda path, victim: torch.save([1, 2], path),
    "malicious pickle": lambda path, victim: path.write_bytes(pickle.dumps(Malicious(victim))),
    "malicious archive": lambda path, victim: torch.save({"step": Malicious(victim)}, path),
}


@pytest.mark.parametrize("what", SPOILT)
@pytest.mark.parametrize("command", ["resume", "eval", "best"])
def test_a_spoilt_checkpoint_is_refused_and_never_executed(
    what, command, copied_run, tmp_path, tiny_yaml, refused
):
    victim = tmp_path / "victim"
    name = "best" if command == "best" else "last"
    SPOILT[what](copied_run / f"{name}.pt", victim)
    if command == "resume":
        if what == "missing":
            pytest.skip("a run without a checkpoint begins again")
        (copied_run / "record.json").unlink()
        files = {p.name: p.read_bytes() for p in copied_run.iterdir()}
        arguments = ["--config", tiny_yaml, "--method", "mean_teacher", "--resume"]
        error = refused("train", *arguments, "--out", copied_run.parent)
        assert {p.name: p.read_bytes() for p in copied_run.iterdir()} == files
    else:
        error = refused("eval", copied_run, "--checkpoint", name, "--device", "cpu")
    assert f"{name}.pt" in error
    assert not victim.exists()


def test_a_checkpoint_of_another_config_is_refused(copied_run, tiny_yaml, refused):
    arguments = ["--config", tiny_yaml, "--method", "mean_teacher", "--lr", "0.1"]
    config, _ = train_config([str(a) for a in arguments])
    copied_run.rename(copied_run.with_name(config.run_id))
    (copied_run.with_name(config.run_id) / "record.json").unlink()
    error = refused("train", *arguments, "--resume", "--out", copied_run.parent)
    assert "another config" in error and "lr is 0.005, not 0.1" in error


def test_an_unfinished_run_needs_resume_or_restart(copied_run, tiny_yaml, refused):
    (copied_run / "record.json").unlink()
    arguments = ["--config", tiny_yaml, "--method", "mean_teacher", "--out", copied_run.parent]
    error = refused("train", *arguments)
    assert "resume" in error and "restart" in error
    assert main(["train", *map(str, arguments), "--restart"]) == 0


def test_images_to_predict_must_exist(trained_run, tmp_path, refused):
    common = ["--out", tmp_path / "maps", "--device", "cpu"]
    assert "nowhere.png" in refused("predict", trained_run, "nowhere.png", *common)
    assert "no image found" in refused("predict", trained_run, tmp_path, *common)
    (tmp_path / "bad.png").write_text("no image")
    assert "bad.png" in refused("predict", trained_run, tmp_path / "bad.png", *common)
    assert not (tmp_path / "maps").exists()


def test_the_traceback_is_there_for_who_asks(monkeypatch):
    monkeypatch.setenv("S4_DEBUG", "1")
    with pytest.raises(ValueError):
        main(["methods", "mixmatch"])


def test_records_of_runs_are_collected_in_one_file(trained_run, tmp_path, capsys):
    out = tmp_path / "records.jsonl"
    assert main(["records", str(trained_run.parent), "--out", str(out)]) == 0
    (line,) = out.read_text().splitlines()
    assert json.loads(line) == json.loads((trained_run / "record.json").read_text())
    assert main(["records", str(tmp_path / "none"), "--out", str(tmp_path / "no.jsonl")]) == 2
    assert "no record" in capsys.readouterr().err and not (tmp_path / "no.jsonl").exists()
