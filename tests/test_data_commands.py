"""`s4 data`: what it finds in a folder, its exit codes, and the splits that it draws."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
from PIL import Image
from trees import VOC_SBD, VOC_TRAIN, write_cityscapes, write_folder, write_voc

from s4lib.cli import main
from s4lib.data import open_dataset
from s4lib.data.splits import split


def truncate(path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize("dataset", ["voc", "cityscapes", "folder", "camvid"])
@pytest.mark.parametrize("named", [True, False])
def test_a_sound_dataset_is_fit_to_train_on(tmp_path, camvid, capsys, dataset, named):
    write = {"voc": write_voc, "folder": write_folder, "camvid": lambda r: camvid}
    write["cityscapes"] = lambda r: write_cityscapes(r, True)
    root = write[dataset](tmp_path / "data")
    assert main(["data", "check", str(root), *(["--dataset", dataset] if named else [])]) == 0
    out, error = capsys.readouterr()
    assert out.startswith(f"{dataset} in {root}") and out.rstrip().endswith("fit to train on")
    assert "check: " in error  # the progress bar


def test_the_report_counts(tmp_path, capsys):
    root = write_voc(tmp_path)
    assert main(["data", "check", str(root)]) == 0
    out = capsys.readouterr().out
    train = open_dataset("voc", "train", root=str(root))
    labels = [train.label(i).numpy() for i in range(len(train))]
    pixels = np.concatenate([label.ravel() for label in labels])
    assert "8 images of SegmentationClassAug (the literature has 10582); 8 annotated" in out
    assert f"void {np.mean(pixels == 255):.1%}; 41 x 37 to 49 x 43 pixels" in out
    line = next(line for line in out.splitlines() if line.startswith("sheep"))
    share, count = line.split()[1:3]
    assert share == f"{np.mean(pixels[pixels < 255] == 17):.2%}"
    assert int(count) == sum((label == 17).any() for label in labels)
    assert "test: part='test'" in out  # not needed, but said


def test_every_wrong_file_is_named(tmp_path, capsys):
    root = write_voc(tmp_path)
    images, masks = root / "JPEGImages", root / "SegmentationClassAug"
    truncate(images / f"{VOC_TRAIN[0]}.jpg")
    (images / f"{VOC_TRAIN[1]}.jpg").unlink()
    truncate(masks / f"{VOC_TRAIN[2]}.png")
    Image.new("RGB", (43, 41)).save(masks / f"{VOC_SBD[0]}.png")
    Image.new("L", (5, 7)).save(masks / f"{VOC_SBD[1]}.png")
    with Image.open(masks / f"{VOC_SBD[2]}.png") as image:
        label = np.array(image)
    label[3, 3] = 200
    Image.fromarray(label).save(masks / f"{VOC_SBD[2]}.png")
    assert main(["data", "check", str(root)]) == 1
    out = capsys.readouterr().out
    for name, word in (
        (f"{VOC_TRAIN[0]}.jpg", "truncated"),
        (f"{VOC_TRAIN[1]}.jpg", "no such image"),
        (f"{VOC_TRAIN[2]}.png", "truncated"),
        (f"{VOC_SBD[0]}.png", "mode RGB"),
        (f"{VOC_SBD[1]}.png", "5 x 7"),
        (f"{VOC_SBD[2]}.png", "200 is out of range"),
    ):
        (line,) = [line for line in out.splitlines() if f"/{name}:" in line]
        assert word in line
    assert out.rstrip().endswith("6 problems: training would fail")


def test_a_long_list_of_problems_is_cut(tmp_path, capsys):
    root = write_folder(tmp_path, count=30)
    for path in (root / "labels").rglob("*.png"):
        truncate(path)
    assert main(["data", "check", str(root)]) == 1
    out = capsys.readouterr().out
    assert out.count("truncated") == 20 and "and 10 more problems" in out


def test_parts_that_cannot_serve_are_problems(tmp_path, capsys):
    root = write_folder(tmp_path / "own")
    (root / "val.txt").write_text("a/photo 00\nb/photo 11\n")
    assert main(["data", "check", str(root)]) == 1
    assert "val: 1 of 2 images are annotated" in capsys.readouterr().out

    city = write_cityscapes(tmp_path / "city", True)
    shutil.rmtree(city / "gtFine" / "train")
    assert main(["data", "check", str(city)]) == 1
    assert "train: 0 of 4 images are annotated" in capsys.readouterr().out

    shutil.rmtree(city / "leftImg8bit" / "val")
    assert main(["data", "check", str(city)]) == 1
    assert re.search(r"^val: .*no leftImg8bit/val", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(("one", "other"), [("train", "val"), ("train", "test"), ("val", "test")])
def test_an_image_in_two_parts_is_a_problem(camvid, capsys, one, other):
    shutil.copy(camvid / f"{one}.txt", camvid / f"{other}.txt")
    assert main(["data", "check", str(camvid)]) == 1
    what = f"6 images are in {one} and in {other}, for instance {camvid}/{one}/frame_000.jpg"
    assert what in capsys.readouterr().out


def test_bad_input_is_one_line(tmp_path, refused):
    assert "no such folder" in refused("data", "check", tmp_path / "none")
    line = refused("data", "check", tmp_path)
    assert all(name in line for name in ("layout", "folder", "cityscapes", "voc", "camvid"))
    assert "JPEGImages" in refused("data", "check", tmp_path, "--dataset", "voc")
    assert "'coco'" in refused("data", "check", tmp_path, "--dataset", "coco")
    assert "check or splits" in refused("data", "shred")
    assert "required: dataset" in refused("data", "splits")
    nested = ("--labeled", "4", "--nested", "--rule", "spread")
    assert "plain or balanced" in refused("data", "splits", "--dataset", "mosaic", *nested)
    assert "labeled=513" in refused("data", "splits", "--dataset", "mosaic", "--labeled", "513")


def test_without_a_command_the_commands_are_listed(capsys):
    assert main(["data"]) == 0
    assert "s4 data check ROOT" in capsys.readouterr().out


def test_published_lists_are_shown_with_who_ships_them(capsys):
    assert main(["data", "splits", "--dataset", "voc"]) == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("u2pl-662 ")]
    assert "662" in line and "0c6466b63b2f" in line and "U2PL:pascal/662" in line
    assert main(["data", "splits", "--dataset", "camvid"]) == 0
    assert "draw your own" in capsys.readouterr().out


def test_draws_of_ones_own_are_shown_and_written(tmp_path, capsys):
    root = write_folder(tmp_path / "own", count=20)
    command = ["data", "splits", "--dataset", "folder", "--data_root", str(root), "--draw", "1"]
    command += ["--labeled", "9", "4", "--rule", "balanced", "--nested"]
    assert main([*command, "--into", str(tmp_path / "lists")]) == 0
    lines = capsys.readouterr().out.splitlines()
    images = open_dataset("folder", "train", root=str(root))
    drawn = {n: split(images, "folder", n, 1, name="nested-balanced") for n in (4, 9)}
    for line, (n, s) in zip(lines, drawn.items(), strict=True):
        assert f"split=nested-balanced labeled={n} draw=1: {s.sha256[:12]}" in line
        written = tmp_path / "lists" / "folder" / f"nested-balanced-{n}-d1.txt"
        assert written.read_text().splitlines() == sorted(images.ids[i] for i in s.labeled)
    assert main(command) == 0 and not (root / "splits").exists()
