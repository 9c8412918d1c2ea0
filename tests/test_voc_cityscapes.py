"""VOC, Cityscapes and one's own folder: what is read, what is refused, and that they train."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import assert_refused
from PIL import Image
from trees import (
    CITY_TRAIN,
    CITY_VAL,
    VOC_SBD,
    VOC_TRAIN,
    VOC_VAL,
    blocks,
    write_cityscapes,
    write_folder,
    write_voc,
)

from s4lib import trained
from s4lib.build import open_data
from s4lib.cli import main
from s4lib.data import open_dataset
from s4lib.data.images import open_image
from s4lib.data.voc import VOC, palette
from s4lib.evaluate import count
from s4lib.losses import IGNORE
from s4lib.trainer import fit


@pytest.fixture
def voc(tmp_path):
    return write_voc(tmp_path)


# ---------------------------------------------------------------- VOC


def test_voc_trains_on_the_augmented_ids_that_are_not_in_val(voc):
    train, val = (open_dataset("voc", part, root=str(voc)) for part in ("train", "val"))
    assert train.ids == VOC_TRAIN + VOC_SBD and val.ids == VOC_VAL
    assert train.note == "8 images of SegmentationClassAug (the literature has 10582)"
    assert "1449" in val.note


def test_voc_without_sbd_trains_on_its_own_list(tmp_path):
    train = open_dataset("voc", "train", root=str(write_voc(tmp_path, augmented=False)))
    assert train.ids == VOC_TRAIN and "without SBD" in train.note


@pytest.mark.parametrize("above", [0, 1, 2])
def test_voc_is_found_from_the_folders_above(voc, above):
    root = [voc, voc.parent, voc.parent.parent][above]
    assert open_dataset("voc", "val", root=str(root)).ids == VOC_VAL


def mode(path) -> str:
    with Image.open(path) as image:
        return image.mode


def test_palette_and_index_masks_give_the_same_labels_with_borders_void(voc):
    val = open_dataset("voc", "val", root=str(voc))
    assert mode(val.pairs[0][1]) == "P"
    for number, index in enumerate(range(8, 11)):
        image, label = val[number]
        wanted = blocks(index, 21, *image.shape[1:])
        assert np.array_equal(label.numpy(), wanted) and (label == IGNORE).any()
    train = open_dataset("voc", "train", root=str(voc))
    assert mode(train.pairs[0][1]) == "L"
    assert np.array_equal(train[0][1].numpy(), blocks(0, 21, 41, 37))
    assert len({train[i][0].shape for i in range(len(train))}) > 1


def test_a_label_alone_is_that_of_the_sample(voc):
    train = open_dataset("voc", "train", root=str(voc), size=(20, 24))
    alone = train.label(2)
    assert torch.equal(alone, train[2][1]) and torch.equal(train.label(2), alone)
    assert alone.shape == (20, 24)


def test_the_palette_is_vocs():
    assert palette(256)[[0, 1, 2, 15, 20, 255]].tolist() == [
        [0, 0, 0],
        [128, 0, 0],
        [0, 128, 0],
        [192, 128, 128],
        [0, 64, 128],
        [224, 224, 192],
    ]


VOC_BROKEN = {
    "no JPEGImages": (lambda f: shutil.rmtree(f / "JPEGImages"), ["data_root", "JPEGImages"]),
    "no list": (lambda f: (f / "ImageSets/Segmentation/val.txt").unlink(), ["val.txt"]),
    "empty list": (
        lambda f: (f / "ImageSets/Segmentation/val.txt").write_text("\n"),
        ["val.txt", "empty"],
    ),
    "no image": (
        lambda f: [(f / f"JPEGImages/{i}.jpg").unlink() for i in VOC_TRAIN],
        ["2007_000032.jpg", "2 others"],
    ),
    "no masks": (
        lambda f: [p.unlink() for p in (f / "SegmentationClassAug").iterdir()],
        ["SegmentationClassAug", "no annotation"],
    ),
}


@pytest.mark.parametrize("what", VOC_BROKEN)
def test_a_broken_voc_is_named_in_one_line(voc, what):
    spoil, words = VOC_BROKEN[what]
    spoil(voc)
    assert_refused(words, open_dataset, "voc", "train", root=str(voc))


def test_voc_has_no_test_part(voc):
    with pytest.raises(ValueError, match="not public"):
        open_dataset("voc", "test", root=str(voc))


def test_coloured_masks_are_refused(voc):
    path = voc / "SegmentationClassAug" / f"{VOC_SBD[0]}.png"
    Image.open(voc / "JPEGImages" / f"{VOC_SBD[0]}.jpg").save(path)
    train = open_dataset("voc", "train", root=str(voc))
    with pytest.raises(ValueError, match=f"{path.name}.*RGB.*not colours"):
        train[3]


# ---------------------------------------------------------------- Cityscapes


@pytest.mark.parametrize("train_ids", [True, False])
def test_cityscapes_labels_are_the_19_train_ids_from_either_file(tmp_path, train_ids):
    root = write_cityscapes(tmp_path, train_ids)
    train, val = (open_dataset("cityscapes", part, root=str(root)) for part in ("train", "val"))
    assert train.ids == CITY_TRAIN and val.ids == CITY_VAL
    for number in range(3):
        assert np.array_equal(train[number][1].numpy(), blocks(number, 19, 32, 64))
    assert ("TrainIds" in train.note) == train_ids and len(val.annotated()) == 2


def test_each_published_id_has_its_train_id(tmp_path):
    root = write_cityscapes(tmp_path, False)
    ids = np.resize(np.arange(34, dtype=np.uint8), (32, 64))
    path = next((root / "gtFine/train/bochum").iterdir())
    Image.fromarray(ids).save(path)
    label = open_dataset("cityscapes", "train", root=str(root))[3][1].numpy()
    table = {int(i): int(t) for i, t in zip(ids.flat, label.flat, strict=True)}
    kept = {i: t for i, t in table.items() if t != IGNORE}
    assert kept == {
        **{7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10},
        **{24: 11, 25: 12, 26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18},
    }
    ids[0, 0] = 34
    Image.fromarray(ids).save(path)
    with pytest.raises(ValueError, match=f"{path.name}.*34 is out of range"):
        open_dataset("cityscapes", "train", root=str(root))[3]


def test_cityscapes_test_is_not_evaluated_on(tmp_path, tiny):
    root = write_cityscapes(tmp_path, True)
    test = open_dataset("cityscapes", "test", root=str(root))
    assert (test[0][1] == IGNORE).all()
    config = tiny(dataset="cityscapes", data_root=str(root), crop=[32, 32], size=[], labeled=2)
    with pytest.raises(ValueError, match="berlin_000000_000019_leftImg8bit.png: has no annotation"):
        fit(tiny(**{**config.to_dict(), "eval_part": "test"}), out=tmp_path / "runs")
    with pytest.raises(ValueError, match="berlin.*nor one to evaluate on"):
        count({}, test, range(1), lambda x: x, torch.device("cpu"))


def test_a_folder_without_cityscapes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="leftImg8bit/train"):
        open_dataset("cityscapes", "train", root=str(tmp_path))
    with pytest.raises(ValueError, match="data_root=''"):
        open_dataset("cityscapes", "train")


# ---------------------------------------------------------------- your own folder


def test_a_folder_of_ones_own_needs_no_lists(tmp_path):
    root = write_folder(tmp_path, colors=[[0, 0, 0], [9, 9, 9], [1, 2, 3]])
    train, val = (open_dataset("folder", part, root=str(root)) for part in ("train", "val"))
    assert train.classes == ("background", "crack", "rust") and train.colors[2].tolist() == [
        1,
        2,
        3,
    ]
    annotated = [f"a/photo {i:02d}" for i in range(0, 10, 2)]
    annotated += [f"b/photo {i:02d}" for i in range(1, 10, 2)]
    assert val.ids == [annotated[4], annotated[9]]
    assert sorted(train.ids + val.ids) == sorted(
        [*annotated, "a/photo 10", "b/photo 11", "a/photo 12"]
    )
    assert len(train.annotated()) == 8 and "3 without annotation" in train.note
    assert train[0][1].unique().tolist() == [0, 1, 2, IGNORE]
    bare = train.ids.index("b/photo 11")
    assert train[bare][0].shape == (3, 40, 48) and (train[bare][1] == IGNORE).all()
    with pytest.raises(ValueError, match="needs a list test.txt"):
        open_dataset("folder", "test", root=str(root))


def test_lists_of_ones_own_are_followed(tmp_path):
    root = write_folder(tmp_path)
    (root / "val.txt").write_text("a/photo 00\nb/photo 01\n\n")
    (root / "test.txt").write_text("a/photo 02\n")
    parts = {p: open_dataset("folder", p, root=str(root)).ids for p in ("train", "val", "test")}
    assert parts["val"] == ["a/photo 00", "b/photo 01"] and parts["test"] == ["a/photo 02"]
    assert len(parts["train"]) == 10 and not set(parts["train"]) & {*parts["val"], *parts["test"]}


def yaml_with(text: str):
    return lambda root: (root / "dataset.yaml").write_text(text)


FOLDER_BROKEN = {
    "no yaml": (lambda r: (r / "dataset.yaml").unlink(), ["dataset.yaml", "no such file"]),
    "not yaml": (yaml_with("classes: [a"), ["dataset.yaml", "not YAML"]),
    "no classes": (yaml_with("colors: []"), ["dataset.yaml", "expected classes"]),
    "odd key": (yaml_with("classes: [a, b]\nclases: 1"), ["expected classes", "nothing else"]),
    "yes as a name": (yaml_with("classes: [yes, b]"), ["expected a list of names", "True"]),
    "one class": (yaml_with("classes: [a]"), ["2 to 255 different"]),
    "a class twice": (yaml_with("classes: [a, a]"), ["2 to 255 different"]),
    "void is a class": (yaml_with("classes: [a, b, c]\nvoid: [2]"), ["void=[2]", "3 to 255"]),
    "few colours": (yaml_with("classes: [a, b, c]\ncolors: [[0, 0, 0]]"), ["one [red"]),
    "no images": (lambda r: shutil.rmtree(r / "images"), ["no folder images"]),
    "stray mask": (
        lambda r: (r / "images" / "a" / "photo 00.jpg").unlink(),
        ["photo 00.png", "belongs to no image"],
    ),
    "one name twice": (
        lambda r: Image.new("RGB", (4, 4)).save(r / "images" / "a" / "photo 00.png"),
        ["photo 00.png", "photo 00.jpg"],
    ),
    "unknown id": (
        lambda r: (r / "train.txt").write_text("c/none\n"),
        ["train.txt", "'c/none'", "no image"],
    ),
    "id in two lists": (
        lambda r: [(r / f"{p}.txt").write_text("a/photo 00\n") for p in ("train", "val")],
        ["val.txt", "already listed in train.txt"],
    ),
}


@pytest.mark.parametrize("what", FOLDER_BROKEN)
def test_a_broken_folder_is_named_in_one_line(tmp_path, what):
    root = write_folder(tmp_path)
    spoil, words = FOLDER_BROKEN[what]
    spoil(root)
    assert_refused(words, open_dataset, "folder", "train", root=str(root))


def test_photographs_of_16_bits_are_refused(tmp_path):
    path = tmp_path / "deep.png"
    Image.fromarray(np.full((4, 4), 700, dtype=np.uint16)).save(path)
    with pytest.raises(ValueError, match="deep.png.*8 bits"):
        open_image(path)


def test_only_annotated_images_are_labeled(tmp_path, tiny):
    root = write_folder(tmp_path)
    given = {
        "dataset": "folder",
        "data_root": str(root),
        "size": [],
        "crop": [32, 32],
        "unlabeled": 0,
    }
    for rule in ("", "plain", "balanced", "nested-plain", "nested-balanced"):
        images, split, _, _ = open_data(tiny(**given, labeled=7, split=rule))
        assert all(images.pairs[i][1] for i in split.labeled) and len(split.labeled) == 7
        assert len(split.unlabeled) == 4
    assert len(open_data(tiny(**given, labeled=0))[1].unlabeled) == 3
    with pytest.raises(ValueError, match="labeled=9: choose 0 .all. to 8"):
        open_data(tiny(**given, labeled=9))
    (root / "val.txt").write_text("b/photo 11\n")
    with pytest.raises(ValueError, match="photo 11.jpg: has no annotation"):
        open_data(tiny(**given, labeled=7))


# ---------------------------------------------------------------- training


WRITE = {
    "voc": write_voc,
    "cityscapes": lambda r: write_cityscapes(r, False),
    "folder": write_folder,
}


@pytest.mark.parametrize("dataset", WRITE)
def test_a_run_on_crops_of_images_at_their_own_size(tmp_path, tiny, dataset):
    root = WRITE[dataset](tmp_path / "data")
    given = {"dataset": dataset, "data_root": str(root), "size": [], "crop": [32, 32], "labeled": 2}
    given |= {"batch": 2, "unlabeled_batch": 2, "unlabeled": 2, "epochs": 3, "eval_every": 3}
    record = fit(tiny(**given, method="cutmix_seg"), out=tmp_path / "runs")
    images = open_dataset(dataset, "val", root=str(root))
    assert record["steps"] == 3 and record["classes"] == list(images.classes)
    assert record["evaluation"]["images"] == len(images)
    for network in record["networks"].values():
        assert len(network["last"]["iou"]) == len(images.classes)
        assert 0 <= network["last"]["miou"] <= 100


def test_a_run_is_used_where_its_data_are_not(tmp_path, tiny, capsys):
    root = write_folder(tmp_path / "data", colors=[[0, 0, 0], [9, 9, 9], [1, 2, 3]])
    given = {
        "dataset": "folder",
        "data_root": str(root),
        "size": [],
        "crop": [32, 32],
        "labeled": 2,
    }
    config = tiny(**given, epochs=1, unlabeled=4)
    fit(config, out=tmp_path / "runs")
    moved = root.rename(tmp_path / "moved")
    folder = tmp_path / "runs" / config.run_id
    assert trained.load(folder).classes == ("background", "crack", "rust")
    photo, out = moved / "images" / "a" / "photo 00.jpg", tmp_path / "maps"
    assert main(["predict", str(folder), str(photo), "--out", str(out), "--device", "cpu"]) == 0
    values = np.array(Image.open(out / "photo 00.png"))
    assert values.shape == (40, 48) and values.max() < 3
    colours = np.array(Image.open(out / "photo 00_color.png"))
    assert np.array_equal(colours, trained.load(folder).colors[values])
    assert main(["eval", str(folder), "--data_root", str(moved), "--device", "cpu"]) == 0
    assert "crack" in capsys.readouterr().out


def test_a_run_of_before_classes_were_written_still_loads(trained_run, tmp_path):
    folder = shutil.copytree(trained_run, tmp_path / "run")
    described = json.loads((folder / "classes.json").read_text())
    (folder / "classes.json").unlink()
    assert list(trained.load(folder).classes) == described["classes"]
    assert trained.load(folder).colors.tolist() == described["colors"]


# ---------------------------------------------------------------- memory


def test_decoded_images_are_kept_while_there_is_room(voc, monkeypatch):
    reads = []
    read = VOC.read
    monkeypatch.setattr(VOC, "read", lambda self, i: reads.append(i) or read(self, i))
    sizes = [
        sum(part.nbytes for part in open_dataset("voc", "train", root=str(voc))[i]) for i in (0, 1)
    ]
    reads.clear()
    monkeypatch.setattr(VOC, "keep_bytes", sum(sizes))
    train = open_dataset("voc", "train", root=str(voc))
    first = [train[i] for i in range(4)]
    again = [train[i] for i in range(4)]
    assert reads == [0, 1, 2, 3, 2, 3]
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
