"""Networks by name, and what differs between those that papers call by one name.

Six different networks are called DeepLabV3+ in papers whose tables are compared:

                    deeplabv3plus  u2pl           cps           unimatch      mmseg
used by             this book      U2PL, GTA-Seg  CPS, n-CPS,   UniMatch      Dual Teacher, going
                                                  PS-MT, GPS                  by its 43.6 M
stem                7x7, 64        64-64-128      64-64-128     64-64-128     32-32-64
output stride       16             8              16            16            8
layer4 dilations    1, 2, 2        4, 8, 16       2, 4, 8       1, 2, 2       2, 4, 4
max-pool rounds     down           up             down          down          down
ASPP rates          6, 12, 18      12, 24, 36     6, 12, 18     6, 12, 18     12, 24, 36
ASPP width          256            256            256           256           512
3x3 convolutions    plain          plain          plain         plain         separable
ASPP activation     ReLU           ReLU           LeakyReLU     ReLU          ReLU
image pooling       bias           BN             BN            BN            BN
ASPP joined by      1x1            3x3, dropout   1x1           1x1           3x3
low-level channels  48             256, bias      48            48            48
classifier, 2 x     3x3            3x3, bias,     3x3           3x3           3x3, dropout after
                                   dropout                                    the second
align_corners       no             yes            yes           yes           no
fused map           304, 1/4       512, 1/4       304, 1/4      304, 1/4      560, 1/4
parameters          40,351,925     43,631,061     40,475,957    40,475,957    41,226,213

augseg is AugSeg's: unimatch, but layer4 dilations 2, 4, 8, a max-pool that rounds up, and biases in
the low-level convolution (48 parameters more).

(ResNet-50, K = 21; ResNet-101 has 18,992,128 more; with its auxiliary head mmseg has 43,591,418.)
`dinov2-*-dpt` are UniMatch V2's: 24,795,253 and 97,528,021 parameters, where its own counts also
have DINOv2's mask token, unused.

Sources: U2PL@ab3d2be u2pl/models, TorchSemiSeg@5e0c29c exp.voc/*/network.py, UniMatch@0324f3d
model, AugSeg@7ead870 augseg/models, UniMatch-V2@f6afb4d model, MMSegmentation
configs/_base_/models/deeplabv3plus_r50-d8.py. New layers have PyTorch's initialisation, as in
U2PL, UniMatch, AugSeg and PS-MT's student; CPS and PS-MT's teachers take Kaiming's normal one. The
papers start from ImageNet encoders (or DINOv2's), which `weights=FILE` loads: see s4lib.weights.
"""

from __future__ import annotations

_U2PL = {
    "decoder": "u2pl",
    "output_stride": 8,
    "multi_grid": [2, 2, 4],
    "ceil_mode": True,
    "rates": [12, 24, 36],
    "low_width": 256,
}
_CPS = {"decoder": "cps", "multi_grid": [2, 2, 4]}
_AUGSEG = {"decoder": "augseg", "multi_grid": [2, 2, 4], "ceil_mode": True}
_DPT = {"decoder": "dpt", "fuse": 1}

# Keyword arguments of SegNet. `light` is the CPU network of the embedded dataset, 0.15 million
# parameters; the mobilenet is the one that shared small ImageNet weights exist for.
NETS: dict[str, dict] = {
    "light": {
        "encoder": "resnet10t",
        "encoder_args": {"channels": [16, 32, 48, 64], "stem_width": 8},
        "output_stride": 8,
        "skip_stride": 2,
        "width": 24,
        "low_width": 16,
        "rates": [2, 4],
        "aspp_width": 12,
        "fuse": 1,
    },
    "tiny": {
        "encoder": "test_resnet",
        "output_stride": 8,
        "width": 16,
        "low_width": 8,
        "rates": [2],
    },
    "mobilenetv1": {
        "encoder": "mobilenetv1_100",
        "encoder_args": {"pad_type": "same", "bn_eps": 1e-3},
        "output_stride": 16,
        "deep_index": 3,
        "width": 64,
        "low_width": 24,
        "rates": [2, 4],
    },
    "deeplabv3plus-resnet18": {
        "encoder": "resnet18",
        "output_stride": 16,
        "width": 128,
        "rates": [3, 6, 9],
    },
    "deeplabv3plus-resnet50": {"encoder": "resnet50"},
    "deeplabv3plus-resnet101": {"encoder": "resnet101"},
    "u2pl-resnet50": {"encoder": "resnet50s", **_U2PL},
    "u2pl-resnet101": {"encoder": "resnet101s", **_U2PL},
    "cps-resnet50": {"encoder": "resnet50s", **_CPS},
    "cps-resnet101": {"encoder": "resnet101s", **_CPS},
    "unimatch-resnet50": {"encoder": "resnet50s", "decoder": "unimatch"},
    "unimatch-resnet101": {"encoder": "resnet101s", "decoder": "unimatch"},
    "augseg-resnet50": {"encoder": "resnet50s", **_AUGSEG},
    "augseg-resnet101": {"encoder": "resnet101s", **_AUGSEG},
    "mmseg-resnet50": {
        "encoder": "resnet50c",
        "decoder": "mmseg",
        "output_stride": 8,
        "width": 512,
        "rates": [12, 24, 36],
    },
    "dinov2-small-dpt": {"encoder": "vit_small_patch14_dinov2", "width": 64, **_DPT},
    "dinov2-base-dpt": {
        "encoder": "vit_base_patch14_dinov2",
        "width": 128,
        "low_width": 96,
        **_DPT,
    },
}
