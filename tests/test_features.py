"""Steps in fused maps, on networks that read one place at a time and whose answers are known."""

from __future__ import annotations

import pytest
import torch
from conftest import equal
from torch import nn

from s4lib import trained
from s4lib.book import features
from s4lib.book.features import Maps
from s4lib.data import open_dataset
from s4lib.losses import IGNORE
from s4lib.trainer import fit


class Reader(nn.Module):
    """Logits are channels of the map times a factor; the first convolution does nothing."""

    def __init__(self, factor: float = 1.0, channels: int = 3):
        super().__init__()
        convs = [nn.Conv2d(channels, channels, 1, bias=False) for _ in range(2)]
        for conv, scale in zip(convs, (1.0, factor), strict=True):
            conv.weight.data = scale * torch.eye(channels)[..., None, None]
        self.classifier = nn.Sequential(*convs)

    def classify(self, fused, size):
        return self.classifier(fused)


def maps_of(fused: torch.Tensor, truth: torch.Tensor, *factors: float) -> Maps:
    method = nn.Module()
    method.student = Reader(channels=fused.shape[1])
    method.teachers = nn.ModuleList(Reader(f, fused.shape[1]) for f in factors or (1.0, 1.0))
    return Maps(method, torch.zeros(len(truth), 3, 1, 1, dtype=torch.uint8), truth, fused)


def two_classes(*margins: float, truth: list[int]) -> Maps:
    """One image, one row; positive margins are class 1."""
    fused = torch.tensor([[[0.0] * len(margins)], [list(margins)]])[None]
    return maps_of(fused, torch.tensor([[truth]], dtype=torch.uint8), 1.0, 3.0)


def test_flipped_counts_what_was_right_and_no_void():
    """Right before: first, second and last; the step turns the first and the void pixel."""
    maps = two_classes(0.5, 2.0, 0.5, 0.5, 3.0, truth=[1, 1, 0, IGNORE, 1])
    step = torch.zeros_like(maps.fused)
    step[0, 1] = -1
    assert features.flipped(maps, step, [maps.method.student]).tolist() == pytest.approx([1 / 3])
    assert features.flipped(maps, 0 * step, [maps.method.student]).tolist() == [0]
    wrong = two_classes(-1.0, truth=[1])
    assert features.flipped(wrong, 0 * wrong.fused, [wrong.method.student]).tolist() == [0]


def test_flipped_asks_the_mean_of_the_networks():
    maps = two_classes(0.5, truth=[1])
    maps.method.teachers[1].classifier[1].bias = nn.Parameter(torch.tensor([-10.0, 0.0]))
    step = torch.tensor([[[0.0]], [[-1.0]]])[None]
    assert features.flipped(maps, step, maps.method.teachers[:1]) == 1
    assert features.flipped(maps, step, maps.method.teachers) == 0


def test_steps_have_their_length_and_mislead_whom_they_should():
    """The student reads the first two channels, the teachers the last two: so do the steps."""
    torch.manual_seed(1)
    maps = maps_of(torch.randn(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.uint8))
    maps.method.student.classifier[1].weight.data[2] = 0
    for teacher in maps.method.teachers:
        teacher.classifier[1].weight.data[0] = 0
    state = torch.get_rng_state()
    found = features.steps(maps, eps=0.5)
    assert torch.equal(state, torch.get_rng_state())
    kinds = ["noise", "VAT", "T-VAT"]
    assert list(found) == [f"{k}, {where}" for where in ("whole map", "each place") for k in kinds]
    for name, step in found.items():
        whole = "whole" in name
        length = step.flatten(1).norm(dim=1) if whole else step.norm(dim=1)
        torch.testing.assert_close(length, torch.full_like(length, 0.5))
        for kind, blind, sees in (("VAT", 2, 0), ("T-VAT", 0, 2)):
            if name.startswith(kind):
                assert step[:, blind].abs().max() == 0 < step[:, sees].abs().max()
    assert equal(found, features.steps(maps, eps=0.5))


def test_searches_tell_a_direction_from_rounding_noise():
    """In 64 bits xi 1e-6 finds the direction, in 32 bits it does not; with a floor it is short."""
    torch.manual_seed(1)
    fused = 20 * torch.randn(2, 3, 8, 8)
    maps = maps_of(fused, fused.argmax(1).byte(), 0.1, 0.2)
    before = torch.rand_like
    tries = {"text": {}, "no floor": {"xi": 1e-6}, "released": {"xi": 1e-6, "floor": 1e-8}}
    found = features.searches(maps, tries)
    assert torch.rand_like is before and list(found)[:2] == [("text", 32), ("text", 64)]
    assert found["text", 64].cosine == pytest.approx(1)
    assert found["text", 32].cosine == pytest.approx(1, abs=1e-3)
    assert found["no floor", 64].cosine > 0.99 and abs(found["no floor", 32].cosine) < 0.5
    for bits in (32, 64):
        assert found["no floor", bits].length == pytest.approx(2, abs=1e-3)
        assert 0 < found["released", bits].length < 0.1
    step = {"length": 2, "cosine": 1, "flipped": found["text", 64].flipped}
    assert found["text", 32]._asdict() == pytest.approx(step, abs=1e-3)


def test_a_cloud_is_an_exact_picture_of_what_lies_in_a_plane():
    """Three channels, one of which does not vary: distances are kept, and stars are what flips."""
    torch.manual_seed(0)
    fused = torch.cat([torch.randn(2, 2, 8, 8), torch.full((2, 1, 8, 8), -9.0)], 1)
    truth = fused[:, :2].argmax(1).byte()
    truth[0, 0] = 2  # never said
    maps = maps_of(fused, truth)
    there = {"before": torch.zeros_like(fused), "after": torch.zeros_like(fused)}
    there["after"][:, 0] = 0.5
    panels, share = features.cloud(maps, there, classes=2, each=20)
    assert share == pytest.approx(1)
    (before, label, star), (after, _, moved) = panels.values()
    assert before.shape == (40, 2) and sorted(set(label)) == [0, 1] and not star.any()
    where = fused[:, :2].movedim(1, -1).reshape(-1, 2).double()
    inside = torch.cdist(where, where).flatten().sort().values
    distances = torch.cdist(*[torch.from_numpy(before)] * 2).flatten()
    near = torch.searchsorted(inside, distances).clamp(max=len(inside) - 1)
    gap = torch.minimum((inside[near] - distances).abs(), (inside[near - 1] - distances).abs())
    assert gap.max() < 1e-5
    lengths = torch.from_numpy(after - before).norm(dim=1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, 0.5))
    assert moved.any() and not moved[label == 0].any()  # all were moved towards class 0


def test_tsne_keeps_neighbours_and_parts_what_is_far():
    torch.manual_seed(0)
    group = torch.arange(3).repeat_interleave(30)
    points = 20 * torch.eye(3, 8)[group] + torch.randn(90, 8)
    plane = features.tsne(points - points.mean(0), perplexity=10)
    nearest = torch.cdist(plane, plane).fill_diagonal_(torch.inf).argmin(1)
    assert plane.shape == (90, 2) and plane.isfinite().all()
    assert (group[nearest] == group).all()
    inside = max(plane[group == k].std(0).norm() for k in range(3))
    centres = torch.stack([plane[group == k].mean(0) for k in range(3)])
    assert torch.pdist(centres).min() > 3 * inside


def test_maps_of_a_trained_run_are_what_its_student_reads(tiny, tmp_path):
    config = tiny(method="ps_mt", epochs=1)
    fit(config, out=tmp_path)
    model = trained.load(tmp_path / config.run_id, device="cpu")
    images = open_dataset("mosaic", "val", size=(32, 32))
    maps = features.student_maps(model, images, [0, 3])
    with torch.no_grad():
        logits = model.method.student.classify(maps.fused, (32, 32))
        expected = model.method.student(model.normalise(torch.stack([images[0][0], images[3][0]])))
    torch.testing.assert_close(logits, expected)
    assert torch.equal(maps.truth[1], images[3][1]) and torch.equal(maps.picture[1], images[3][0])
    panels, share = features.cloud(maps, features.steps(maps), classes=3, each=10)
    near, _ = features.cloud(maps, features.steps(maps), 3, 10, neighbours=True)
    assert all(
        (near[k][2] == panels[k][2]).all() and near[k][0].shape == panels[k][0].shape for k in near
    )
    assert len(panels) == 6 and 0 < share <= 1
