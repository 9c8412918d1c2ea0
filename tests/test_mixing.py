"""CutMix: boxes of the size asked for, from the right partner, the same for everything."""

from __future__ import annotations

import pytest
import torch

from s4lib.mixing import Mix, cutmix


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


def test_boxes_reach_every_corner():
    seen = cutmix(torch.zeros(500, 1, 16, 16), (0.25, 0.25)).mask.any(0)
    assert seen.all()


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
