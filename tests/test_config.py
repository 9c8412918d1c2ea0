"""`Config`: checked values, a stable name for a run, protocols."""

from __future__ import annotations

import dataclasses
import json

import pytest

from s4lib.config import Config
from s4lib.data import DATASETS
from s4lib.methods import METHODS
from s4lib.nets import NETS
from s4lib.protocols import OWN, PROFILES, PROTOCOLS, matching, profile_protocol, protocol


def test_a_config_survives_json():
    config = protocol("camvid-quick", method="cutmix_seg", method_args={"weight": 2.5}, draw=3)
    again = Config.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and again.run_id == config.run_id


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_protocol_builds_and_names_known_things(name):
    config = protocol(name)
    assert config.protocol == name
    assert config.dataset in DATASETS and config.net in NETS and config.method in METHODS


def test_every_profile_names_a_protocol_of_its_dataset():
    for profile, datasets in PROFILES.items():
        for dataset in datasets:
            assert protocol(profile_protocol(profile, dataset)).dataset == dataset


@pytest.mark.parametrize(
    ("profile", "dataset", "words"),
    [
        ("fast", "mosaic", ["profile='fast'", "smoke", "quick"]),
        ("quick", "coco", ["dataset='coco'", "camvid", "mosaic"]),
        ("camvid", "mosaic", ["'camvid'", "'mosaic'"]),
    ],
)
def test_unknown_profiles_and_datasets_list_the_valid_ones(profile, dataset, words):
    with pytest.raises(ValueError) as error:
        profile_protocol(profile, dataset)
    assert all(word in str(error.value) for word in words)


def test_an_unknown_protocol_lists_the_valid_ones():
    with pytest.raises(ValueError, match="protocol='voc'") as error:
        protocol("voc")
    assert all(name in str(error.value) for name in OWN)


def test_protocols_of_a_published_table_are_found_by_pattern():
    found = matching("voc-classic-*-gta_seg")
    assert found == [f"voc-classic-{n}-gta_seg" for n in (92, 183, 366, 732, 1464)]
    with pytest.raises(ValueError, match="'voc-classic-91'"):
        matching("voc-classic-91")


def test_an_unknown_key_lists_the_valid_ones():
    with pytest.raises(ValueError, match="'learning_rate'") as error:
        protocol("mosaic-32", learning_rate=1.0)
    assert all(f.name in str(error.value) for f in dataclasses.fields(Config))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epochs", "ten"),
        ("epochs", 1.5),
        ("epochs", True),
        ("epochs", 0),
        ("lr", "fast"),
        ("lr", None),
        ("lr", -1.0),
        ("draw", -1),
        ("method_args", [1]),
        ("method", 3),
        ("size", 64),
        ("size", [64]),
        ("size", [64, "64"]),
        ("scale", [1.0]),
        ("scale", [0.0, 1.0]),
        ("amp", "fp8"),
        ("optimizer", "adam"),
        ("outside", "black"),
        ("eval_part", "train"),
        ("sync_bn", 1),
    ],
)
def test_a_wrong_value_is_named_with_what_is_expected(key, value):
    with pytest.raises(ValueError) as error:
        protocol("mosaic-32", **{key: value})
    assert str(error.value).startswith(f"{key}=") and "\n" not in str(error.value)
    assert any(word in str(error.value) for word in ("expected", "choose", "give"))


@pytest.mark.parametrize(("key", "value"), [("lr", float("nan")), ("lr", float("inf"))])
def test_a_number_that_is_none_is_refused(key, value):
    with pytest.raises(ValueError, match=key):
        protocol("mosaic-32", **{key: value})


def test_bounds_in_the_wrong_order_are_refused():
    with pytest.raises(ValueError, match="scale"):
        protocol("mosaic-32", scale=(1.5, 0.75))


def test_whole_numbers_are_taken_as_floats_and_lists_as_tuples():
    config = protocol("mosaic-32", lr=1, scale=[1, 2], size=[32, 32])
    assert config.lr == 1.0 and isinstance(config.lr, float)
    assert config.scale == (1.0, 2.0) and config.size == (32, 32)
    assert config.run_id == protocol("mosaic-32", lr=1.0, scale=(1.0, 2.0), size=(32, 32)).run_id


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().lr = 1.0


def test_the_run_id_is_readable_and_follows_every_number():
    config = protocol("mosaic-32", method="cutmix_seg", preset="pseudo_label", draw=2, seed=5)
    assert config.run_id.startswith("mosaic-32-cutmix_seg-pseudo_label-d2-s5-")
    assert config.run_id == dataclasses.replace(config).run_id
    other = {"lr": 0.1, "epochs": 10, "method_args": {"weight": 2.0}, "hue": 0.0, "sync_bn": False}
    ids = {dataclasses.replace(config, **{k: v}).run_id for k, v in other.items()}
    assert len(ids) == len(other) and config.run_id not in ids


@pytest.mark.parametrize(
    "change", [{"data_root": "/elsewhere"}, {"device": "cuda"}, {"tensorboard": True}]
)
def test_where_a_run_computes_does_not_change_its_name(change):
    assert dataclasses.replace(Config(), **change).run_id == Config().run_id


def test_every_field_is_explained():
    text = Config.__doc__
    assert [f.name for f in dataclasses.fields(Config) if f"        {f.name}: " not in text] == []
