"""Protocols: named settings that a Config starts from, and what a notebook's `profile` means.

config = protocol("mosaic-32", method="mean_teacher", draw=1)
config = protocol("voc-classic-183-gta_seg", method="gta_seg", data_root="VOCdevkit/VOC2012")

A published protocol is DATASET-SPLIT or DATASET-SPLIT-RECIPE: a list of labeled images
(s4lib.data.lists), trained the way a paper's program trains. Without a recipe it is that of the
work which the list comes from. Learning rates and weight decays are *effective* ones: those of a
mean over the whole batch. TorchSemiSeg's double averaging over GPUs divides its nominal rate by
their number and multiplies its weight decay (reference: "lr 0.01, wd 1e-4 on 4 GPUs" is 0.0025,
4e-4).
"""

from __future__ import annotations

import types
from fnmatch import fnmatch

from .config import Config
from .data import lists

# Epochs for mosaic-32, Mean Teacher's weight and CutMix-Seg's preset were chosen on label draws 100
# to 103, among about thirty settings (and one look at draws 0 to 4 with a smaller weight).
_MOSAIC = {"dataset": "mosaic", "net": "light", "epochs": 12, "eval_every": 2}
# On CamVid all methods learn from labels alone for the first quarter of the training.
_CAMVID = {"dataset": "camvid", "labeled": 23, "lr": 2e-3, "scale": (0.75, 1.5)}
_SMOKE = {"unlabeled": 32, "eval_images": 32, "epochs": 3, "eval_every": 3}

OWN: types.MappingProxyType[str, dict] = types.MappingProxyType(
    {
        "mosaic-smoke": {**_MOSAIC, **_SMOKE},
        "mosaic-16": {**_MOSAIC, "labeled": 16},
        "mosaic-32": {**_MOSAIC, "labeled": 32},
        "mosaic-64": {**_MOSAIC, "labeled": 64},
        "camvid-smoke": {**_CAMVID, **_SMOKE, "size": (60, 80)},
        "camvid-quick": {
            **_CAMVID,
            "size": (120, 160),
            "crop": (96, 128),
            "lr": 4e-3,
            "epochs": 16,
            "warmup": 8,  # 4 were worse: book/grids/camvid-examined.yaml
            "eval_every": 4,
        },
        "camvid-23": {
            **_CAMVID,
            "size": (180, 240),
            "net": "deeplabv3plus-resnet18",
            "epochs": 80,
            "warmup": 20,
            "eval_every": 5,
            "amp": "bf16",
        },
    }
)


# The papers start from ImageNet's weights and train for 20 000 steps and more, on large images; our
# own protocols start from random weights, train for hundreds, on small images. One rule for all
# methods, not tuned one by one:
# - what learns from labels that an untrained network predicts, from the first step, with full
#   weight and no confidence threshold, ramp or warm-up of its own, begins with two epochs of labels
#   alone; a warm-up of its own becomes two epochs;
# - an average over more than 100 steps (decay above 0.99) becomes one over 20 (0.95), and a ramp
#   given in epochs two of them;
# - what is told to leave out a background class, or needs larger images, is told how things are.
_EMA = {"decay": 0.95}
_DECODERS = {"background": None, "vat": 1, "dropout": 2, "drop": 2, "noise": 2}  # 7, not 30
_DETECTOR = {"detector_width": 8, "detector_size": 128}
FROM_SCRATCH: types.MappingProxyType[str, dict] = types.MappingProxyType(
    {
        "ael": {"warmup": 2},
        "augseg": {"method_args": _EMA},
        "cct": {"method_args": _DECODERS},
        "cps": {"warmup": 2},
        "cutmix_mt": {"warmup": 2},
        "dst": {"method_args": {"warmup": 2}},
        "dual_teacher": {"warmup": 2},
        "gct": {"method_args": {**_DETECTOR, "ramp_epochs": 2.0}},
        "n_cps": {"warmup": 2},
        "pc2seg": {"warmup": 2},
        "ps_mt": {"warmup": 2, "method_args": {**_EMA, "ramp_epochs": 2.0}},
        "pseudoseg": {"warmup": 2, "method_args": {"background": False}},
        "u2pl": {"method_args": {"warmup": 2}},
        "unimatch_v2": {"method_args": _EMA},
    }
)

# ---- published protocols. Networks are named after the code that has them; lr is the decoder's.

_U2PL = {
    "net": "u2pl-resnet101",
    "optimizer": "sgd",
    "augment": "u2pl",
    "lr": 1e-2,
}
_CPS = {
    "net": "cps-resnet50",
    "optimizer": "sgd",
    "augment": "cps",
    "lr": 2.5e-3,
    "decay_all": False,
    "batch": 8,
    "unlabeled_batch": 8,
    "evaluation": "cps-slide",
}
_UNIMATCH = {
    "net": "unimatch-resnet101",
    "optimizer": "sgd",
    "augment": "unimatch",
    "weight_decay": 1e-4,
    "batch": 8,
    "unlabeled_batch": 8,
}
# Epochs are passes over the unlabeled list, and differ by the number of labels where a dict says so
# (the smallest number that is not below ours counts; classic lists, which CPS and PS-MT do not
# have, thereby train as long as 1/16).
_VOC_CPS = {662: 32, 1323: 34, 2646: 40, 5291: 60}
_CITY_CPS = {186: 128, 372: 137, 744: 160, 1488: 240}
_RELEASED: types.MappingProxyType[str, dict[str, dict]] = types.MappingProxyType(
    {
        # U2PL@ab3d2be: 4 x (4+4) on VOC, 8 x (2+2) on Cityscapes. Its auxiliary loss on Cityscapes
        # (0.4) is not part of our methods.
        "u2pl": {
            "voc": {
                **_U2PL,
                "crop": [513, 513],
                "batch": 16,
                "unlabeled_batch": 16,
                "epochs": 80,
                "encoder_lr": 0.1,
                "weight_decay": 1e-4,
                "evaluation": "u2pl-centre",
            },
            "cityscapes": {
                **_U2PL,
                "crop": [769, 769],
                "batch": 16,
                "unlabeled_batch": 16,
                "epochs": 200,
                "weight_decay": 5e-4,
                "sup_loss": "ohem",
                "evaluation": "u2pl-slide",
            },
        },
        # TorchSemiSeg@5e0c29c. OHEM keeps 50 000 pixels per image on a GPU, one of each kind.
        "cps": {
            "voc": {**_CPS, "crop": [512, 512], "epochs": _VOC_CPS, "weight_decay": 4e-4},
            "cityscapes": {
                **_CPS,
                "crop": [800, 800],
                "epochs": _CITY_CPS,
                "weight_decay": 8e-4,
                "sup_loss": "ohem",
                "ohem_min_kept": 50_000,
                "eval_args": {"crop": [800, 800]},
            },
        },
        # PS-MT@058cdc3: its rate is the real one; one epoch of warm-up comes on top, for its 5
        # passes over the labeled list. On Cityscapes its OHEM is dead code, and 1/16 is not among
        # its settings: 1/8's epochs.
        "ps_mt": {
            "voc": {
                **_CPS,
                "augment": "ps_mt",
                "resize_base": 600,
                "crop": [512, 512],
                "batch": 32,
                "unlabeled_batch": 32,
                "lr": 1e-2,
                "weight_decay": 1e-4,
                "decay_all": True,
                "epochs": {1323: 81, 2646: 201, 5291: 301},
                "evaluation": "ps_mt-whole",
            },
            "cityscapes": {
                **_CPS,
                "augment": "ps_mt",
                "crop": [800, 800],
                "lr": 4.5e-3,
                "weight_decay": 1e-4,
                "decay_all": True,
                "epochs": {372: 321, 744: 451, 1488: 551},
                "evaluation": "ps_mt-slide",
            },
        },
        # UniMatch@0324f3dd, 4 x (2+2). Its OHEM counts per GPU.
        "unimatch": {
            "voc": {
                **_UNIMATCH,
                "crop": [321, 321],
                "epochs": 80,
                "lr": 1e-2,
                "encoder_lr": 0.1,
                "evaluation": "unimatch-whole",
            },
            "cityscapes": {
                **_UNIMATCH,
                "crop": [801, 801],
                "epochs": 240,
                "lr": 5e-3,
                "sup_loss": "ohem",
                "ohem_min_kept": 200_000,
                "evaluation": "unimatch-slide",
            },
        },
        # AugSeg@7ead8705: 2 x 8 on VOC, 4 x 4 on Cityscapes.
        "augseg": {
            "voc": {
                **_UNIMATCH,
                "net": "augseg-resnet101",
                "augment": "augseg",
                "resize_base": 500,
                "crop": [513, 513],
                "batch": 16,
                "unlabeled_batch": 16,
                "epochs": 80,
                "lr": 1e-2,
                "encoder_lr": 0.1,
                "evaluation": "unimatch-whole",
            },
            "cityscapes": {
                **_UNIMATCH,
                "net": "augseg-resnet101",
                "augment": "augseg",
                "crop": [800, 800],
                "batch": 16,
                "unlabeled_batch": 16,
                "epochs": 240,
                "lr": 1e-2,
                "weight_decay": 5e-4,
                "sup_loss": "ohem",
                "evaluation": "u2pl-slide",
                "eval_args": {"crop": [800, 800], "stride": 533},
            },
        },
    }
)
# UniMatch-V2@f6afb4d, 4 x (4+4) on VOC, 4 x (2+2) on Cityscapes; its OHEM counts per GPU. The base
# network is `net=dinov2-base-dpt`. Its windows over the far border are shifted back.
_UNIMATCH_V2 = {
    "net": "dinov2-small-dpt",
    "optimizer": "adamw",
    "augment": "unimatch",
    "lr": 2e-4,
    "encoder_lr": 1 / 40,
    "weight_decay": 1e-2,
}
# GTA-Seg@534f10f is U2PL's program with 4 x (3+3) images; GPS says that it follows CPS; of Dual
# Teacher on VOC and Cityscapes nothing is released, so that UniMatch's schedule stands in for it,
# with the network whose size the slides print.
RECIPES: types.MappingProxyType[str, dict[str, dict]] = types.MappingProxyType(
    {
        **_RELEASED,
        "gta_seg": {
            "voc": {**_RELEASED["u2pl"]["voc"], "batch": 12, "unlabeled_batch": 12},
            "cityscapes": _RELEASED["u2pl"]["cityscapes"],
        },
        "gps": _RELEASED["cps"],
        "unimatch_v2": {
            "voc": {
                **_UNIMATCH_V2,
                "crop": [518, 518],
                "batch": 16,
                "unlabeled_batch": 16,
                "epochs": 60,
                "evaluation": "unimatch-whole",
                "eval_args": {"multiple": 14},
            },
            "cityscapes": {
                **_UNIMATCH_V2,
                "crop": [798, 798],
                "batch": 8,
                "unlabeled_batch": 8,
                "epochs": 180,
                "sup_loss": "ohem",
                "ohem_min_kept": 200_000,
                "evaluation": "unimatch-slide",
                "eval_args": {"crop": [798, 798], "stride": 532, "border": "shift"},
            },
        },
        "dual_teacher": {
            "voc": {**_RELEASED["unimatch"]["voc"], "net": "mmseg-resnet50", "crop": [513, 513]},
            "cityscapes": _RELEASED["unimatch"]["cityscapes"],
        },
    }
)
# Whose list a split is, and so whose recipe is meant where none is named.
FAMILIES = {
    "voc": {"classic": "unimatch", "u2pl": "u2pl", "cps": "cps"},
    "cityscapes": {"classic": "unimatch", "u2pl": "u2pl", "cps": "cps", "gta": "gta_seg"},
}


def _published() -> dict[str, dict]:
    found = {}
    for dataset, families in FAMILIES.items():
        for known in lists.published(dataset):
            family, _, labels = known.name.partition("-")
            if family not in families or not labels.isdigit():
                continue
            for recipe in ("", *RECIPES):
                values = {**RECIPES[recipe or families[family]][dataset]}
                if isinstance(epochs := values["epochs"], dict):
                    values["epochs"] = epochs[min(n for n in epochs if n >= int(labels))]
                fixed = {"dataset": dataset, "split": known.name, "labeled": int(labels)}
                name = "-".join(filter(None, [dataset, known.name, recipe]))
                found[name] = {**fixed, "amp": "bf16", **values}
    return found


PROTOCOLS: types.MappingProxyType[str, dict] = types.MappingProxyType({**OWN, **_published()})

# A notebook's `profile` is how much to run; with a dataset it names a protocol.
PROFILES: types.MappingProxyType[str, dict[str, str]] = types.MappingProxyType(
    {
        "smoke": {"mosaic": "mosaic-smoke", "camvid": "camvid-smoke"},
        "quick": {"mosaic": "mosaic-32", "camvid": "camvid-quick"},
        "camvid": {"camvid": "camvid-23"},
        "paper": {"voc": "voc-classic-183", "cityscapes": "cityscapes-u2pl-744"},
    }
)


def matching(pattern: str) -> list[str]:
    """Names of protocols, such as those of "voc-classic-*-gta_seg". Raises ValueError for none."""
    found = [name for name in PROTOCOLS if fnmatch(name, pattern)]
    if not found:
        raise ValueError(f"no protocol is called {pattern!r}: `s4 protocols` lists them")
    return found


def protocol(name: str, **changes) -> Config:
    """The Config of a named protocol with some fields changed.

    Raises:
        ValueError: unknown protocol, field or value; lists what is valid.
    """
    values = settings(name, changes.get("method", ""))
    if "method_args" in values and isinstance(changes.get("method_args"), dict):
        changes["method_args"] = {**values["method_args"], **changes["method_args"]}
    return Config.from_dict({"protocol": name, **values, **changes})


def settings(name: str, method: str = "") -> dict:
    """The values of a named protocol, for a method. Raises ValueError, saying what is valid."""
    if name not in PROTOCOLS:
        raise ValueError(
            f"protocol={name!r}: choose one of {', '.join(OWN)}, or DATASET-SPLIT[-RECIPE] such as "
            f"voc-classic-183-gta_seg (`s4 protocols` lists all {len(PROTOCOLS)})"
        )
    values, own = PROTOCOLS[name], FROM_SCRATCH.get(method, {}) if name in OWN else {}
    warmup = max(values.get("warmup", 0), own.get("warmup", 0))
    return {**values, **own, **({"warmup": warmup} if warmup else {})}


def profile_protocol(profile: str, dataset: str) -> str:
    """The protocol that a profile means for a dataset. Raises ValueError, naming the valid."""
    if profile not in PROFILES:
        raise ValueError(f"profile={profile!r}: choose one of {', '.join(PROFILES)}")
    if dataset not in PROFILES[profile]:
        known = sorted({d for datasets in PROFILES.values() for d in datasets})
        if dataset not in known:
            raise ValueError(f"dataset={dataset!r}: choose one of {', '.join(known)}")
        raise ValueError(
            f"profile={profile!r} is for dataset {', '.join(PROFILES[profile])}, not {dataset!r}"
        )
    return PROFILES[profile][dataset]
