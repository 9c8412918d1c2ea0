"""Datasets, splits, views and the loader: what is seen, in which order, and that labels follow."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from conftest import assert_refused
from PIL import Image

from s4lib import distributed
from s4lib.data import DATASETS, open_dataset
from s4lib.data.camvid import CamVid
from s4lib.data.loader import Loader
from s4lib.data.mosaic import LENGTHS, Mosaic, scene
from s4lib.data.splits import split
from s4lib.data.views import Views, colour_jitter
from s4lib.losses import IGNORE
from s4lib.methods import METHODS
from s4lib.nets import build_net

# What `mosaic` is. Change its constants and these change: print them with the two tests below.
MOSAIC_IMAGES = {
    ("train", 0): "c41e859a7cc5132d",
    ("train", 511): "2d591aa788eba6eb",
    ("val", 0): "19f1e94ef60d1ebc",
    ("test", 255): "ed49f7b46fca9edc",
}
MOSAIC_SPLITS = {  # (labeled, draw)
    (32, 0): "4e5e93de15eefea6",
    (32, 1): "a3a29484f8b68561",
    (32, 2): "db413943a7010976",
    (32, 3): "db5f1da9f4fe2bdd",
    (32, 4): "3c4222582590304c",
}


def digest(*arrays) -> str:
    """Short SHA-256 of bytes."""
    return hashlib.sha256(b"".join(np.asarray(a).tobytes() for a in arrays)).hexdigest()[:16]


# ---------------------------------------------------------------- mosaic


def test_mosaic_images_are_what_they_have_always_been():
    found = {(part, i): digest(*open_dataset("mosaic", part)[i]) for part, i in MOSAIC_IMAGES}
    assert found == MOSAIC_IMAGES


def test_mosaic_splits_are_what_they_have_always_been():
    images = open_dataset("mosaic", "train")
    found = {key: split(images, "mosaic", *key).sha256[:16] for key in MOSAIC_SPLITS}
    assert found == MOSAIC_SPLITS


@pytest.mark.slow
def test_all_mosaic_images_are_drawn_in_seconds_and_differ():
    began = time.process_time()
    seen = set()
    for part, length in enumerate(LENGTHS.values()):
        for i in range(length):
            image, label = scene(np.random.default_rng([part, i]), 64)
            assert image.shape == (64, 64, 3) and image.dtype == np.uint8
            assert label.shape == (64, 64) and label.dtype == np.uint8
            seen.add(digest(image))
    assert time.process_time() - began < 6  # 2 s where nothing else runs
    assert len(seen) == sum(LENGTHS.values())


@pytest.mark.parametrize("part", LENGTHS)
def test_every_mosaic_class_occurs_in_every_part(part):
    images = open_dataset("mosaic", part, size=(32, 32))
    assert len(images) == len(images.ids) == len(set(images.ids)) == LENGTHS[part]
    counts = sum(np.bincount(images[i][1].flatten(), minlength=256) for i in range(len(images)))
    share = counts / counts.sum()
    assert counts[len(images.classes) :].sum() == 0
    assert share[: len(images.classes)].min() > 0.04


def test_a_mosaic_image_depends_on_its_part_and_index_alone():
    first, second = open_dataset("mosaic", "train"), open_dataset("mosaic", "train")
    second[7], second[3]
    assert torch.equal(first[3][0], second[3][0]) and torch.equal(first[3][1], second[3][1])
    assert not torch.equal(first[3][0], open_dataset("mosaic", "val")[3][0])


def test_mosaic_images_are_square():
    with pytest.raises(ValueError, match=r"size=\[32, 64\]"):
        Mosaic("train", size=(32, 64))


@pytest.mark.parametrize("name", DATASETS)
def test_a_dataset_has_one_colour_per_class(name):
    kind = DATASETS[name]
    assert kind.colors.shape == (len(kind.classes), 3) and kind.colors.dtype == np.uint8
    assert len({tuple(c) for c in kind.colors.tolist()}) == len(set(kind.classes))


def test_unknown_names_list_the_valid_ones():
    with pytest.raises(ValueError, match="dataset='coco'.*mosaic.*camvid"):
        open_dataset("coco", "train")
    with pytest.raises(ValueError, match="part='dev'.*train.*val.*test"):
        open_dataset("mosaic", "dev")


# ---------------------------------------------------------------- splits


@pytest.mark.parametrize("labeled", [8, 32, 64])
def test_a_split_is_a_partition_in_which_every_class_is_labeled(labeled):
    images = open_dataset("mosaic", "train", size=(32, 32))
    drawn = [split(images, "mosaic", labeled, draw) for draw in range(3)]
    for s in drawn:
        assert len(s.labeled) == labeled
        assert sorted(s.labeled + s.unlabeled) == list(range(512))
        labels = torch.cat([images[i][1].flatten() for i in s.labeled])
        assert len(labels.unique()) == len(images.classes)
    assert len({s.sha256 for s in drawn}) == 3


def test_zero_labels_all(camvid):
    images = open_dataset("camvid", "train", root=str(camvid))
    s = split(images, "camvid", 0, 0)
    assert s.labeled == tuple(range(6)) and s.unlabeled == ()


def test_a_camvid_split_takes_one_frame_from_each_slice_of_the_film(camvid):
    images = open_dataset("camvid", "train", root=str(camvid))
    chosen = {split(images, "camvid", 3, draw).labeled for draw in range(20)}
    assert len(chosen) > 3
    assert all([i // 2 for i in labeled] == [0, 1, 2] for labeled in chosen)


@pytest.mark.parametrize("labeled", [1, 4, 5])
def test_no_frame_is_drawn_twice_where_slices_are_uneven(camvid, labeled):
    images = open_dataset("camvid", "train", root=str(camvid))
    for draw in range(30):
        s = split(images, "camvid", labeled, draw)
        assert len(set(s.labeled)) == labeled
        assert sorted(s.labeled + s.unlabeled) == list(range(6))


@pytest.mark.parametrize(
    ("labeled", "draw", "word"), [(7, 0, "labeled=7"), (-1, 0, "labeled=-1"), (2, -1, "draw=-1")]
)
def test_impossible_splits_are_refused(camvid, labeled, draw, word):
    images = open_dataset("camvid", "train", root=str(camvid))
    with pytest.raises(ValueError, match=word):
        split(images, "camvid", labeled, draw)


# ---------------------------------------------------------------- CamVid


def test_both_camvid_layouts_give_the_same(camvid, tutorial_camvid):
    assert (camvid / "train" / "frame_000.jpg").exists()
    assert "/SegNet/CamVid/train/" in (tutorial_camvid / "train.txt").read_text()
    for part in ("train", "val", "test"):
        plain, tutorial = (
            open_dataset("camvid", part, root=str(root)) for root in (camvid, tutorial_camvid)
        )
        assert plain.ids == tutorial.ids and len(plain) == 6
        for i in range(6):
            assert torch.equal(plain[i][1], tutorial[i][1])
            difference = plain[i][0].float() - tutorial[i][0].float()
            assert difference.abs().mean() < 2  # JPEG
    assert split(plain, "camvid", 2, 0).sha256 == split(tutorial, "camvid", 2, 0).sha256


def test_camvid_void_is_ignored_and_classes_keep_their_indices(tutorial_camvid):
    images = open_dataset("camvid", "train", root=str(tutorial_camvid))
    image, label = images[0]
    assert label.unique().tolist() == [*range(11), IGNORE]
    assert (image[:, label == IGNORE] == 0).all()
    colors = torch.from_numpy(CamVid.colors).long()
    inside = label != IGNORE
    assert torch.equal(image[:, inside].long(), colors[label[inside].long()].T)


def test_camvid_is_resized_without_mixing_labels(tutorial_camvid):
    images = open_dataset("camvid", "train", root=str(tutorial_camvid), size=(9, 12))
    image, label = images[0]
    assert image.shape == (3, 9, 12) and label.shape == (9, 12)
    whole = open_dataset("camvid", "train", root=str(tutorial_camvid))[0][1]
    assert torch.equal(label.unique(), whole.unique())
    inside = label != IGNORE
    colors = torch.from_numpy(CamVid.colors).long()
    assert torch.equal(image[:, inside].long(), colors[label[inside].long()].T)


def test_a_palette_annotation_is_read_as_its_indices(tutorial_camvid):
    images = open_dataset("camvid", "train", root=str(tutorial_camvid))
    before = images[0][1]
    path = images.pairs[0][1]
    with Image.open(path) as plain:
        palette = Image.fromarray(np.array(plain))
    palette.putpalette([v for k in range(12) for v in (255 - 20 * k, 3 * k, 99)])
    assert palette.mode == "P"
    palette.save(path)
    again = open_dataset("camvid", "train", root=str(tutorial_camvid))
    assert torch.equal(again[0][1], before)


def set_pixel(path, value: int) -> None:
    with Image.open(path) as image:
        array = np.array(image)
    array[0, 0] = value
    Image.fromarray(array).save(path)


def truncate(path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


# (what to break, in the .jpg layout; words of the one line that must name the file)
BROKEN = {
    "truncated JPEG": (lambda i, a: truncate(i), ["train/frame_000.jpg", "truncated"]),
    "empty JPEG": (lambda i, a: i.write_bytes(b""), ["train/frame_000.jpg"]),
    "truncated PNG": (lambda i, a: truncate(a), ["trainannot/frame_000.png", "truncated"]),
    "text as PNG": (lambda i, a: a.write_text("hello"), ["trainannot/frame_000.png"]),
    "size": (
        lambda i, a: Image.new("L", (5, 7)).save(a),
        ["trainannot/frame_000.png", "5 x 7", "24 x 18"],
    ),
    "value": (lambda i, a: set_pixel(a, 12), ["trainannot/frame_000.png", "12", "0 to 10", "11"]),
    "RGB annotation": (
        lambda i, a: Image.new("RGB", (24, 18)).save(a),
        ["trainannot/frame_000.png", "RGB"],
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_is_named_in_one_line(camvid, what):
    spoil, words = BROKEN[what]
    images = open_dataset("camvid", "train", root=str(camvid))
    spoil(*images.pairs[0])
    assert_refused(words, lambda: images[0])
    images[1]  # the others can still be read


LAYOUTS = {
    "no folder": (lambda root: shutil.rmtree(root), ["data_root", "no such folder"]),
    "no list": (lambda root: (root / "train.txt").unlink(), ["train.txt"]),
    "empty list": (lambda root: (root / "train.txt").write_text("\n"), ["train.txt", "empty"]),
    "odd list": (lambda root: (root / "train.txt").write_text("a b\nc\n"), ["train.txt", "'c'"]),
    "missing image": (lambda root: (root / "train/frame_003.jpg").unlink(), ["frame_003.jpg"]),
    "missing label": (lambda root: (root / "trainannot/frame_003.png").unlink(), ["frame_003.png"]),
}


@pytest.mark.parametrize("what", LAYOUTS)
def test_a_broken_folder_is_named_in_one_line(camvid, what):
    spoil, words = LAYOUTS[what]
    spoil(camvid)
    assert_refused(words, open_dataset, "camvid", "train", root=str(camvid))


def test_no_folder_at_all_is_refused():
    with pytest.raises(ValueError, match="data_root=''"):
        open_dataset("camvid", "train")


def test_the_real_camvid_has_its_367_101_233_frames_and_all_classes(shared):
    root = str(shared("data", "CamVid"))
    counts = Counter()
    for part, length in (("train", 367), ("val", 101), ("test", 233)):
        images = open_dataset("camvid", part, root=root)
        assert len(images) == len(set(images.ids)) == length
        for i in (0, length // 2, length - 1):
            image, label = images[i]
            assert image.shape == (3, 360, 480) and label.shape == (360, 480)
            counts.update(label.unique().tolist())
    assert set(counts) == {*range(11), IGNORE}


# ---------------------------------------------------------------- views

IDENTITY = torch.tensor([[[1.0, 0, 0], [0, 1.0, 0]]])
COLOURS = torch.tensor(
    [[10, 240, 30, 200], [0, 80, 160, 240], [250, 130, 60, 5]], dtype=torch.uint8
)


def blocks(height: int = 24, width: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """An image of flat 8 x 8 blocks whose colour says its label, and the label."""
    rng = np.random.default_rng(0)
    label = torch.from_numpy(rng.integers(0, 4, (height // 8, width // 8)).astype(np.uint8))
    label = label.repeat_interleave(8, 0).repeat_interleave(8, 1)
    return COLOURS[:, label.long()], label


@pytest.mark.parametrize("outside", ["reflect", "void"])
def test_the_identity_map_returns_image_and_label(outside):
    image, label = blocks()
    views = Views((24, 32), outside=outside)
    torch.testing.assert_close(views.crop_images([image], IDENTITY)[0] * 255, image.float())
    assert torch.equal(views.crop_labels([label], IDENTITY)[0], label.long())
    assert views.valid([image], IDENTITY).all()


def draw_maps(views: Views, count: int, height: int = 24, width: int = 32) -> torch.Tensor:
    rngs = [np.random.default_rng(i) for i in range(count)]
    return torch.from_numpy(np.stack([views.draw_crop(r, height, width) for r in rngs]))


@pytest.mark.parametrize("outside", ["reflect", "void"])
@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.5, 0.9), (1.2, 2.0), (0.5, 2.0)])
def test_labels_follow_images_under_scale_flip_and_crop(outside, scale):
    image, label = blocks()
    views = Views((20, 28), scale=scale, outside=outside)
    maps = draw_maps(views, 12)
    images = views.crop_images([image] * 12, maps) * 255
    labels = views.crop_labels([label] * 12, maps)
    nearest = (images[:, None] - COLOURS.T[None, :, :, None, None].float()).norm(dim=2).argmin(1)
    inside = labels != IGNORE
    # Blended pixels on the seams may look like a third colour; elsewhere both must agree.
    assert (nearest == labels)[inside].float().mean() > 0.93
    assert inside.float().mean() > 0.3
    assert len({m.tobytes() for m in maps.numpy()}) == 12


def test_a_flip_mirrors_image_and_label():
    image, label = blocks()
    views = Views((24, 32))
    flip = IDENTITY * torch.tensor([-1.0, 1, 1])
    torch.testing.assert_close(views.crop_images([image], flip)[0] * 255, image.flip(2).float())
    assert torch.equal(views.crop_labels([label], flip)[0], label.flip(1).long())


def test_about_half_of_the_views_are_flipped():
    maps = draw_maps(Views((24, 32)), 400)
    assert 0.4 < (maps[:, 0, 0] < 0).float().mean() < 0.6


def test_zoom_stays_between_its_bounds():
    maps = draw_maps(Views((24, 32), scale=(0.5, 2.0)), 300)
    zoom = 1 / maps[:, 0, 0].abs()
    assert 0.5 <= zoom.min() < 0.56 and 1.9 < zoom.max() <= 2.0
    torch.testing.assert_close(maps[:, 0, 0].abs(), maps[:, 1, 1])


def test_a_window_smaller_than_the_image_stays_inside_it():
    maps = draw_maps(Views((24, 32), scale=(1.0, 2.0)), 200)
    reach = maps[:, [0, 1], [0, 1]].abs() + maps[:, :, 2].abs()
    assert reach.max() <= 1 + 1e-6


def test_void_padding_is_ignored_exactly_where_the_view_shows_no_image():
    image, label = blocks()
    views = Views((24, 32), scale=(0.5, 0.95), outside="void")
    maps = draw_maps(views, 64)
    valid = views.valid([image] * 64, maps)
    labels = views.crop_labels([label] * 64, maps)
    pixels = views.crop_images([image] * 64, maps)
    assert torch.equal(valid, labels != IGNORE)
    assert 0.2 < valid.float().mean() < 0.95
    far = ~torch.nn.functional.max_pool2d(valid[:, None].float(), 3, 1, 1)[:, 0].bool()
    assert (pixels.transpose(0, 1)[:, far] == 0).all()


def test_reflection_shows_the_image_everywhere():
    image, label = blocks()
    views = Views((24, 32), scale=(0.5, 0.9), outside="reflect")
    maps = draw_maps(views, 16)
    assert views.valid([image] * 16, maps).all()
    assert (views.crop_labels([label] * 16, maps) < 4).all()


def test_views_of_images_of_different_sizes_are_those_of_each_alone():
    (a, la), (b, lb) = blocks(24, 32), blocks(40, 24)
    views = Views((20, 20))
    maps = draw_maps(views, 2)
    both = views.crop_images([a, b], maps), views.crop_labels([la, lb], maps)
    for i, (image, label) in enumerate(((a, la), (b, lb))):
        assert torch.equal(both[0][i], views.crop_images([image], maps[i : i + 1])[0])
        assert torch.equal(both[1][i], views.crop_labels([label], maps[i : i + 1])[0])


# (brightness, contrast, saturation, hue angle, grey, blur, jitter)
NOTHING = [1.0, 1, 1, 0, 0, 0, 1]


@pytest.fixture
def photo() -> torch.Tensor:
    return torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(0)) * 0.6 + 0.2


@pytest.mark.parametrize("draws", [NOTHING, [1.4, 0.6, 1.3, 0.2, 0, 0, 0]])
def test_colour_without_effect_returns_the_image(photo, draws):
    torch.testing.assert_close(
        colour_jitter(photo, torch.tensor([draws])), photo, atol=1e-5, rtol=0
    )


def test_colour_operations_do_what_their_names_say(photo):
    def with_draw(place: int, value: float) -> torch.Tensor:
        draws = torch.tensor([NOTHING])
        draws[0, place] = value
        return colour_jitter(photo, draws)

    torch.testing.assert_close(with_draw(0, 1.1), photo * 1.1, atol=1e-5, rtol=0)
    assert with_draw(1, 0.5).std() < 0.6 * photo.std()
    torch.testing.assert_close(with_draw(1, 0.5).mean(), photo.mean(), atol=1e-5, rtol=0)
    grey = with_draw(4, 1)
    assert torch.equal(grey[:, 0], grey[:, 1]) and torch.equal(grey[:, 0], grey[:, 2])
    torch.testing.assert_close(with_draw(2, 0.0), grey, atol=5e-3, rtol=0)
    luma = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    turned = with_draw(3, 0.3)
    assert (turned - photo).abs().max() > 0.02
    torch.testing.assert_close((turned * luma).sum(1), (photo * luma).sum(1), atol=5e-3, rtol=0)
    blurred = with_draw(5, 1)
    mean = photo[0, :, 4:7, 4:7].mean((1, 2))
    torch.testing.assert_close(blurred[0, :, 5, 5], mean, atol=1e-5, rtol=0)


def test_colour_stays_a_picture():
    views = Views((8, 8), jitter=0.9, hue=0.5)
    draws = np.stack([views.draw_colour(np.random.default_rng(i)) for i in range(64)])
    image = torch.rand(64, 3, 8, 8)
    out = colour_jitter(image, torch.from_numpy(draws))
    assert out.min() >= 0 and out.max() <= 1 and (out != image).any()
    assert 0.6 < draws[:, 6].mean() < 0.95 and draws[:, :3].min() >= 0.1 - 1e-6


# ---------------------------------------------------------------- loader


@pytest.fixture
def loader(camvid):
    """A function that makes a loader over 6 frames, 2 of them labeled."""
    images = open_dataset("camvid", "train", root=str(camvid))

    def make(
        batch=2, unlabeled_batch=2, seed=0, method="cutmix_seg", method_args=(), labeled=2, **view
    ):
        method = METHODS[method](partial(build_net, "tiny", 11), **dict(method_args))
        chosen = split(images, "camvid", labeled, 0)
        return Loader(
            images,
            chosen,
            Views((16, 20), **view),
            method,
            batch=batch,
            unlabeled_batch=unlabeled_batch,
            seed=seed,
            mean=(0.5,) * 3,
            std=(0.25,) * 3,
            device=torch.device("cpu"),
        )

    return make


def test_an_epoch_shows_every_unlabeled_image_once(loader):
    made = loader(unlabeled_batch=2)
    assert made.steps_per_epoch == 2
    orders = []
    for epoch in range(4):
        steps = range(epoch * 2, epoch * 2 + 2)
        entries = [e for step in steps for e in made.unlabeled_at(step)]
        assert {e for e, _ in entries} == {epoch}
        orders.append([index for _, index in entries])
        assert sorted(orders[-1]) == sorted(made.split.unlabeled)
    assert len({tuple(order) for order in orders}) > 1


def test_the_last_batch_of_an_epoch_is_filled_from_its_start(loader):
    made = loader(unlabeled_batch=3)
    assert made.steps_per_epoch == 2
    indices = [i for step in range(2) for _, i in made.unlabeled_at(step)]
    assert indices[4:] == indices[:2] and set(indices) == set(made.split.unlabeled)


def test_the_labeled_list_is_cycled_through_fairly(loader):
    made = loader(batch=3, labeled=4)
    entries = [entry for step in range(8) for entry in made.labeled_at(step)]
    counts = Counter(index for _, index in entries)
    assert set(counts) == set(made.split.labeled) and set(counts.values()) == {6}
    for turn in range(6):
        passed = [index for t, index in entries if t == turn]
        assert sorted(passed) == sorted(made.split.labeled)


@pytest.mark.parametrize("name", [n for n, kind in METHODS.items() if kind.uses_unlabeled])
def test_a_sample_gets_the_same_views_whatever_the_batch_size(loader, name):
    kind = {"method": name}
    one, two, four = loader(1, 1, **kind), loader(2, 2, **kind), loader(2, 4, **kind)
    single = [one[step] for step in range(4)]
    for field in ("weak", "valid"):
        wanted = torch.cat([getattr(b, field) for b in single])
        assert torch.equal(torch.cat([getattr(two[s], field) for s in range(2)]), wanted)
        assert torch.equal(getattr(four[0], field), wanted)
    assert len(four[0].strong) == len(single[0].strong)
    for view, strong in enumerate(four[0].strong):
        assert torch.equal(strong, torch.cat([b.strong[view] for b in single]))
    labeled = torch.cat([b.image for b in single[:2]])
    assert torch.equal(two[0].image, labeled)
    assert torch.equal(two[0].label, torch.cat([b.label for b in single[:2]]))


def test_ranks_share_a_batch_without_overlap(loader, monkeypatch):
    whole = loader(4, 4)[1]
    monkeypatch.setattr(distributed, "world", lambda: 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(loader(4, 4)[1])
    for field in ("image", "label", "weak", "valid"):
        assert torch.equal(torch.cat([getattr(s, field) for s in shares]), getattr(whole, field))
    assert torch.equal(torch.cat([s.strong[0] for s in shares]), whole.strong[0])
    with pytest.raises(ValueError, match="batch=3"):
        loader(3, 4)


def test_a_share_of_one_unlabeled_image_is_warned_of(loader, monkeypatch):
    """Mixing takes partners from a process's share: alone, an image would show itself unnoticed."""
    monkeypatch.setattr(distributed, "world", lambda: 2)
    with pytest.warns(UserWarning, match="unlabeled_batch=2 on 2 processes"):
        loader(2, 2)
    loader(2, 2, method="supervised")
    loader(2, 4)


def test_batches_follow_seed_and_step(loader):
    a, same, other = loader(seed=1), loader(seed=1), loader(seed=2)
    assert torch.equal(a[5].weak, same[5].weak) and torch.equal(a[5].image, same[5].image)
    assert not torch.equal(a[5].image, a[6].image)
    assert not torch.equal(a[5].image, other[5].image)
    assert not torch.equal(a[0].weak, a[2].weak)  # another epoch, other views


def test_a_method_gets_the_views_it_declares_and_no_others(loader):
    batch = loader(method="supervised", unlabeled_batch=2)[0]
    assert len(batch.image) == 2 and len(batch.weak) == len(batch.valid) == 0
    assert batch.strong == ()
    batch = loader(method="cutmix_seg", unlabeled_batch=4)[0]
    assert len(batch.weak) == 4 and len(batch.strong) == 1
    assert batch.weak.shape == batch.strong[0].shape == (4, 3, 16, 20)
    assert batch.label.dtype == torch.int64 and batch.valid.dtype == torch.bool


def test_a_second_crop_shows_the_same_images_elsewhere(loader):
    same = loader(method="unimatch", method_args={"partner": "same"}, unlabeled_batch=4, blur=0.0)
    plain = loader(method="unimatch", unlabeled_batch=4, blur=0.0)[0]
    batch = same[0]
    assert plain.second is None and torch.equal(plain.weak, batch.weak)
    assert all(map(torch.equal, plain.strong, batch.strong))
    second = batch.second
    assert second.weak.shape == batch.weak.shape and second.valid.shape == batch.valid.shape
    assert len(second.strong) == 2 and not torch.equal(second.weak, batch.weak)
    for view, strong in zip(second.strong, batch.strong, strict=True):
        assert not torch.equal(view, second.weak) and not torch.equal(view, strong)
    assert torch.equal(same[0].second.weak, second.weak)
    size = same.images[0][1].shape
    flat = [
        (torch.full((3, *size), 40 * i, dtype=torch.uint8), same.images[i][1]) for i in range(6)
    ]
    same.images = flat
    batch = same[0]
    images = [x.amax((1, 2, 3)) for x in (batch.weak, batch.second.weak)]
    torch.testing.assert_close(*images)
    assert len({round(x, 3) for x in images[0].tolist()}) == 4


def test_strong_views_show_the_weak_crop_in_other_colours(loader):
    plain = loader(jitter=0.0, hue=0.0, blur=0.0, grey=0.0)[0]
    torch.testing.assert_close(plain.strong[0], plain.weak, atol=1e-4, rtol=0)
    batch = loader(unlabeled_batch=4)[0]
    assert (batch.strong[0] - batch.weak).abs().mean() > 0.05


def test_noisy_views_are_the_weak_crop_with_noise_of_their_own(loader):
    noisy = {"method": "mean_teacher", "method_args": {"views": "noise"}, "noise": 0.2}
    batch = loader(**noisy, unlabeled_batch=4)[0]
    assert len(batch.strong) == 2
    noises = [view - batch.weak for view in batch.strong]
    for noise in noises:
        assert 0.19 < noise.std() < 0.21 and noise.mean().abs() < 0.01
        assert not torch.equal(noise[0], noise[1])
    assert (noises[0] * noises[1]).mean().abs() < 0.002
    silent = loader(**{**noisy, "noise": 0.0})[0]
    assert torch.equal(silent.strong[0], silent.weak)


def test_images_are_normalised(loader):
    made = loader(scale=(1.0, 1.0))
    image = made[0].image * 0.25 + 0.5
    assert -1e-5 < image.min() and image.max() < 1 + 1e-5 and image.max() > 0.7


def test_a_batch_larger_than_the_list_sees_different_views(loader):
    batch = loader(batch=4, unlabeled_batch=8)[0]
    assert not torch.equal(batch.weak[0], batch.weak[4])


def test_nothing_left_unlabeled_is_refused_for_methods_that_want_some(loader):
    with pytest.raises(ValueError, match="nothing is left unlabeled"):
        loader(labeled=6)
    assert loader(labeled=6, method="supervised").steps_per_epoch == 3
