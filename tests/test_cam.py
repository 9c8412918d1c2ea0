"""Grad-CAM against a network whose gradients are known, and what it may not touch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import equal
from torch import nn

from s4lib.book import cam, pictures, plots
from s4lib.book.cam import grad_cam
from s4lib.book.features import Maps
from s4lib.build import build_method


class Linear(nn.Module):
    """Logits are given multiples of the channels, at twice the size."""

    def __init__(self, *rows: list[float]):
        super().__init__()
        self.conv = nn.Conv2d(len(rows[0]), len(rows), 1, bias=False)
        self.conv.weight.data = torch.tensor(rows)[..., None, None]

    def classify(self, fused, size):
        return self.conv(fused).repeat_interleave(2, 2).repeat_interleave(2, 3)


FUSED = torch.tensor([[[1.0, 2], [0, 1]], [[1.0, 0], [3, 0]]])[None]  # two channels, 2 x 2 places


def test_eq_1_and_2_of_selvaraju():
    """Class 1 is 2 a - b. Three of 16 pixels count, of 4 places: weights are 6 / 4 and -3 / 4."""
    net = Linear([1.0, 0], [2.0, -1])
    region = torch.zeros(1, 4, 4, dtype=torch.bool)
    region[0, 0, :3] = True
    found = grad_cam(net, FUSED, region, 1)
    expected = torch.tensor([[[1.5 - 0.75, 3.0], [0.0, 1.5]]])  # -2.25 does not speak for it
    enlarged = F.interpolate(expected[None], scale_factor=2, mode="bilinear")[0]
    torch.testing.assert_close(found, enlarged)


def test_images_do_not_depend_on_each_other_and_an_empty_region_has_no_contribution():
    net = Linear([1.0, 0], [2.0, -1])
    fused = torch.cat([FUSED, FUSED.flip(-1)])
    region = torch.zeros(2, 4, 4, dtype=torch.bool)
    region[0, 0, :3] = True
    found = grad_cam(net, fused, region, 1)
    torch.testing.assert_close(found[:1], grad_cam(net, FUSED, region[:1], 1))
    assert torch.equal(found[1], torch.zeros(4, 4))


def test_it_leaves_a_segnet_and_the_map_as_they_were(tiny):
    net = build_method(tiny(), 8).student.eval()
    torch.manual_seed(0)
    fused = net.fuse(net.encode(torch.randn(2, 3, 32, 32))).detach()
    region = torch.ones(2, 32, 32, dtype=torch.bool)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with torch.no_grad():
        found = torch.stack([grad_cam(net, fused, region, k) for k in range(8)])
    assert found.shape == (8, 2, 32, 32) and not found.requires_grad
    assert found.min() == 0 < found.max()
    assert equal(before, dict(net.state_dict())) and not fused.requires_grad
    assert all(p.grad is None for p in net.parameters())


def test_maps_after_steps_are_scaled_by_the_one_before():
    """Class 1 is at the first place only; a step doubles all that speaks for it."""
    method = nn.Module()
    method.student = Linear([1.0, 0], [2.0, -1])
    truth = torch.zeros(2, 4, 4, dtype=torch.uint8)
    truth[0, 0, 0] = 1
    fused = torch.cat([FUSED, FUSED])
    maps = Maps(method, torch.zeros(2, 3, 4, 4), truth, fused)
    found = cam.after(maps, {"twice": fused}, 1)
    assert list(found) == ["no step", "twice"]
    assert found["no step"][0].max() == 1 and found["twice"][0].max() == pytest.approx(2)
    assert not any(heat[1].any() for heat in found.values())  # no such class: no map


@pytest.mark.parametrize(
    ("shape", "index", "message"),
    [
        ((2, 4, 4), 0, r"region \(2, 4, 4\): expected \(1, H, W\)"),
        ((4, 4), 0, r"region \(4, 4\): expected \(1, H, W\)"),
        ((1, 4, 4), 2, "index=2: choose 0 to 1"),
        ((1, 4, 4), -1, "index=-1: choose 0 to 1"),
    ],
)
def test_wrong_questions_are_refused(shape, index, message):
    with pytest.raises(ValueError, match=message):
        grad_cam(Linear([1.0], [2.0]), FUSED[:, :1], torch.ones(shape, dtype=torch.bool), index)


def test_heat_is_red_on_grey():
    picture = np.full((1, 3, 3), [0, 30, 60], dtype=np.uint8)
    found = pictures.as_heat(picture, np.array([[0, 0.5, 7]]))
    assert found.tolist() == [[[30, 30, 30], [122, 35, 35], [214, 40, 40]]]


def test_stars_of_a_cloud_are_the_points_named():
    xy, label = np.arange(8.0).reshape(4, 2), np.array([2, 0, 2, 0])
    star = np.array([False, True, True, False])
    figure = plots.clouds({"a": (xy, label, star)}, "xyz", np.eye(3, dtype=np.uint8), columns=1)
    points, stars = figure.axes[0].collections
    assert points.get_offsets().tolist() == xy.tolist()
    assert stars.get_offsets().tolist() == xy[1:3].tolist()
    assert [text.get_text() for text in figure.legends[0].texts] == ["x", "z"]
