"""Boxes and classes as each paper draws them, from the right partner, the same for everything."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from s4lib.losses import IGNORE
from s4lib.mixing import Mix, classmix, cutmix, cutmix_beta, cutmix_half, cutmix_small, cutmix_xor


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def sides(mask: torch.Tensor) -> tuple[int, int]:
    """(height, width) of the box in a mask (H, W); asserts that it is one filled box."""
    rows, columns = mask.any(1), mask.any(0)
    assert torch.equal(mask, rows[:, None] & columns)
    for line in (rows, columns):
        at = line.nonzero()
        assert len(at) == 0 or at.max() - at.min() + 1 == len(at)
    return int(rows.sum()), int(columns.sum())


@pytest.mark.parametrize("area", [0.1, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("aspect", [None, (0.5, 2.0)])
@pytest.mark.parametrize("size", [(32, 32), (24, 60)])
def test_a_box_covers_the_share_asked_for(area, aspect, size):
    h, w = size
    for mask in cutmix(torch.zeros(64, 3, h, w), (area, area), aspect).mask:
        height, width = sides(mask)
        if aspect is None or height < h and width < w:  # a bounded side cannot keep aspect and area
            off = 0.5 * height + 0.5 * width + 0.25  # each side is rounded
            assert abs(height * width - area * h * w) <= off


def test_shares_fill_the_range_asked_for():
    share = cutmix(torch.zeros(400, 1, 64, 64), (0.25, 0.5)).mask.float().mean((1, 2))
    assert 0.23 < share.min() < 0.26 and 0.49 < share.max() < 0.52
    assert abs(share.mean() - 0.375) < 0.02


def test_aspects_stay_between_their_bounds():
    for mask in cutmix(torch.zeros(200, 1, 100, 100), (0.2, 0.2), (0.5, 2.0)).mask:
        height, width = sides(mask)
        assert 0.47 < height / width < 2.13


@pytest.mark.parametrize("draw", [cutmix, cutmix_half, cutmix_beta, cutmix_xor, cutmix_small])
def test_boxes_reach_every_corner(draw):
    seen = [draw(torch.zeros(100, 1, 16, 16)).mask.any(0) for _ in range(20)]
    assert torch.stack(seen).any(0).all()


def test_the_box_shows_the_next_image_and_the_rest_itself():
    images = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 2, 8, 8)
    mix = cutmix(images)
    mixed = mix(images)
    for i in range(3):
        assert (mixed[i][:, mix.mask[i]] == (i + 1) % 3).all()
        assert (mixed[i][:, ~mix.mask[i]] == i).all()


def test_images_labels_and_confidences_get_the_same_box():
    g = torch.Generator().manual_seed(1)
    label = torch.randint(0, 9, (4, 12, 10), generator=g)
    mix = cutmix(label)
    image = torch.stack([label, 2 * label], 1).float()
    mixed = mix(image)
    assert torch.equal(mixed[:, 0].long(), mix(label))
    assert torch.equal(mixed[:, 1], 2 * mix(label / 1.0))
    assert torch.equal(mix(label > 4), mix(label) > 4)


def test_a_batch_of_one_mixes_with_itself():
    image = torch.randn(1, 3, 8, 8)
    assert torch.equal(cutmix(image)(image), image)


def test_mixing_twice_uses_the_same_draw():
    image = torch.randn(4, 3, 8, 8)
    mix = cutmix(image)
    assert torch.equal(mix(image), mix(image))
    assert not torch.equal(cutmix(image).mask, mix.mask)


def test_a_mix_by_hand():
    mix = Mix(torch.tensor([[[True, False]], [[False, True]]]), torch.tensor([1, 0]))
    assert mix(torch.tensor([[[1, 2]], [[3, 4]]])).tolist() == [[[3, 2]], [[3, 2]]]


def test_draws_follow_the_seed():
    masks = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        masks.append(cutmix(torch.zeros(4, 16, 16)).mask)
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


BOXES = [cutmix, cutmix_half, cutmix_beta, cutmix_xor, cutmix_small]


@pytest.mark.parametrize("draw", [*BOXES, classmix])
@pytest.mark.parametrize("size", [(16, 16), (3, 40), (1, 1)])
def test_every_mix_fits_its_images_and_names_partners_of_the_batch(draw, size):
    label = torch.randint(0, 3, (5, *size))
    mix = draw(label)
    assert mix.mask.shape == label.shape and mix.mask.dtype == torch.bool
    assert mix.partner.dtype == torch.int64
    assert sorted(mix.partner.tolist()) == [0, 1, 2, 3, 4]
    mixed = mix(label)
    for i, p in enumerate(mix.partner):
        assert torch.equal(mixed[i], torch.where(mix.mask[i], label[p], label[i]))


@pytest.mark.parametrize("draw", [*BOXES, classmix])
def test_every_mix_lies_on_its_device_and_reads_nothing_from_it(draw):
    """A meta tensor holds no values, so that whatever waits for one fails."""
    image = torch.empty(4, 3, 8, 8, device="meta")
    label = torch.empty(4, 8, 8, dtype=torch.int64, device="meta")
    mix = draw(label)
    assert mix.mask.device.type == mix.partner.device.type == "meta"
    assert mix(image).shape == image.shape


@pytest.mark.parametrize("size", [(32, 32), (24, 60)])
def test_half_boxes_are_half_the_image_and_wider_than_half(size):
    h, w = size
    mix = cutmix_half(torch.zeros(600, h, w), p=1)
    assert mix.partner.tolist() == [*range(1, 600), 0]
    widths = set()
    for mask in mix.mask:
        height, width = sides(mask)
        assert abs(height - h * w / 2 / width) <= 0.5
        widths.add(width)
    assert widths == set(range(w // 2 + 1, w))
    assert mix.mask[:, 0, 0].any() and mix.mask[:, -1, -1].any()


def test_half_boxes_come_for_all_images_of_a_batch_or_for_none():
    mixed = torch.stack([cutmix_half(torch.zeros(3, 8, 8)).mask.any((1, 2)) for _ in range(1000)])
    assert torch.equal(mixed.all(1), mixed.any(1))
    assert abs(mixed.float().mean() - 0.5) < 0.05
    assert not cutmix_half(torch.zeros(50, 8, 8), p=0).mask.any()


def test_beta_boxes_share_one_size_whose_area_is_beta_distributed():
    """What is not cut off covers 1 - s of the image; Beta(4, 4) has mean 1/2, variance 1/36."""
    share = []
    for _ in range(600):
        mask = cutmix_beta(torch.zeros(30, 100, 100)).mask
        height, width = mask.any(2).sum(1), mask.any(1).sum(1)
        assert height.max() == width.max() and height.max() % 2 == 0
        share.append(height.max() ** 2 / 100**2)
    assert abs(np.mean(share) - 0.5) < 0.03
    assert abs(np.var(share) - 1 / 36) < 0.006


def test_beta_boxes_are_centred_below_the_first_eighth():
    """So they reach the last row and column more often than the first, by about 0.40 to 0.26."""
    mask = torch.cat([cutmix_beta(torch.zeros(50, 64, 64)).mask for _ in range(40)])
    for side in (mask.any(1), mask.any(2)):
        first, last = side[:, 0].float().mean(), side[:, -1].float().mean()
        assert abs(first - 0.26) < 0.04 and abs(last - 0.4) < 0.04


def test_beta_boxes_have_partners_in_random_order():
    partners = {tuple(cutmix_beta(torch.zeros(3, 4, 4)).partner.tolist()) for _ in range(100)}
    assert len(partners) == 6


def test_xor_boxes_cover_a_quarter():
    """mean_fraction_400_f64 of cps_cutmix_masks.npz is 0.2545."""
    share = cutmix_xor(torch.zeros(2000, 64, 64)).mask.float().mean((1, 2))
    assert abs(share.mean() - 0.2545) < 0.005


def test_where_two_boxes_overlap_an_image_shows_itself():
    """Two boxes of sides sqrt(1/2) always share the centre."""
    mask = cutmix(torch.zeros(100, 32, 32), (1.0, 1.0), boxes=2).mask
    assert mask.any((1, 2)).float().mean() > 0.9 and not mask[:, 16, 16].any()


def test_small_boxes_are_distributed_as_by_drawing_until_one_fits():
    rng = np.random.default_rng(0)
    wanted = []
    while len(wanted) < 2000:
        area = rng.uniform(0.02, 0.4) * 48**2
        while True:
            ratio = rng.uniform(0.3, 1 / 0.3)
            width, height = int((area / ratio) ** 0.5), int((area * ratio) ** 0.5)
            left, top = rng.integers(0, 48, 2)
            if left + width <= 48 and top + height <= 48:
                break
        wanted.append((height, width, top, left))
    ours = []
    for mask in cutmix_small(torch.zeros(2000, 48, 48), p=1).mask:
        height, width = sides(mask)
        assert 0.02 * 48**2 - height - width < height * width <= 0.4 * 48**2
        ours.append(
            (height, width, int(mask.any(1).int().argmax()), int(mask.any(0).int().argmax()))
        )
    np.testing.assert_allclose(np.mean(ours, 0), np.mean(wanted, 0), atol=1)
    np.testing.assert_allclose(np.std(ours, 0), np.std(wanted, 0), atol=1)


def test_small_boxes_come_for_each_image_by_itself():
    mixed = cutmix_small(torch.zeros(2000, 16, 16), p=0.3).mask.any((1, 2))
    assert abs(mixed.float().mean() - 0.3) < 0.04


def test_classmix_keeps_half_of_the_classes_rounded_down():
    label = torch.stack([torch.randint(0, n, (12, 12)) for n in (1, 2, 5, 6, 21)])
    mix = classmix(label)
    for keep, map_ in zip(~mix.mask, label, strict=True):
        kept, shown = set(map_[keep].tolist()), set(map_[~keep].tolist())
        assert not kept & shown
        assert len(kept) == len(kept | shown) // 2


def test_classmix_keeps_every_class_equally_often():
    label = torch.arange(5).repeat(3000, 1)[:, None]
    share = (~classmix(label).mask).float().mean((0, 1))
    assert (abs(share - 0.4) < 0.04).all()


def test_classmix_shows_the_partner_where_the_label_is_ignored():
    label = torch.tensor([[[IGNORE, 0, 1]]]).repeat(50, 1, 1)
    mask = classmix(label).mask[:, 0]
    assert mask[:, 0].all() and (mask[:, 1] ^ mask[:, 2]).all()
    assert classmix(torch.full((2, 4, 4), IGNORE)).mask.all()


def test_classmix_takes_the_next_or_a_random_partner():
    label = torch.zeros(3, 2, 2, dtype=torch.int64)
    assert classmix(label).partner.tolist() == [1, 2, 0]
    partners = {tuple(classmix(label, "random").partner.tolist()) for _ in range(100)}
    assert len(partners) == 6


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda x: cutmix(x, (0.5, 0.4)), "area=.0.5, 0.4.: .*lower <= upper <= 1"),
        (lambda x: cutmix_xor(x, (0.0, 0.4)), "area=.0.0, 0.4.: .*0 < lower"),
        (lambda x: cutmix(x, (0.5, 0.5), (-1.0, 2.0)), "aspect=.-1.0, 2.0.: .*0 < lower"),
        (lambda x: cutmix_small(x, aspect=(3.0, 2.0)), "aspect=.3.0, 2.0.: .*lower <= upper"),
        (lambda x: cutmix_small(x, area=(0.1, 1.2)), "area=.0.1, 1.2.: .*upper <= 1"),
        (lambda x: cutmix_beta(x, 0), "a=0: .*above 0"),
        (lambda x: classmix(x, "last"), "partner=.last.: .*next.*random"),
    ],
)
def test_bounds_that_make_no_sense_are_refused(draw, message):
    with pytest.raises(ValueError, match=message):
        draw(torch.zeros(2, 4, 4, dtype=torch.int64))
