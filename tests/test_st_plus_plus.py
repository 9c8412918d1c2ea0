"""ST++: reliability against the released function and loops; its stages, and who labels what."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import equal, tiny_config
from torch import nn

from s4lib import records, runs, trained
from s4lib.data.images import Images
from s4lib.data.loader import Loader
from s4lib.data.mosaic import Mosaic
from s4lib.data.pseudo_labels import PseudoLabels
from s4lib.data.splits import Split
from s4lib.data.views import Views
from s4lib.losses import IGNORE
from s4lib.method import Batch, Clock
from s4lib.methods.st_plus_plus import STPlusPlus, cutout, ranked, reliability
from s4lib.trainer import fit

CPU = torch.device("cpu")
# Large steps, so that networks of a few steps tell classes apart; 8 unlabeled images, 2 steps.
QUICK = {
    "method": "st_plus_plus",
    "net": "light",
    "lr": 0.01,
    "split": "plain",
    "unlabeled": 8,
    "epochs": 3,
    "eval_images": 2,
    "eval_every": 3,
}
# Of the bar, which three stages share equally: six steps, three (the first student's) and six.
STEPS = [*range(1, 7), 8, 10, 12, *range(13, 19)]


def quick(**changes):
    return tiny_config(**{**QUICK, **changes})


# ---------------------------------------------------------------- reliability


def test_reliability_is_that_of_st_plus_plus(golden):
    """stpp_miou.npz: meanIOU of two maps, absent classes left out; 1e-5."""
    g = golden("stpp_miou.npz")
    pred, last, classes = g["pred"].long(), g["gt"].long(), int(g["num_classes"])
    assert reliability([pred, last], classes) == pytest.approx(float(g["miou"]), rel=1e-5)


def loops(one: np.ndarray, other: np.ndarray, classes: int) -> float:
    found = []
    for k in range(classes):
        both = either = 0
        for a, b in zip(one.flatten(), other.flatten(), strict=True):
            both += a == k and b == k
            either += a == k or b == k
        if either:
            found.append(both / either)
    return sum(found) / len(found)


def test_reliability_is_the_mean_over_earlier_maps_of_their_miou_with_the_last():
    g = torch.Generator().manual_seed(0)
    maps = [torch.randint(0, 4, (5, 7), generator=g) for _ in range(4)]  # two classes never occur
    expected = [loops(m.numpy(), maps[-1].numpy(), 6) for m in maps[:-1]]
    assert reliability(maps, 6) == pytest.approx(sum(expected) / 3, rel=1e-12)


def test_reliability_by_hand():
    last = torch.tensor([[0, 0, 1, 1]])
    half = torch.tensor([[0, 1, 1, 1]])  # class 0: 1 of 2, class 1: 2 of 3
    assert reliability([half, last], 3) == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert reliability([last, half, last], 3) == pytest.approx((1 + (1 / 2 + 2 / 3) / 2) / 2)
    assert reliability([last, last], 3) == 1
    assert reliability([1 - last, last], 3) == 0
    with pytest.raises(ValueError, match="1 label maps"):
        reliability([last], 3)


def test_the_more_reliable_half_is_rounded_down_and_ties_keep_their_order():
    assert ranked([0.2, 0.9, 0.5, 0.9, 0.1]) == ([1, 3], [2, 0, 4])
    assert ranked([0.5] * 4) == ([0, 1], [2, 3])
    assert ranked([0.1, 0.2, 0.3, 0.4], 0.75) == ([3, 2, 1], [0])


# ---------------------------------------------------------------- the step


def test_cutout_shows_noise_and_takes_the_label_away():
    mean, std = (0.2, 0.5, 0.9), (0.1, 0.2, 0.3)
    image, label = torch.full((400, 3, 40, 40), 77.0), torch.zeros(400, 40, 40, dtype=torch.long)
    torch.manual_seed(0)
    seen, kept = cutout(image, label, mean, std)
    hidden = kept == IGNORE
    assert torch.equal(hidden[:, None].expand_as(seen), seen != 77)
    assert set(kept.unique().tolist()) == {0, IGNORE}
    share = hidden.float().mean((1, 2))
    assert 0.4 < (share > 0).float().mean() < 0.6
    assert 0.01 < share[share > 0].min() and share.max() <= 0.4
    for k in range(3):  # uniform over the colours that an image can have
        noise = seen[:, k][hidden] * std[k] + mean[k]
        assert 0 <= noise.min() < 0.01 and 0.99 < noise.max() <= 1
        assert noise.mean() == pytest.approx(0.5, abs=0.01)
    same, all_kept = cutout(image, label, mean, std, p=0.0)
    assert torch.equal(same, image) and torch.equal(all_kept, label)


class Colours(nn.Module):
    """Its logits are the image's colours, scaled."""

    mean, std = (0.5,) * 3, (0.5,) * 3

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, image):
        return self.scale * image


def one_step(batch: Batch, **changes) -> tuple[torch.Tensor, dict]:
    method, taken = STPlusPlus(Colours, **changes), []
    torch.manual_seed(3)
    losses = method.step(batch, Clock(0, 1, 1), lambda loss, *nets: taken.append((loss, nets)))
    ((loss, nets),) = taken
    assert nets == (method.student,)
    return loss.detach(), losses


@pytest.fixture
def batch() -> Batch:
    g = torch.Generator().manual_seed(1)
    image, weak, strong = (torch.randn(2, 3, 8, 8, generator=g) for _ in range(3))
    label, weak_label = (torch.randint(0, 3, (2, 8, 8), generator=g) for _ in range(2))
    label[0, :4] = IGNORE
    valid = torch.ones(2, 8, 8, dtype=torch.bool)
    valid[1, :, 5:] = False
    return Batch(image, label, weak, (strong,), valid, None, weak_label)


def test_one_cross_entropy_of_labels_and_pseudo_labels(batch):
    label_u = batch.weak_label.masked_fill(~batch.valid, IGNORE)
    for view, seen in (("strong", batch.strong[0]), ("weak", batch.weak)):
        loss, losses = one_step(batch, view=view, cutout=0.0)
        sums = [
            F.cross_entropy(x, y, ignore_index=IGNORE, reduction="sum")
            for x, y in ((batch.image, batch.label), (seen, label_u))
        ]
        counts = [(y != IGNORE).sum() for y in (batch.label, label_u)]
        torch.testing.assert_close(loss, sum(sums) / sum(counts))
        torch.testing.assert_close(losses["sup"], sums[0] / counts[0])
        torch.testing.assert_close(losses["unsup"], sums[1] / counts[1])


def test_cutout_hides_parts_of_pseudo_labeled_images_only(batch):
    without, with_all = (one_step(batch, cutout=p)[1] for p in (0.0, 1.0))
    assert without["sup"] == with_all["sup"] and without["unsup"] != with_all["unsup"]


# ---------------------------------------------------------------- the loader


class Painted(Images):
    """Images whose colour says their class; their annotations lie."""

    classes, colors, ids = ("a",) * 5, np.zeros((5, 3), np.uint8), ["0", "1", "2", "3"]

    def truth(self, index: int) -> np.ndarray:
        return np.kron(np.random.default_rng(index).integers(0, 5, (3, 4)), np.ones((8, 8)))

    def read(self, index):
        image = np.repeat(50 * self.truth(index)[..., None], 3, 2).astype(np.uint8)
        return image, np.full(image.shape[:2], 4, np.uint8)


@pytest.mark.parametrize("outside", ["reflect", "void"])
def test_pseudo_labels_turn_and_shift_with_their_images(tmp_path, outside):
    images, split = Painted(), Split((0, 1), (2, 3), "")
    labels = PseudoLabels(tmp_path / "labels", (2, 3), np.zeros((5, 3), np.uint8))
    for index in labels.indices:
        labels.write(index, torch.from_numpy(images.truth(index)).long())
    views = Views(crop=(24, 24), scale=(0.75, 1.5), outside=outside)
    settings = {"batch": 2, "unlabeled_batch": 2, "seed": 0, "device": CPU}
    settings |= {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    method = STPlusPlus(Colours)
    loader = Loader(images, split, views, method, pseudo_labels=labels, **settings)
    for step in range(6):
        batch = loader[step]
        painted = batch.weak[:, 0] * 255 / 50
        clean = batch.valid & ((painted - painted.round()).abs() < 1e-3)  # away from edges
        at = clean & (batch.weak_label == painted.round())
        assert clean.float().mean() > 0.3
        assert at.sum() / clean.sum() > 0.98  # a blend of two classes may look like a third
        assert outside == "reflect" or (batch.weak_label[~batch.valid] == IGNORE).all()
        assert (batch.label == 4).any()  # labeled images have their annotation
    without = Loader(images, split, views, method, **settings)
    assert without[0].weak_label is None  # never an annotation


def test_pseudo_labels_are_small_files_and_bad_ones_are_named(tmp_path):
    labels = PseudoLabels(tmp_path / "labels", (7,), Mosaic.colors)
    label = torch.arange(8).repeat_interleave(2000).view(100, 160)
    labels.write(7, label)
    assert labels[7].dtype == torch.uint8 and torch.equal(labels[7].long(), label)
    assert [path.name for path in labels.folder.iterdir()] == ["7.png"]
    assert labels.path(7).stat().st_size < 1000
    with pytest.raises(ValueError, match=r"8\.png: no such annotation"):
        labels[8]
    with pytest.raises(ValueError, match="value 5 is out of range"):
        PseudoLabels(labels.folder, (7,), Mosaic.colors[:5])[7]


# ---------------------------------------------------------------- the stages


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, dict, list]:
    """The folder of an uninterrupted run, its record, and what it reported."""
    out, seen = tmp_path_factory.mktemp("whole"), []
    record = fit(quick(), out=out, progress=lambda *report: seen.append(report))
    return out / quick().run_id, record, seen


def stage_folder(folder: Path, name: str) -> Path:
    (found,) = (path.parent for path in (folder / name).glob("*/record.json"))
    return found


def state(folder: Path) -> dict:
    """All that a run leaves, without times."""
    last = torch.load(folder / "last.pt", weights_only=True)
    found = {key: value for key, value in last.items() if key != "seconds"}
    found["labels"] = {path.name: path.read_bytes() for path in (folder / "labels").glob("*.png")}
    for name in ("reliability.json", "metrics.jsonl"):
        found[name] = (folder / name).read_text() if (folder / name).exists() else ""
    record = json.loads((folder / "record.json").read_text())
    stages = [{k: v for k, v in s.items() if k != "seconds"} for s in record["stages"]]
    return found | {"stages": stages, "networks": record["networks"]}


def test_a_run_leaves_one_record_of_all_stages(whole):
    folder, record, seen = whole
    assert [r["run_id"] for r in records.load(folder.parent)] == [quick().run_id]
    assert record["config"] == quick().to_dict()
    teacher, student = record["stages"]
    assert (teacher["stage"], student["stage"]) == ("teacher", "student")
    assert [s["unlabeled"] for s in (teacher, student, record)] == [0, 4, 8]
    assert [s["steps"] for s in (teacher, student, record)] == [6, 3, 6]
    own = json.loads((stage_folder(folder, "student") / "record.json").read_text())
    assert [student[when] for when in ("last", "best")] == [
        records.score(own, when=when) for when in ("last", "best")
    ]
    assert record["images_seen"] == 6 * 4 + 3 * 8 + 6 * 8
    assert record["seconds"] > teacher["seconds"] + student["seconds"]
    assert [(done, total) for done, total, _ in seen] == [(done, 18) for done in STEPS]


def tta(net: nn.Module, image: torch.Tensor) -> torch.Tensor:
    """Argmax of the softmax summed over five scales and both orientations."""
    total = 0
    for scale in (0.5, 0.75, 1.0, 1.5, 2.0):
        small = F.interpolate(image, scale_factor=scale, mode="bilinear", align_corners=True)
        for flip in (False, True):
            probs = net(small.flip(3) if flip else small).softmax(1)
            probs = probs.flip(3) if flip else probs
            total = total + F.interpolate(
                probs, image.shape[2:], mode="bilinear", align_corners=True
            )
    return total.argmax(1)[0]


@torch.no_grad()
def labeled_by(folder: Path, stage: str, checkpoint: str = "last") -> set[int]:
    """The images whose pseudo-label is a stage's."""
    model = trained.load(stage_folder(folder, stage), checkpoint, "cpu")
    images, found = Mosaic("train", size=(32, 32)), set()
    labels = PseudoLabels(folder / "labels", (), Mosaic.colors)
    for index in (int(path.stem) for path in labels.folder.iterdir()):
        label = tta(model.method, model.normalise(images[index][0][None]))
        if (label == labels[index]).float().mean() > 0.999:
            found.add(index)
    return found


@torch.no_grad()
def test_the_teacher_labels_the_stable_half_and_the_first_student_the_rest(whole):
    folder, _, _ = whole
    teacher, images = stage_folder(folder, "teacher"), Mosaic("train", size=(32, 32))
    models = [trained.load(teacher, checkpoint, "cpu") for checkpoint in (1, 2, "last")]
    kept = json.loads((folder / "reliability.json").read_text())
    for name, score in kept.items():
        image = images[images.ids.index(name)][0][None]
        maps = [m.method(m.normalise(image)).argmax(1) for m in models]
        expected = [loops(m.numpy(), maps[-1].numpy(), 8) for m in maps[:-1]]
        assert score == pytest.approx(sum(expected) / 2, abs=0.01)
    order = sorted(kept, key=lambda name: -kept[name])
    reliable, rest = ({images.ids.index(name) for name in part} for part in (order[:4], order[4:]))
    assert len(set(kept.values())) > 4  # the networks do tell images apart
    by_teacher, by_student = labeled_by(folder, "teacher"), labeled_by(folder, "student")
    assert reliable <= by_teacher and rest <= by_student
    assert rest - by_teacher and reliable - by_student  # and they disagree


class Killed(Exception):
    pass


@pytest.mark.slow
def test_killed_everywhere_it_ends_bit_equal_and_repeats_no_stage(whole, tmp_path, monkeypatch):
    folder, _, _ = whole
    # Twice in the teacher, once in either student, and among the labels of each half.
    deaths, writes, taken, written = [3, 5, 10, 15], [2, 5], [], []
    write = PseudoLabels.write

    def kill(done: int, total: int, text: str) -> None:
        taken.append(done)
        if done in deaths:
            deaths.remove(done)
            raise Killed

    def write_some(self, index: int, label: torch.Tensor) -> None:
        if len(written) in writes:
            writes.remove(len(written))
            raise Killed
        written.append(index)
        write(self, index, label)

    monkeypatch.setattr(PseudoLabels, "write", write_some)
    lives = 0
    while deaths or writes:
        with pytest.raises(Killed):
            fit(quick(), out=tmp_path, resume=True, progress=kill)
        lives += 1
    fit(quick(), out=tmp_path, resume=True, progress=kill)
    assert lives == 6
    a, b = state(folder), state(tmp_path / quick().run_id)
    assert [key for key in a if not equal(a[key], b[key])] == []
    assert len(a["labels"]) == 8 and len(a["method"]) > 10
    assert sorted(written) == sorted(int(name.removesuffix(".png")) for name in a["labels"])
    assert sorted(taken) == sorted([*STEPS, 3, 5, 15])  # again only what no checkpoint had


def test_st_has_one_student_and_the_teacher_labels_all(tmp_path):
    config = quick(preset="st")
    record = fit(config, out=tmp_path)
    folder = tmp_path / config.run_id
    assert [stage["stage"] for stage in record["stages"]] == ["teacher"]
    assert len(labeled_by(folder, "teacher")) == 8 == len(list((folder / "labels").iterdir()))
    assert not (folder / "reliability.json").exists()


def test_the_code_labels_with_the_weights_that_were_best_in_evaluation(tmp_path, monkeypatch):
    loaded, load = [], trained.load

    def note(folder: Path, checkpoint: str | int, device: str) -> trained.Trained:
        loaded.append((Path(folder).parent.name, checkpoint))
        return load(folder, checkpoint, device)

    monkeypatch.setattr(trained, "load", note)
    fit(quick(preset="code"), out=tmp_path)
    compared = [("teacher", 1), ("teacher", 2), ("teacher", "last")]
    assert loaded == [*compared, ("teacher", "best"), ("student", "best")]


def test_annotations_of_unlabeled_images_change_nothing(whole, tmp_path, monkeypatch):
    folder, _, _ = whole
    labeled = set(_labeled(quick()))
    read = Mosaic.read

    def spoilt(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image, label = read(self, index)
        return image, (label if self.part == "val" or index in labeled else 7 - label)

    monkeypatch.setattr(Mosaic, "read", spoilt)
    fit(quick(), out=tmp_path)
    assert equal(state(folder), state(tmp_path / quick().run_id))


def _labeled(config) -> tuple[int, ...]:
    from s4lib.build import open_data

    return open_data(config)[1].labeled


def test_a_notebook_runs_it_and_takes_up_what_is_unfinished(whole, tmp_path):
    def kill(done: int, total: int, text: str) -> None:
        if done == 10:
            raise Killed

    with pytest.raises(Killed):
        fit(quick(), out=tmp_path, progress=kill)
    with pytest.raises(ValueError, match="student.*an unfinished run; resume continues it"):
        fit(quick(), out=tmp_path)
    (record,) = runs.run([quick()], out=tmp_path)
    assert record["networks"] == whole[1]["networks"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 1}, "epochs=1, reliable=0.5 of 8 images: st_plus_plus needs 2 epochs"),
        ({"unlabeled": 1}, "1 reliable image or more"),
        ({"method_args": {"checkpoints": 1}}, "checkpoints=1: choose 2 or more"),
        ({"method_args": {"reliable": 1.5}}, "reliable=1.5: choose a number from 0 to 1"),
    ],
)
def test_what_cannot_be_ranked_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        fit(quick(**changes), out=tmp_path)
    assert not list(tmp_path.glob("*/teacher"))
