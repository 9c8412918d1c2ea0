"""Pictures and tables of survey chapters: that rows show what their methods compute."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pytest
import torch
from conftest import tiny_config

from s4lib.book import survey
from s4lib.book.published import columns, load
from s4lib.book.standings import Standings
from s4lib.build import build_method
from s4lib.data import open_dataset
from s4lib.guided import context_mask
from s4lib.losses import IGNORE
from s4lib.trained import Trained

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def seen():
    """(GCT with an untrained tiny network, scene of two images through its second network)."""
    config = tiny_config(method="gct", method_args={"detector_width": 4})
    images = open_dataset("mosaic", "val")
    method = build_method(config, len(images.classes)).eval()
    model = Trained(config, method, CPU, images.classes, images.colors)
    return method, survey.look(model, images, "students.1", count=2), images


def test_a_scene_is_what_the_named_network_says(seen):
    method, scene, images = seen
    assert scene.image[1].equal(images[1][0]) and scene.truth[1].equal(images[1][1])
    logits = method.students[1](scene.normal)
    assert scene.label.equal(logits.argmax(1)) and scene.net is method.students[1]
    torch.testing.assert_close(scene.confidence, logits.softmax(1).amax(1).detach())
    one, two = scene.strong
    assert one.min() >= 0 and one.max() <= 255 and not one.equal(two)


def test_images_labels_and_heat_are_drawn_as_such(seen):
    _, scene, _ = seen
    figure = scene.draw({"image": scene.image, "label": scene.label, "heat": scene.label == 1})
    drawn = [[axis.images[0].get_array() for axis in figure.axes[i : i + 2]] for i in (0, 2, 4)]
    plt.close(figure)
    assert (drawn[0][1] == scene.image[1].permute(1, 2, 0).numpy()).all()
    assert (drawn[1][1] == scene.colors[scene.label[1]]).all()
    assert (drawn[2][1] == (scene.label[1] == 1).numpy()).all()


def test_mistakes_are_mixed_as_the_labels_are(seen):
    _, scene, _ = seen
    right = scene.mistakes(scene.truth.flip(0), 0.0, lambda x: x.flip(0))
    plain = scene.mistakes(scene.truth.flip(0), 0.0)
    assert all((picture == (226, 230, 236)).all() for picture in right)
    assert not all((picture == (226, 230, 236)).all() for picture in plain)


def test_disturbances_are_those_of_cct(seen):
    _, scene, _ = seen
    before = {k: v.clone() for k, v in scene.net.state_dict().items()}
    rows, titles = survey.disturbed(scene.net, scene, background=1, count=2)
    assert all(v.equal(before[k]) for k, v in scene.net.state_dict().items())
    kinds = [title.split("\n")[0] for title in titles]
    assert kinds == ["as it is", *survey.KINDS] and titles[0] == "as it is\n0 %"
    assert rows["labels 2"][0].equal(scene.label[1])
    fused = scene.net.fuse(scene.net.encode(scene.normal)).detach()
    sizes = fused.abs().mean(1)
    sizes = sizes / sizes.amax((1, 2), keepdim=True)
    torch.testing.assert_close(rows["map 2"][0], sizes[1])
    thing = context_mask(sizes[:, None], scene.label != 1)[1, 0]
    torch.testing.assert_close(rows["map 2"][kinds.index("context")], thing)
    without = survey.disturbed(scene.net, scene, background=None)[1]
    assert [t.split("\n")[0] for t in without] == ["as it is", "vat", "dropout", "drop", "noise"]


def test_flaws_of_both_networks_and_what_comes_of_them(seen):
    method, scene, _ = seen
    rows = survey.flaws(method, scene)
    assert rows["network 2"].equal(scene.label)
    for i in (1, 2):
        assert rows[f"flaws {i}, known"].amax((1, 2)).allclose(torch.ones(2), atol=1e-4)
    one, two = rows["flaws 1, seen"], rows["flaws 2, seen"]
    assert rows["1 leads"].equal(one < two)
    assert rows["both bad"].equal((one > 0.6) & (two > 0.6))


def test_disagreement_knows_whose_error_it_is():
    truth = torch.tensor([[[0, 0, 0, 0, IGNORE]]])
    one, two = torch.tensor([[[0, 1, 1, 0, 0]]]), torch.tensor([[[0, 0, 1, 2, 1]]])
    rows, said = survey.disagreement(one, two, truth)
    assert rows["differ"].tolist() == [[[False, True, False, True, False]]]
    assert rows["1 is right"].tolist() == [[[False, False, False, True, False]]]
    assert rows["2 is right"].tolist() == [[[False, True, False, False, False]]]
    assert said == "50 % of the pixels differ, 25 % are a common mistake"


def test_frames_by_threshold_say_what_is_kept(seen):
    _, scene, _ = seen
    frames = survey.kept(scene, [0.0, 1.01])
    right = 100 * (scene.label == scene.truth).float().mean()
    assert list(frames) == [f"0: 100 % kept, {right:.0f} % of these right", "1.01: 0 % kept"]
    for figure in frames.values():
        plt.close(figure)


def test_tables_are_blank_where_nothing_ran():
    stand = Standings.of([], "mosaic-32", [0])
    gains = survey.gains(stand, ["cct", "n_cps"])
    printed = columns(load("ke2020")).values()
    found = sorted(float(c["cct"].value) - float(c["supervised"].value) for c in printed)
    assert gains.rows == [
        ["cct", 4, f"{found[0]:+.1f} to {found[-1]:+.1f}", ""],
        ["n_cps", "", "", ""],
    ]
    cost = survey.cost(stand, ["supervised", "mean_teacher"])
    assert cost.rows == [
        ["supervised", "1", "0", "1", "3", "", ""],
        ["mean_teacher", "2", "1", "2", "7", "", ""],
    ]
