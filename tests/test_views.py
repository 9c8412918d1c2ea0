"""Published augmentation families: geometry and colour against their sources, and the loader."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import threading
import typing
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from conftest import equal, tiny_config
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from s4lib import distributed
from s4lib.bench import tables
from s4lib.cli import main
from s4lib.config import Config
from s4lib.data import colour, open_dataset
from s4lib.data.colour import OPERATIONS, jitter_normalised, recolour
from s4lib.data.families import FAMILIES, FamilyViews, build_views, cubic
from s4lib.data.images import Images
from s4lib.data.loader import Loader
from s4lib.data.splits import Split
from s4lib.data.views import Views
from s4lib.losses import IGNORE
from s4lib.method import Method
from s4lib.trainer import fit

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CENTRED = ("u2pl", "cps")
MIRRORED = ("ps_mt", "unimatch")  # padding is flipped with the image


class Odd(Images):
    """Six images of different odd sizes, whose colour tells the label: red = 20 label."""

    classes = ("a", "b", "c", "d", "e")
    sizes = ((37, 51), (51, 37), (40, 40), (23, 61), (65, 29), (33, 47))
    ids = [f"odd-{i}" for i in range(6)]

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        height, width = self.sizes[index]
        rng = np.random.default_rng(index)
        label = np.kron(rng.integers(0, 5, (9, 9)), np.ones((8, 8)))[:height, :width]
        image = rng.integers(0, 256, (height, width, 3))
        image[:, :, 0] = 20 * label + 60
        return image.astype(np.uint8), label.astype(np.uint8)


class Wants(Method):
    """What a method may ask of the loader; it is never trained."""

    def __init__(self, strong_views=1, labeled_strong=False, family="colour", order="shuffled"):
        torch.nn.Module.__init__(self)  # without networks
        self.strong_views, self.labeled_strong = strong_views, labeled_strong
        self.family, self.unlabeled_order = family, order


def views_of(name: str, crop: tuple[int, int] = (32, 40), **changes) -> FamilyViews:
    return FamilyViews(FAMILIES[name], crop, **{"mean": MEAN, **changes})


def fixed(name: str, size: tuple[int, int], crop: tuple[int, int], **changes) -> FamilyViews:
    """The family's views of images resized to one size."""
    family = dataclasses.replace(
        FAMILIES[name], resize=lambda *_: size, distort=colour.draw_none, class_share=1.0
    )
    return FamilyViews(family, crop, **{"mean": MEAN, **changes})


def loader(views, method=None, *, batch=2, unlabeled_batch=3, seed=0, images=None, **options):
    images = images or Odd()
    return Loader(
        images,
        Split((0, 1), tuple(range(2, len(images))), ""),
        views,
        method or Wants(),
        batch=batch,
        unlabeled_batch=unlabeled_batch,
        seed=seed,
        mean=MEAN,
        std=STD,
        device=options.pop("device", torch.device("cpu")),
        **options,
    )


def flipped(seed: int) -> bool:
    """Whether a crop drawn with this seed is flipped: the first number decides."""
    return np.random.default_rng(seed).uniform() < 0.5


FLIP, PLAIN = (next(s for s in range(99) if flipped(s) == wanted) for wanted in (True, False))


def random_image(height: int, width: int, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (3, height, width)).astype(np.uint8))


def photo(height: int = 48, width: int = 64) -> torch.Tensor:
    """A smooth uint8 image with every kind of colour."""
    coarse = random_image(6, 8, seed=5).float()[None]
    return F.interpolate(coarse, (height, width), mode="bicubic")[0].clamp(0, 255).byte()


# ---------------------------------------------------------------- geometry


def test_every_family_can_be_chosen_and_no_other():
    names = typing.get_args(typing.get_type_hints(Config)["augment"])
    assert set(names) == {"s4", *FAMILIES}
    for name in names:
        built = build_views(Config(augment=name, crop=(9, 11)), (5, 5), MEAN)
        assert built.crop == (9, 11) and isinstance(built, Views if name == "s4" else FamilyViews)
    assert build_views(Config(augment="cps"), (5, 7), MEAN).crop == (5, 7)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"augment": "unimath"}, "augment='unimath': choose one of s4, u2pl, cps, ps_mt, unimatch"),
        ({"augment": "cps", "jitter": 0.1}, "jitter=0.1: augment='cps' has no such setting"),
        ({"augment": "cps", "scale": (0.5, 2.0)}, "scale=.*augment='cps'"),
        ({"resize_base": 500}, "resize_base=500: augment='s4' has no such setting"),
        ({"pad_label": 0}, "pad_label=0: augment='s4'"),
        ({"augment": "u2pl", "pad_label": 7}, "pad_label=7: choose one of 255, 0"),
        ({"augment": "u2pl", "resize_base": -1}, "resize_base=-1: choose 0 or more"),
    ],
)
def test_settings_that_mean_nothing_are_refused_in_one_line(changes, words):
    with pytest.raises(ValueError, match=words) as error:
        Config(**changes)
    assert "\n" not in str(error.value)


def sizes(name: str, height: int, width: int, base: int = 0) -> list[tuple[int, int]]:
    resize = FAMILIES[name].resize
    return [resize(np.random.default_rng(i), height, width, base) for i in range(2000)]


@pytest.mark.parametrize("name", FAMILIES)
def test_zoom_is_drawn_between_a_half_and_two_and_keeps_proportions(name):
    drawn = np.array(sizes(name, 360, 480))
    zoom = drawn / (360, 480)
    assert zoom.min() > 0.495 and zoom.max() < 2.005
    assert zoom.min() < 0.51 and zoom.max() > 1.98
    assert np.abs(drawn[:, 0] - 0.75 * drawn[:, 1]).max() <= 1


def test_u2pl_reduces_as_often_as_it_enlarges():
    zoom = np.array(sizes("u2pl", 1000, 800))[:, 0] / 1000
    assert 0.47 < (zoom < 1).mean() < 0.53
    # Uniform on each side, so that half of the enlarged are below 1.5 and of the reduced 0.75.
    assert 0.45 < (zoom[zoom >= 1] < 1.5).mean() < 0.55
    assert 0.45 < (zoom[zoom < 1] < 0.75).mean() < 0.55


def test_cps_has_six_zooms_without_one_and_a_quarter():
    counts = Counter(sizes("cps", 100, 60))
    wanted = [(50, 30), (75, 45), (100, 60), (150, 90), (175, 105), (200, 120)]
    assert sorted(counts) == wanted and min(counts.values()) > 250


@pytest.mark.parametrize("name", ["ps_mt", "unimatch", "augseg"])
def test_the_longer_side_becomes_any_whole_number(name):
    tall = sizes(name, 31, 20)
    assert {height for height, _ in tall} == set(range(15, 63))
    assert all(width == int(20 * height / 31 + 0.5) for height, width in tall)
    assert {width for _, width in sizes(name, 375, 500, base=600)} <= set(range(300, 1201))


def test_dual_teacher_scales_the_shorter_side_and_bounds_the_longer():
    drawn = np.array(sizes("dual_teacher", 256, 300, base=512))
    assert drawn[:, 0].min() < 270 and drawn[:, 0].max() > 1000 and (drawn[:, 0] <= 1024).all()
    wide = np.array(sizes("dual_teacher", 100, 1000, base=512))  # 2048 is met before 512
    assert wide[:, 1].max() <= 4096 and wide[:, 0].max() <= 410


@pytest.mark.parametrize("name", ["u2pl", "cps"])
def test_a_base_size_stands_for_the_longer_side(name):
    long = np.array(sizes(name, 300, 400, base=100)).max(1)
    assert long.min() >= 49 and 190 < long.max() <= 200


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("seed", [PLAIN, FLIP])
def test_without_zoom_the_image_comes_back_exactly(name, seed):
    image, label = Odd()[0]
    views = fixed(name, image.shape[1:], image.shape[1:])
    crops = [views.draw_crop(np.random.default_rng(seed), *image.shape[1:], label)]
    turn = (lambda x: x.flip(-1)) if seed == FLIP else (lambda x: x)
    assert torch.equal(views.crop_images([image], crops)[0], turn(image / 255))
    assert torch.equal(views.crop_labels([label], crops)[0], turn(label.long()))
    assert views.valid([image], crops).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_half_of_the_views_are_flipped(name):
    image = torch.arange(40, dtype=torch.uint8).expand(3, 20, 40)
    views = fixed(name, (20, 40), (20, 40))
    rngs = [np.random.default_rng(i) for i in range(400)]
    crops = [views.draw_crop(rng, 20, 40) for rng in rngs]
    first = views.crop_images([image] * 400, crops)[:, 0, 0, 0] * 255
    assert set(first.unique().tolist()) == {0, 39} and 160 < (first == 39).sum() < 240
    assert [bool(f == 39) for f in first] == [flipped(i) for i in range(400)]


def resized_by_a_library(name: str, image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    if FAMILIES[name].antialias:  # PIL, 8 bits
        filters = Image.Resampling
        kernel = filters.BICUBIC if name == "ps_mt" else filters.BILINEAR
        small = TF.to_pil_image(image).resize(size[::-1], kernel)
        return TF.pil_to_tensor(small).float()
    return F.interpolate(image[None].float(), size, mode="bilinear", align_corners=False)[0]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("size", [(17, 21), (48, 63), (80, 110), (9, 11)])
def test_resizing_is_that_of_the_original_library(name, size):
    image = random_image(37, 51)
    views = fixed(name, size, size)
    crops = [views.draw_crop(np.random.default_rng(PLAIN), 37, 51)]
    got = views.crop_images([image], crops)[0] * 255
    wanted = resized_by_a_library(name, image, size)
    # PIL rounds after each axis: half a level each, times the cubic's weights.
    atol = 1.3 if FAMILIES[name].antialias else 1e-3
    torch.testing.assert_close(got, wanted, atol=atol, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("seed", [PLAIN, FLIP])
def test_a_crop_is_a_window_of_the_resized_image(name, seed):
    """Only the crop is computed; it must equal a crop of everything, image and annotation."""
    image, label = Odd()[1]
    size, crop = (90, 70), (32, 40)
    whole, part = fixed(name, size, size), fixed(name, size, crop)
    every = [whole.draw_crop(np.random.default_rng(seed), *label.shape)]
    drawn = [part.draw_crop(np.random.default_rng(seed), *label.shape)]
    pixels, labels = whole.crop_images([image], every)[0], whole.crop_labels([label], every)[0]
    got, annotation = part.crop_images([image], drawn)[0], part.crop_labels([label], drawn)[0]
    inside = part.valid([image], drawn)[0]
    height, width = int(inside.sum(0).max()), int(inside.sum(1).max())
    windows = pixels[:, :, :].unfold(1, height, 1).unfold(2, width, 1)
    difference = (windows - got[:, None, None, :height, :width]).abs().amax((0, 3, 4))
    top, left = divmod(int(difference.argmin()), difference.shape[1])
    assert difference.min() < 1e-5 and (difference < 1e-3).sum() == 1
    found = labels[top : top + height, left : left + width]
    assert torch.equal(annotation[:height, :width], found)


@pytest.mark.parametrize("name", FAMILIES)
def test_crops_lie_anywhere_and_end_with_the_image(name):
    views = fixed(name, (12, 12), (10, 10))
    firsts = Counter()
    for seed in range(600):
        crop = views.draw_crop(np.random.default_rng(seed), 12, 12)
        shown = crop.rows.nearest
        firsts[int(shown[0])] += 1
        assert np.array_equal(shown, np.arange(shown[0], min(shown[0] + 10, 12)))
    # CPS draws one place too many: its last crop ends with a row of padding.
    assert set(firsts) == ({0, 1, 2, 3} if name == "cps" else {0, 1, 2})
    assert min(firsts.values()) > 100


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("seed", [PLAIN, FLIP])
def test_padding_lies_where_the_original_has_it(name, seed):
    image = torch.full((3, 10, 13), 200, dtype=torch.uint8)
    label = torch.full((10, 13), 3, dtype=torch.uint8)
    views = fixed(name, (10, 13), (15, 20))
    crops = [views.draw_crop(np.random.default_rng(seed), 10, 13)]
    top, left = (2, 3) if name in CENTRED else (0, 0)  # the smaller half comes first
    if name in MIRRORED and seed == FLIP:
        left = 20 - 13
    valid = torch.zeros(15, 20, dtype=torch.bool)
    valid[top : top + 10, left : left + 13] = True
    assert torch.equal(views.valid([image], crops)[0], valid)
    labels = views.crop_labels([label], crops)[0]
    assert (labels[valid] == 3).all() and (labels[~valid] == IGNORE).all()
    pixels = views.crop_images([image], crops)[0]
    fill = torch.zeros(3) if name == "unimatch" else torch.tensor(MEAN)
    assert torch.equal(pixels[:, ~valid], fill[:, None].expand(3, int((~valid).sum())))
    torch.testing.assert_close(pixels[:, valid], torch.full((3, 130), 200 / 255))


def test_padding_is_zero_once_normalised_except_for_unimatch():
    for name in FAMILIES:
        views = fixed(name, (10, 10), (32, 40))
        batch = loader(views)[0]
        pixels = batch.weak.permute(0, 2, 3, 1)[~batch.valid]
        assert (pixels == 0).all() if name != "unimatch" else (pixels < -1.7).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_can_have_label_0_as_u2pl_and_gta_seg_published(name):
    label = torch.full((10, 13), 3, dtype=torch.uint8)
    views = fixed(name, (10, 13), (15, 20), pad_label=0)
    crops = [views.draw_crop(np.random.default_rng(0), 10, 13)]
    labels, valid = views.crop_labels([label], crops)[0], views.valid([label], crops)[0]
    assert (labels[~valid] == 0).all() and (labels[valid] == 3).all()
    assert not valid.all()  # what is padding stays known
    assert build_views(Config(augment=name, pad_label=0), (5, 5), MEAN).pad_label == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_labels_are_never_interpolated_and_follow_the_image(name):
    images = Odd()
    views = views_of(name)
    views = dataclasses.replace(
        views, family=dataclasses.replace(views.family, distort=colour.draw_none)
    )
    for seed in range(12):
        image, label = images[seed % 6]
        crops = [views.draw_crop(np.random.default_rng(seed), *label.shape, label)]
        labels, valid = views.crop_labels([label], crops)[0], views.valid([image], crops)[0]
        assert set(labels.unique().tolist()) <= {0, 1, 2, 3, 4, IGNORE}
        assert (labels[valid] != IGNORE).all() and (labels[~valid] == IGNORE).all()
        red = views.crop_images([image], crops)[0, 0] * 255
        flat = (red[valid] - 60) / 20
        assert (flat.round().long() == labels[valid]).float().mean() > 0.75  # blended at seams


def test_void_stays_void():
    label = torch.full((30, 30), IGNORE, dtype=torch.uint8)
    label[:, 15:] = 2
    for name in FAMILIES:
        views = views_of(name)
        crops = [views.draw_crop(np.random.default_rng(i), 30, 30, label) for i in range(8)]
        assert set(views.crop_labels([label] * 8, crops).unique().tolist()) == {2, IGNORE}


def test_dual_teacher_avoids_crops_of_one_class():
    """MMSegmentation's cat_max_ratio: ten more tries while a class fills three quarters."""
    label = torch.zeros(200, 200, dtype=torch.uint8)
    label[:, 120:] = 1
    image = random_image(200, 200)

    def share(views):
        seen = []
        for seed in range(60):
            crops = [views.draw_crop(np.random.default_rng(seed), 200, 200, label)]
            seen.append(views.crop_labels([label], crops)[0].bool().float().mean())
        assert views.crop_images([image], crops).shape == (1, 3, 60, 60)
        return np.mean([0.25 < s < 0.75 for s in seen])

    views = fixed("dual_teacher", (200, 200), (60, 60))
    wants = dataclasses.replace(views.family, class_share=0.75)
    assert share(views) < 0.35 < 0.8 < share(dataclasses.replace(views, family=wants))


def test_a_large_image_costs_what_its_crop_costs():
    views = fixed("unimatch", (2000, 3000), (32, 40))
    rows, columns, _ = views.draw_crop(np.random.default_rng(0), 2000, 3000)
    assert rows.window.stop - rows.window.start == 32
    assert columns.window.stop - columns.window.start == 40
    half = fixed("unimatch", (1000, 1500), (32, 40)).draw_crop(np.random.default_rng(0), 2000, 3000)
    assert half.rows.window.stop - half.rows.window.start <= 2 * 32 + 4


def test_the_cubic_is_pils():
    x = np.array([0, 0.5, 1, 1.5, 2, 2.5])
    np.testing.assert_allclose(cubic(-x), [1, 0.5625, 0, -0.0625, 0, 0], atol=1e-12)


# ---------------------------------------------------------------- colour

PIL = {
    "brightness": lambda p, v: ImageEnhance.Brightness(p).enhance(v),
    "contrast": lambda p, v: ImageEnhance.Contrast(p).enhance(v),
    "saturation": lambda p, v: ImageEnhance.Color(p).enhance(v),
    "sharpness": lambda p, v: ImageEnhance.Sharpness(p).enhance(v),
    "hue": lambda p, v: TF.adjust_hue(p, v),
    "grey": lambda p, _: ImageOps.grayscale(p).convert("RGB"),
    "blur": lambda p, v: p.filter(ImageFilter.GaussianBlur(v[0])),
    "autocontrast": lambda p, _: ImageOps.autocontrast(p),
    "equalize": lambda p, _: ImageOps.equalize(p),
    "posterize": lambda p, v: ImageOps.posterize(p, v),
    "solarize": lambda p, v: ImageOps.solarize(p, round(255 * v)),
}


@pytest.mark.parametrize(
    ("name", "value", "largest", "mean"),
    [
        ("brightness", 1.4, 1, 0.6),
        ("brightness", 0.3, 1, 0.6),
        ("contrast", 0.4, 1.5, 0.8),
        ("contrast", 1.5, 1.5, 0.8),
        ("saturation", 0.2, 1.5, 0.8),
        ("saturation", 1.5, 2, 0.8),
        ("sharpness", 0.1, 1.5, 0.8),
        ("hue", 0.2, 12, 2.5),  # PIL's HSV has 8 bits
        ("hue", -0.25, 12, 2.5),
        ("grey", None, 1, 0.6),
        ("blur", (1.3, 4), 6, 1.2),  # PIL approximates the Gaussian by boxes
        ("autocontrast", None, 2, 0.8),
        ("equalize", None, 1, 0.1),
        ("posterize", 4, 1, 0.6),
        ("solarize", 128 / 255, 1, 0.1),
    ],
)
def test_an_operation_does_what_pil_does(name, value, largest, mean):
    """In grey levels; PIL rounds down, and so does each of its steps."""
    image = (0.6 * photo() + 40).byte()
    got = recolour(image / 255, [(name, value)]) * 255
    wanted = TF.pil_to_tensor(PIL[name](TF.to_pil_image(image), value)).float()
    difference = (got - wanted).abs()
    assert difference.max() <= largest and difference.mean() <= mean, (
        difference.max(),
        difference.mean(),
    )
    assert (got - image).abs().max() > 3  # it does something
    assert got.min() >= 0 and got.max() <= 255


@pytest.mark.parametrize("shift", [-0.5, -0.2, 0.0, 0.07, 0.25, 0.5])
def test_hue_is_torchvisions(shift):
    image = torch.cat([photo().float() / 255, random_image(9, 64).float() / 255], 1)
    image[:, 0] = 0.3  # grey has no hue
    image[:, 1] = torch.eye(3)[:, torch.arange(64) % 3]
    torch.testing.assert_close(
        recolour(image, [("hue", shift)]), TF.adjust_hue(image, shift), atol=2e-5, rtol=0
    )


def test_hsv_saturation_keeps_hue_and_value():
    import colorsys

    image = random_image(4, 5) / 255
    for factor in (0.5, 1.0, 1.5):
        got = recolour(image, [("hsv saturation", factor)])
        for before, after in zip(image.flatten(1).T.tolist(), got.flatten(1).T, strict=True):
            h, s, v = colorsys.rgb_to_hsv(*before)
            wanted = torch.tensor(colorsys.hsv_to_rgb(h, min(1, s * factor), v))
            torch.testing.assert_close(after, wanted, atol=1e-5, rtol=0)


def test_blur_is_two_dimensional_and_radius_0_is_none():
    image = photo() / 255
    got = recolour(image, [("blur", (1.5, 4))])
    torch.testing.assert_close(got, TF.gaussian_blur(image, [9, 9], [1.5, 1.5]))
    assert torch.equal(recolour(image, [("blur", (1.5, 0))]), image)
    tiny = torch.rand(3, 3, 5)  # smaller than the kernel
    assert recolour(tiny, [("blur", (2.0, 6))]).shape == (3, 3, 5)


def draws(draw, count: int = 4000) -> list[colour.Operations]:
    return [draw(np.random.default_rng(i)) for i in range(count)]


def share(drawn: list[colour.Operations], *names: str) -> float:
    return np.mean([any(name in names for name, _ in one) for one in drawn])


def values(drawn: list[colour.Operations], name: str) -> np.ndarray:
    return np.array([value for one in drawn for n, value in one if n == name])


def spread(found: np.ndarray, low: float, high: float) -> bool:
    """Whether values look uniform between two bounds."""
    inside = low <= found.min() and found.max() <= high
    quartiles = np.quantile(found, (0, 0.25, 0.5, 0.75, 1))
    return inside and np.abs(quartiles - np.linspace(low, high, 5)).max() < 0.05 * (high - low)


@pytest.mark.parametrize("draw", [colour.draw_unimatch, colour.draw_ps_mt])
def test_jitter_grey_and_blur_have_unimatchs_and_ps_mts_probabilities(draw):
    drawn = draws(draw)
    assert abs(share(drawn, "hue") - 0.8) < 0.02
    assert abs(share(drawn, "grey") - 0.2) < 0.02 and abs(share(drawn, "blur") - 0.5) < 0.02
    for name in ("brightness", "contrast", "saturation"):
        assert spread(values(drawn, name), 0.5, 1.5)
    assert spread(values(drawn, "hue"), -0.25, 0.25)
    assert spread(values(drawn, "blur")[:, 0], 0.1, 2.0)
    orders = Counter(tuple(n for n, _ in one[:4]) for one in drawn if len(one) >= 4)
    assert len(orders) == 24 and min(orders.values()) > 80  # every order of the four
    tails = {tuple(n for n, _ in one if n in ("grey", "blur")) for one in drawn}
    assert tails == {(), ("grey",), ("blur",), ("grey", "blur")}


def test_ps_mts_blur_has_kernels_1_3_and_5():
    radius = Counter(values(draws(colour.draw_ps_mt), "blur")[:, 1].tolist())
    total = sum(radius.values())
    assert set(radius) == {0, 1, 2}
    for r, wanted in ((0, 2 / 4.95), (1, 2 / 4.95), (2, 0.95 / 4.95)):
        assert abs(radius[r] / total - wanted) < 0.04


def test_unimatchs_blur_reaches_three_sigma():
    for sigma, radius in values(draws(colour.draw_unimatch, 200), "blur"):
        assert radius == math.ceil(3 * sigma)


def test_augseg_draws_one_to_three_of_eleven():
    drawn = draws(colour.draw_augseg, 8000)
    lengths = Counter(map(len, drawn))
    assert set(lengths) == {1, 2, 3} and min(lengths.values()) > 2500
    counts = Counter(name for one in drawn for name, _ in one)
    assert len(counts) == 11 and "grey" not in counts
    assert max(counts.values()) / min(counts.values()) < 1.2
    assert any(len({n for n, _ in one}) < len(one) for one in drawn)  # with replacement
    for name in ("contrast", "brightness", "saturation", "sharpness"):
        assert spread(values(drawn, name), 0.05, 0.95)
    assert set(values(drawn, "posterize")) == {4, 5, 6, 7}
    assert spread(255 * values(drawn, "solarize"), 1, 255)
    assert spread(values(drawn, "hue"), -0.5, 0.5)
    assert spread(values(drawn, "blur")[:, 0], 0.1, 2.0)


def test_dual_teachers_colour_is_half_as_strong():
    drawn = draws(colour.draw_dual_teacher)
    assert abs(share(drawn, "hue") - 0.8) < 0.02 and abs(share(drawn, "blur") - 0.5) < 0.02
    assert share(drawn, "grey") == 0
    for name in ("brightness", "contrast", "saturation"):
        assert spread(values(drawn, name), 0.75, 1.25)
    assert spread(values(drawn, "hue"), -0.25, 0.25)
    assert spread(values(drawn, "blur")[:, 0], 0.15, 1.15)


def test_photometric_distortion_is_mmsegmentations():
    drawn = draws(colour.draw_distortion)
    names = ("add", "brightness", "hsv saturation", "hue")
    for name in names:
        assert abs(share(drawn, name) - 0.5) < 0.03
    assert spread(255 * values(drawn, "add"), -32, 32)
    assert spread(values(drawn, "brightness"), 0.5, 1.5)
    assert spread(values(drawn, "hsv saturation"), 0.5, 1.5)
    assert set(np.round(180 * values(drawn, "hue")).astype(int)) == set(range(-18, 18))
    full = Counter(tuple(n for n, _ in one) for one in drawn if len(one) == 4)
    assert set(full) == {names, ("add", "hsv saturation", "hue", "brightness")}
    assert min(full.values()) > 80


def test_only_dual_teachers_weak_view_is_distorted():
    image = random_image(40, 40)
    for name in FAMILIES:
        views, plain = views_of(name), fixed(name, (40, 40), (32, 40))
        crops = [views.draw_crop(np.random.default_rng(i), 40, 40) for i in range(20)]
        assert any(crop.distort for crop in crops) == (name == "dual_teacher")
        for crop in crops:
            undistorted = plain.crop_images([image], [crop._replace(distort=[])])
            same = torch.equal(views.crop_images([image], [crop]), undistorted)
            assert same == (not crop.distort)


def test_families_without_colour_have_none():
    images = torch.rand(2, 3, 16, 16)
    rngs = [np.random.default_rng(i) for i in range(2)]
    for name in ("u2pl", "cps"):
        assert torch.equal(views_of(name).strong(images, rngs), images)


@pytest.mark.parametrize("name", ["s4", "ps_mt", "unimatch", "augseg", "dual_teacher"])
def test_a_strong_view_keeps_values_below_the_mean(name):
    """Colour acts on RGB in [0, 1], before normalisation: nothing is clamped at the mean."""
    views = build_views(Config(augment=name, crop=(32, 40)), (32, 40), MEAN)
    made = loader(views, Wants(strong_views=2), unlabeled_batch=4)
    low, high = ((torch.tensor(edge) - torch.tensor(MEAN)) / torch.tensor(STD) for edge in (0, 1))
    for strong in (view for step in range(4) for view in made[step].strong):
        assert (strong.flatten(1).amin(1) < -0.5).float().mean() > 0.6
        assert (strong.amin((0, 2, 3)) >= low - 1e-4).all()
        assert (strong.amax((0, 2, 3)) <= high + 1e-4).all()


# ---------------------------------------------------------------- Dual Teacher's normalised jitter


def test_normalised_jitter_destroys_what_is_darker_than_the_mean():
    made = loader(views_of("dual_teacher"), Wants(family="normalised"), unlabeled_batch=4)
    for step in range(8):
        batch = made[step]
        assert batch.weak.min() < -1 and batch.weak.max() > 1.5
        assert batch.strong[0].min() >= 0 and batch.strong[0].max() <= 1


def test_normalised_jitter_is_torchvisions_with_one_draw_for_the_batch():
    batch = torch.randn(3, 3, 8, 9)
    orders = set()
    for seed in range(30):
        rng = np.random.default_rng(seed)
        drawn = colour.draw_jitter(rng)
        grey = rng.uniform() < 0.2
        wanted = batch
        functions = {"brightness": TF.adjust_brightness, "contrast": TF.adjust_contrast}
        functions |= {"saturation": TF.adjust_saturation, "hue": TF.adjust_hue}
        for name, value in drawn:
            wanted = functions[name](wanted, value)
        wanted = TF.rgb_to_grayscale(wanted, 3) if grey else wanted
        assert torch.equal(jitter_normalised(batch, np.random.default_rng(seed)), wanted)
        orders.add(drawn[0][0])
    assert len(orders) == 4


def test_normalised_jitter_is_shared_by_the_batch_and_differs_between_steps_and_views():
    class Same(Odd):
        def read(self, index):
            return super().read(0)

    views = fixed("dual_teacher", (37, 51), (37, 51))
    wants = Wants(strong_views=2, family="normalised", labeled_strong=True)
    made = loader(views, wants, images=Same(), batch=4, unlabeled_batch=4)
    batch = made[0]
    up = [view if torch.equal(view, batch.weak[0]) else view.flip(-1) for view in batch.weak]
    assert all(torch.equal(view, up[0]) for view in up)
    for strong in batch.strong:
        pairs = zip(strong, batch.weak, strict=True)
        same = [s if torch.equal(w, up[0]) else s.flip(-1) for s, w in pairs]
        for one in same:
            torch.testing.assert_close(one, same[0], atol=1e-5, rtol=0)
    assert not torch.equal(batch.strong[0], batch.strong[1])
    assert batch.image_strong.min() >= 0 > batch.image.min()
    assert not torch.equal(made[1].strong[0].amax((0, 2, 3)), batch.strong[0].amax((0, 2, 3)))


def test_normalised_jitter_does_not_depend_on_the_number_of_processes(monkeypatch):
    wants = Wants(family="normalised")
    whole = loader(views_of("dual_teacher"), wants, batch=4, unlabeled_batch=4)[3]
    monkeypatch.setattr(distributed, "world", lambda: 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(loader(views_of("dual_teacher"), wants, batch=4, unlabeled_batch=4)[3])
    joined = torch.cat([part.strong[0] for part in shares])
    torch.testing.assert_close(joined, whole.strong[0], atol=1e-6, rtol=0)


def test_each_strong_view_can_be_of_a_family_of_its_own():
    wants = Wants(strong_views=3, family=("colour", "normalised", "noise"), labeled_strong=True)
    batch = loader(views_of("ps_mt"), wants)[0]
    coloured, normalised, noisy = batch.strong
    assert coloured.min() < -1 and normalised.min() >= 0
    assert 0.1 < (noisy - batch.weak).std() < 0.2
    assert batch.image_strong.min() < -1  # the first family
    with pytest.raises(ValueError, match="family='colours': choose colour or noise or normalised"):
        loader(views_of("ps_mt"), Wants(family="colours"))


# ---------------------------------------------------------------- the loader

ALL = ("s4", *FAMILIES)


def any_views(name: str, crop: tuple[int, int] = (32, 40)):
    return build_views(Config(augment=name, crop=crop), crop, MEAN)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("source", ["odd", "mosaic"])
def test_every_family_makes_batches_of_any_images(name, source):
    images = Odd() if source == "odd" else open_dataset("mosaic", "train", size=(32, 32))
    wants = Wants(strong_views=2, labeled_strong=True)
    batch = loader(any_views(name), wants, images=images, batch=2, unlabeled_batch=3)[1]
    assert batch.image.shape == batch.image_strong.shape == (2, 3, 32, 40)
    assert batch.label.shape == (2, 32, 40) and batch.label.dtype == torch.int64
    assert [view.shape for view in (batch.weak, *batch.strong)] == [(3, 3, 32, 40)] * 3
    assert batch.valid.shape == (3, 32, 40) and batch.valid.dtype == torch.bool
    for view in (batch.image, batch.image_strong, batch.weak, *batch.strong):
        assert view.dtype == torch.float32 and view.isfinite().all()
        assert view.is_contiguous(memory_format=torch.channels_last)
    assert set(batch.label.unique().tolist()) <= {*range(8), IGNORE}


@pytest.mark.parametrize("name", ALL)
def test_a_sample_is_a_function_of_seed_epoch_and_index(name):
    wants = Wants(strong_views=2)
    one = loader(any_views(name), wants, batch=1, unlabeled_batch=1)
    four = loader(any_views(name), wants, batch=4, unlabeled_batch=4)
    single, whole = [one[step] for step in (3, 1, 0, 2)], four[0]
    single = [single[i] for i in (2, 1, 3, 0)]  # asked for in another order
    for field in ("image", "label", "weak", "valid"):
        together = torch.cat([getattr(batch, field) for batch in single])
        assert torch.equal(together, getattr(whole, field))
    for view in (0, 1):
        assert torch.equal(torch.cat([batch.strong[view] for batch in single]), whole.strong[view])
    other = loader(any_views(name), wants, batch=4, unlabeled_batch=4, seed=1)[0]
    assert not torch.equal(other.weak, whole.weak)
    assert not torch.equal(four[1].weak, whole.weak)  # the next epoch


@pytest.mark.parametrize("name", ["ps_mt", "unimatch", "dual_teacher"])
def test_strong_views_show_the_weak_crop(name):
    """Jitter keeps what is bright bright, in the same place: luma correlates with its own crop."""
    batch = loader(any_views(name), Wants(strong_views=2), unlabeled_batch=4)[0]
    luma = [view.sum(1).flatten(1) for view in (batch.weak, *batch.strong)]
    for view in luma[1:]:
        table = torch.corrcoef(torch.cat([luma[0], view]))[:4, 4:]
        assert (table.diag() > 0.5).all() and (table.argmax(1) == torch.arange(4)).all()
    assert not torch.equal(batch.strong[0], batch.strong[1])


# What every family draws. Change a family and these change: print them with the test below.
HASHES = {
    "s4": "075d1fcbf3a7",
    "u2pl": "59a5753360fb",
    "cps": "763171af5ba2",
    "ps_mt": "822c17689ebe",
    "unimatch": "45678167e243",
    "augseg": "865a8965bf6b",
    "dual_teacher": "7df40585c5c0",
}


def fingerprint(name: str) -> str:
    """Short SHA-256 of annotations and colours drawn for six images."""
    views, images, text = any_views(name), Odd(), hashlib.sha256()
    for index in range(len(images)):
        _, label = images[index]
        rng = np.random.default_rng([7, index])
        crops = [views.draw_crop(rng, *label.shape, label)]
        text.update(views.crop_labels([label], crops).numpy().astype(np.uint8).tobytes())
        if name == "s4":
            text.update(np.round(views.draw_colour(rng), 4).tobytes())
            continue
        for operation, value in (*crops[0].distort, *views.family.colour(rng)):
            numbers = np.atleast_1d(0 if value is None else value)
            text.update(operation.encode() + np.round(numbers, 6).astype(float).tobytes())
    return text.hexdigest()[:12]


def test_views_are_what_they_have_always_been():
    assert {name: fingerprint(name) for name in ALL} == HASHES


def seen_in_epoch(made: Loader, epoch: int) -> list[int]:
    steps = range(epoch * made.steps_per_epoch, (epoch + 1) * made.steps_per_epoch)
    entries = [entry for step in steps for entry in made.unlabeled_at(step)]
    assert {pass_number for pass_number, _ in entries} == {epoch}
    return [index for _, index in entries]


@pytest.mark.parametrize("unlabeled_batch", [2, 4])
def test_an_epoch_shows_as_many_distinct_unlabeled_images_as_promised(unlabeled_batch):
    images = open_dataset("mosaic", "train", size=(32, 32))
    chosen = Split(tuple(range(4)), tuple(range(4, 24)), "")

    def make(order):
        made = loader(any_views("u2pl"), Wants(order=order), unlabeled_batch=unlabeled_batch)
        return Loader(
            images,
            chosen,
            made.views,
            Wants(order=order),
            batch=2,
            unlabeled_batch=unlabeled_batch,
            seed=0,
            mean=MEAN,
            std=STD,
            device=torch.device("cpu"),
        )

    shuffled, fixed_order = make("shuffled"), make("fixed")
    first, second = seen_in_epoch(shuffled, 0), seen_in_epoch(shuffled, 1)
    assert len(first) == len(set(first)) == len(shuffled.unlabeled) == 20
    assert set(first) == set(second) and first != second
    # Dual Teacher's distributed loader: as many as are labeled, the list's first, in its order.
    for epoch in range(3):
        assert seen_in_epoch(fixed_order, epoch) == [4, 5, 6, 7]
    assert fixed_order.steps_per_epoch == 4 // unlabeled_batch
    assert len(fixed_order.unlabeled) == len(chosen.labeled)
    with pytest.raises(ValueError, match="unlabeled_order='sorted': choose shuffled or fixed"):
        make("sorted")


def test_fixed_order_still_draws_new_views_each_epoch():
    made = loader(any_views("unimatch"), Wants(order="fixed"), unlabeled_batch=2)
    assert made.unlabeled == (2, 3) and made.steps_per_epoch == 1
    assert not torch.equal(made[0].weak, made[1].weak)


def test_prefetch_changes_nothing_and_works_ahead():
    wants = Wants(strong_views=2, labeled_strong=True)
    plain = loader(any_views("unimatch"), wants, prefetch=False)
    ahead = loader(any_views("unimatch"), wants, prefetch=True)
    assert not loader(any_views("unimatch"), wants).prefetch  # on a CPU it does not pay
    made_in = []
    make = ahead._make
    ahead._make = lambda step: (made_in.append((step, threading.current_thread())), make(step))[1]
    steps = [0, 1, 2, 3, 7, 8, 9, 2, 3]
    for step in steps:
        assert equal(tuple(ahead[step]), tuple(plain[step]))
    ahead._maker.shutdown()
    own = [step for step, thread in made_in if thread is threading.main_thread()]
    assert own == [0, 1, 7, 8, 2, 3]  # jumps are not foreseen
    assert [step for step, _ in made_in if step not in own] == [4, 9, 10, 4]


def test_a_file_that_breaks_ahead_is_named_when_its_step_comes():
    class Broken(Odd):
        def read(self, index):
            if index == 5:
                raise ValueError("odd-5: damaged")
            return super().read(index)

    made = loader(any_views("cps"), images=Broken(), unlabeled_batch=1, prefetch=True)
    bad = next(step for step in range(99) if made.unlabeled_at(step)[0][1] == 5 and step > 2)
    for step in range(bad - 2, bad):
        made[step]
    with pytest.raises(ValueError, match="odd-5: damaged"):
        made[bad]


@pytest.mark.parametrize("name", ["unimatch", "dual_teacher"])
def test_a_family_trains(name, tmp_path):
    record = fit(
        tiny_config(method="cutmix_seg", augment=name, epochs=1, crop=[24, 24], eval_images=2),
        out=tmp_path,
    )
    assert record["config"]["augment"] == name
    assert 0 <= record["networks"]["student"]["last"]["miou"] <= 100


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ALL)
def test_a_gpu_makes_the_same_batches(name):
    wants, cuda = Wants(strong_views=2, labeled_strong=True), torch.device("cuda")
    cpu, gpu = loader(any_views(name), wants), loader(any_views(name), wants, device=cuda)
    assert gpu.prefetch
    for step in range(4):
        for a, b in zip(cpu[step], gpu[step], strict=True):
            pairs = zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]
            for one, other in ((one, other) for one, other in pairs if one is not None):
                assert other.device.type == "cuda"
                wrong = ((one.float() - other.float().cpu()).abs() > 2e-2).float().mean()
                assert wrong < 0.02  # a pixel may tip over in equalize, posterize, solarize


# ---------------------------------------------------------------- s4 bench data


@pytest.mark.parametrize("name", ["s4", "augseg"])
def test_bench_prints_images_a_second_and_shares(name, camvid, capsys):
    arguments = ["bench", "data", "--dataset", "camvid", "--data_root", str(camvid)]
    arguments += ["--augment", name, "--crop", "16", "20", "--images", "9", "--strong_views", "2"]
    threads = torch.get_num_threads()
    assert main(arguments) == 0
    assert torch.get_num_threads() == threads
    first, *rest, alone = capsys.readouterr().out.splitlines()
    assert first.startswith(f"camvid, 18 x 24 pixels, to {name} views of 16 x 20, 2 strong: ")
    rate = float(first.split(": ")[1].split()[0])
    assert float(alone.split(": ")[1].split()[0]) > rate  # decoding is less than all
    cells = [line.split() for line in rest]
    assert [line.split("  ")[0] for line in rest] == ["decode", "resize and crop", "colour"]
    assert abs(sum(float(c[-4]) for c in cells) - 100) <= 2
    spent = sum(float(c[-2]) for c in cells)
    assert abs(1000 / spent - rate) < 0.05 * rate + 0.1


def test_bench_writes_what_it_prints(camvid, tmp_path, capsys):
    arguments = [
        "bench",
        "data",
        "--dataset",
        "camvid",
        "--data_root",
        str(camvid),
        "--images",
        "3",
    ]
    path = tmp_path / "bench-data.json"
    arguments += ["--augment", "unimatch", "--crop", "16", "20", "--out", str(path)]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    (row,) = json.loads(path.read_text())["rows"]
    text = tables.loaders(tmp_path)
    for rate in (
        row["images"] / (row["decode"] + row["weak"] + row["strong"]),
        3 / row["released"],
    ):
        assert f"{rate:.1f} images/s" in said and f"| {rate:.1f} |" in text
    assert "| camvid, 18 x 24 | unimatch, 16 x 20, 1 strong |" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["data", "--augment", "nope"], ["augment='nope'", "unimatch"]),
        (["data", "--augment", "cps", "--scale", "1", "2"], ["scale", "cps"]),
        (["data", "--dataset", "camvid", "--data_root", "/nowhere"], ["/nowhere"]),
        (["data", "--images", "0"], ["images=0"]),
        (["data", "--strong_views", "-1"], ["strong_views=-1"]),
        (["data", "--batch", "0"], ["batch=0"]),
        (["data", "--crop", "16"], ["crop"]),
        (["disk"], ["disk", "data"]),
        ([], ["what"]),
    ],
)
def test_bench_refuses_bad_input_in_one_line(refused, arguments, words):
    line = refused("bench", *arguments)
    assert all(word in line for word in words), line


def test_every_operation_is_drawn_by_some_family():
    kinds = [family.colour for family in FAMILIES.values()] + [colour.draw_distortion]
    drawn = {name for draw in kinds for one in draws(draw, 300) for name, _ in one}
    assert drawn == set(OPERATIONS)


def test_normalised_jitter_is_finite_where_the_largest_channel_is_zero():
    """torchvision's hue divides by it: black, as the clamp of what is not positive says."""
    dark = torch.tensor([0.0, -1.0, -0.5]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    assert TF.adjust_hue(dark, 0.1).isnan().any()
    first = []
    for seed in range(40):
        first.append(colour.draw_jitter(np.random.default_rng(seed))[0][0])
        out = jitter_normalised(dark, np.random.default_rng(seed))
        assert out.isfinite().all() and (first[-1] != "hue" or (out == 0).all())
    assert "hue" in first
