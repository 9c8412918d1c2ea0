"""Looking into a step without disturbing the run; snapshots; how far networks are apart."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import equal, tiny_config

from s4lib import records, runs, trained, trainer
from s4lib.book import analysis, probe
from s4lib.build import build_method, open_data
from s4lib.data import open_dataset
from s4lib.method import Clock
from s4lib.run_folder import RunFolder, snapshot, snapshots
from s4lib.trainer import Run, fit

CPU = torch.device("cpu")
# One step an epoch, so that a snapshot is the step before the next one.
COURSE = {"unlabeled": 4, "epochs": 3, "eval_every": 3, "snapshots": [1, 2, 3]}


@pytest.fixture(scope="module")
def gps(tmp_path_factory):
    """(folder, Config) of a finished tiny run of GPS; its first epoch is the teacher's alone."""
    out = tmp_path_factory.mktemp("gps")
    config = tiny_config(method="gps", preset="cutmix", **COURSE)
    fit(config, out=out)
    return out / config.run_id, config


@pytest.fixture(scope="module")
def batches(gps):
    """The batches of the run's steps, as training saw them."""
    folder, config = gps
    loader = Run(config, RunFolder(folder.parent, config), CPU).loader
    return [loader[step] for step in range(config.epochs)]


def looked_at(looks, moment: str) -> dict[str, torch.Tensor]:
    return {look.network: look.probs for look in looks if look.moment == moment}


def test_watch_sees_each_update_from_both_sides():
    net, other, seen = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1), []

    def minimize(loss, *nets):
        seen.append(("update", nets))
        return loss > 1

    watched = probe.watch(minimize, lambda when, nets: seen.append((when, nets)))
    assert watched(2, net) and not watched(0, net, other)
    order = [
        (when, nets) for nets in ((net,), (net, other)) for when in ("before", "update", "after")
    ]
    assert seen == order


def test_a_probed_step_is_the_step_that_training_took(gps, batches):
    """From each snapshot to the next, bit for bit: optimizers, rates and noise are the run's."""
    folder, _ = gps
    for epoch in (1, 2):
        model = trained.load(folder, epoch, "cpu")
        image = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
        looks = probe.probe_step(model, batches[epoch], model.normalise(image))
        after = trained.load(folder, epoch + 1, "cpu")
        for name, probs in looked_at(looks, "end").items():
            assert torch.equal(probs, after.probs(image, name)), (epoch, name)
        for name, probs in looked_at(looks, "before students").items():
            weights = zip(
                model.method.get_submodule(name).parameters(),
                after.method.get_submodule(name).parameters(),
                strict=True,
            )
            assert not all(torch.equal(a, b) for a, b in weights), name
            assert not torch.equal(probs, after.probs(image, name)), name


def test_moments_of_a_gps_step_are_in_order_and_show_who_was_updated(gps, batches):
    folder, _ = gps
    model = trained.load(folder, 2, "cpu")
    batch = batches[2]
    looks = probe.probe_step(model, batch)
    names = ["students.0", "students.1", "teacher"]
    moments = ["before students", "after students", "before teacher", "after teacher", "end"]
    assert [(look.moment, look.network) for look in looks] == [
        (m, n) for m in moments for n in names
    ]
    before, after, feedback, taught, end = (looked_at(looks, moment) for moment in moments)
    assert torch.equal(before["teacher"], after["teacher"])  # guiding leaves it alone
    assert not torch.equal(feedback["teacher"], taught["teacher"])
    for name in names[:2]:
        assert not torch.equal(before[name], after[name])
        assert torch.equal(feedback[name], taught[name])
    assert equal(taught, end)
    look = looks[0]
    assert look.label.shape == look.confidence.shape == (4, 32, 32)
    confidence, label = look.probs.max(1)
    assert torch.equal(look.label, label) and torch.equal(look.confidence, confidence)
    assert float(look.confidence.min()) >= 1 / 8


def test_the_teachers_epochs_have_one_update(gps, batches):
    folder, _ = gps
    model = trained.load(folder, 1, "cpu")
    model.training["step"] = 0  # as if the first step came again
    looks = probe.probe_step(model, batches[0])
    assert [look.moment for look in looks][::3] == ["before teacher", "after teacher", "end"]


def test_an_ema_teacher_moves_between_the_last_update_and_the_end(trained_run):
    model = trained.load(trained_run, device="cpu")
    model.training["step"] = 2
    images = open_dataset("mosaic", "train", size=(32, 32))
    looks = probe.probe_step(model, probe.plain_batch(model, images, [0, 1], [2, 3]))
    assert torch.equal(
        looked_at(looks, "before student")["teacher"], looked_at(looks, "after student")["teacher"]
    )
    assert not torch.equal(
        looked_at(looks, "after student")["teacher"], looked_at(looks, "end")["teacher"]
    )


def test_probing_leaves_model_run_and_random_numbers_alone(gps, batches):
    folder, _ = gps
    model = trained.load(folder, 2, "cpu")
    batch = batches[2]
    weights = {name: value.clone() for name, value in model.method.state_dict().items()}
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    generator = torch.get_rng_state()
    first, second = (probe.probe_step(model, batch) for _ in range(2))
    assert torch.equal(generator, torch.get_rng_state())
    assert equal(weights, model.method.state_dict()) and not model.method.training
    assert files == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert all(equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_end_of_a_run_gives_its_last_step_again_and_best_weights_none(gps, batches):
    folder, _ = gps
    batch = batches[2]
    assert len(probe.probe_step(trained.load(folder, "last", "cpu"), batch)) == 15
    with pytest.raises(ValueError, match="load 'last' or a snapshot"):
        probe.probe_step(trained.load(folder, "best", "cpu"), batch)


def test_an_update_reaches_what_averages_and_ties_carry_on(tiny, batches):
    def moved(**changes):
        config = tiny(method="gta_seg", method_args={"student_decay": 0.5, **changes})
        method = build_method(config, 8)
        return probe.reach(method, config, batches[0], Clock(3, 2, 4), "assistant")

    paper, tied = moved(), moved(tie_classifier=True)
    assert paper["student"].keys() == {"encoder", "decoder", "classifier"}
    assert min(paper["assistant"].values()) > 0
    assert paper["student"]["encoder"] == pytest.approx(paper["assistant"]["encoder"] / 2, rel=1e-3)
    assert paper["student"]["classifier"] == 0 < tied["student"]["classifier"]
    assert tied["student"]["classifier"] == tied["assistant"]["classifier"]
    assert set(paper["teacher"].values()) == {0}  # it follows the student's update, which is not


def test_what_cannot_be_updated_is_named(tiny, batches):
    config = tiny(method="gta_seg")
    with pytest.raises(ValueError, match="child='teacher': choose student or assistant"):
        probe.reach(build_method(config, 8), config, batches[0], Clock(3, 2, 4), "teacher")


@pytest.mark.parametrize("method", ["supervised", "cutmix_seg"])
def test_a_plain_batch_is_whole_images_with_their_annotations(tiny, tmp_path, method):
    config = tiny(method=method, epochs=1, unlabeled=4)
    fit(config, out=tmp_path)
    model = trained.load(tmp_path / config.run_id, device="cpu")
    images = open_data(config)[0]
    batch = probe.plain_batch(model, images, [5, 6], [7])
    assert torch.equal(batch.label, torch.stack([images[i][1] for i in (5, 6)]).long())
    assert torch.equal(batch.weak, model.normalise(images[7][0][None]))
    assert batch.valid.all() and batch.valid.shape == (1, 32, 32)
    assert len(batch.strong) == model.method.strong_views
    assert all(torch.equal(view, batch.weak) for view in batch.strong)
    looks = probe.probe_step(model, batch)
    assert looks[-1].moment == "end" and looks[0].probs.shape == (1, 8, 32, 32)


def test_a_plain_batch_of_several_sizes_is_refused(trained_run):
    model = trained.load(trained_run, device="cpu")
    images = [
        (torch.zeros(3, size, 32, dtype=torch.uint8), torch.zeros(size, 32)) for size in (8, 9)
    ]
    with pytest.raises(ValueError, match=r"\[0, 1\] have sizes \[\(8, 32\), \(9, 32\)\]"):
        probe.plain_batch(model, images, [0, 1], [0])


def test_snapshots_do_not_change_a_runs_name_or_numbers(tiny, tmp_path):
    config = tiny(method="mean_teacher")
    kept = dataclasses.replace(config, snapshots=[1])
    assert kept.run_id == config.run_id
    fit(config, out=tmp_path / "none")
    fit(kept, out=tmp_path / "kept")
    one, other = (
        torch.load(tmp_path / where / config.run_id / "last.pt", weights_only=True)
        for where in ("none", "kept")
    )
    assert equal(one["method"], other["method"])
    names = {p.name for p in (tmp_path / "kept" / config.run_id).iterdir()}
    assert names - {p.name for p in (tmp_path / "none" / config.run_id).iterdir()} == {
        "epoch-0001.pt"
    }


@pytest.mark.parametrize("bad", [[0], [3], [1, -1]])
def test_snapshots_of_epochs_that_do_not_come_are_refused(tiny, bad):
    with pytest.raises(ValueError, match="snapshots=.*choose from 1 to 2"):
        tiny(snapshots=bad)


def test_a_snapshot_is_the_checkpoint_of_its_epoch(gps, tmp_path):
    """A run that is stopped after two epochs has as its last.pt what the whole run kept."""
    folder, config = gps

    def stop(done: int, total: int, text: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(config, out=tmp_path, progress=stop)
    stopped = trained.load(tmp_path / config.run_id, "last", "cpu")
    kept = trained.load(folder, 2, "cpu")
    assert equal(stopped.method.state_dict(), kept.method.state_dict())
    assert equal(stopped.training, kept.training) and kept.training["step"] == 2
    assert snapshots(folder) == [1, 2, 3] and snapshots(tmp_path / config.run_id) == [1, 2]
    with pytest.raises(ValueError, match=r"epoch-0009\.pt: no such file"):
        trained.load(folder, 9)
    with pytest.raises(ValueError, match="checkpoint='first': choose last or best"):
        trained.load(folder, "first")


class Killed(Exception):
    """Stands for a kill."""


def test_a_resumed_run_has_all_snapshots_also_if_killed_while_one_is_written(
    tiny, tmp_path, monkeypatch
):
    config = tiny(**COURSE)
    whole, folder = (RunFolder(tmp_path / where, config) for where in ("whole", "killed"))
    fit(config, out=tmp_path / "whole")
    write = trainer.RunFolder.save.__globals__["write_atomically"]

    def die(path, content):
        write(path, content)
        if path == snapshot(folder.path, 2):  # written, but last.pt still is that of epoch 1
            raise Killed

    with monkeypatch.context() as patched:
        patched.setitem(trainer.RunFolder.save.__globals__, "write_atomically", die)
        with pytest.raises(Killed):
            fit(config, out=tmp_path / "killed")
    assert folder.load()["step"] == 1 and folder.missing() == [3]
    fit(config, out=tmp_path / "killed", resume=True)
    for epoch in config.snapshots:
        one, other = (
            torch.load(snapshot(f.path, epoch), weights_only=True) for f in (whole, folder)
        )
        assert equal(one["method"], other["method"]) and equal(one["minimizer"], other["minimizer"])


def test_a_resumed_run_that_is_past_a_wanted_snapshot_is_refused(tiny, tmp_path):
    config = tiny(**{**COURSE, "snapshots": []})

    def kill(done: int, total: int, text: str) -> None:
        if done == 2:
            raise Killed

    with pytest.raises(Killed):
        fit(config, out=tmp_path, progress=kill)
    with pytest.raises(ValueError, match="is past epoch 2 and kept no snapshot of it: restart"):
        fit(dataclasses.replace(config, snapshots=[2, 3]), out=tmp_path, resume=True)
    later = dataclasses.replace(config, snapshots=[3])
    fit(later, out=tmp_path, resume=True)
    assert snapshots(tmp_path / config.run_id) == [3]


def test_a_finished_run_without_a_wanted_snapshot_is_trained_again(tiny, tmp_path, monkeypatch):
    config = tiny(**{**COURSE, "snapshots": []})
    wanted = dataclasses.replace(config, snapshots=[2])
    first = fit(config, out=tmp_path)
    trainings = []
    train = Run.train

    def counted(run, *arguments):
        trainings.append(run.config.snapshots)
        return train(run, *arguments)

    monkeypatch.setattr(Run, "train", counted)
    again = fit(wanted, out=tmp_path)
    assert again["networks"] == first["networks"]
    assert snapshots(tmp_path / config.run_id) == [2]
    monkeypatch.setattr(records, "stale", lambda record: False)
    (record,) = runs.run([wanted], out=tmp_path)
    assert record == again == fit(wanted, out=tmp_path) == fit(config, out=tmp_path)
    assert trainings == [(2,)]
    runs.run([dataclasses.replace(config, snapshots=[1, 2])], out=tmp_path)
    assert trainings == [(2,), (1, 2)] and snapshots(tmp_path / config.run_id) == [1, 2]


def test_coupling_is_a_row_per_snapshot_and_pair(gps):
    folder, config = gps
    _, _, held_out, indices = open_data(config)
    rows = probe.coupling(folder, held_out, indices, "cpu")
    pairs = [("students.0", "students.1"), ("students.0", "teacher"), ("students.1", "teacher")]
    assert [(r.epoch, r.one, r.other) for r in rows] == [
        (epoch, *pair) for epoch in (1, 2, 3) for pair in pairs
    ]
    model = trained.load(folder, 3, "cpu")
    one, other = (model.method.networks()[name] for name in pairs[1])
    seen = [analysis.predictions(model, held_out, indices, name) for name in pairs[1]]
    row = rows[-2]
    assert row.distance == analysis.weight_distance(one, other) > 0
    assert row.disagreement == analysis.disagreement(*seen) > 0
    scores = RunFolder(folder.parent, config).record()["networks"]
    gap = scores["students.0"]["last"]["miou"] - scores["teacher"]["last"]["miou"]
    assert row.gap == pytest.approx(gap, abs=1e-3)


def test_coupling_needs_snapshots(trained_run):
    with pytest.raises(ValueError, match="no snapshot; train with snapshots"):
        probe.coupling(trained_run, None, [])
