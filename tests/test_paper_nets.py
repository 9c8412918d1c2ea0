"""The papers' networks: sizes, shapes and arithmetic against their authors' code, and its files.

Where only sizes and shapes matter a network lies on torch's `meta` device, which computes nothing.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s4lib.encoders import Tokens
from s4lib.nets import NETS, SegNet, build_net
from s4lib.weights import load_encoder

DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def kinds(module: nn.Module, kind: type) -> list:
    return [m for m in module.modules() if isinstance(m, kind)]


def on_meta(name: str, classes: int, **changes) -> SegNet:
    with torch.device("meta"):
        return build_net(name, classes, **changes)


@pytest.mark.parametrize(
    ("name", "changes", "parameters"),
    [
        ("u2pl-resnet50", {}, 43_631_061),
        ("u2pl-resnet101", {}, 62_623_189),
        ("u2pl-resnet50", {"representation": True}, 45_467_861),
        ("u2pl-resnet101", {"representation": True}, 64_459_989),
        ("mmseg-resnet50", {"auxiliary": True}, 43_591_418),
        ("augseg-resnet50", {}, 40_475_957 + 48),  # biases that UniMatch's does not have
    ],
)
def test_parameters_are_exactly_those_of_the_authors_code(name, changes, parameters):
    assert count(on_meta(name, 21, **changes)) == parameters


@pytest.mark.parametrize(
    ("name", "millions", "mask_token"),
    [
        ("cps-resnet50", "40.476", 0),
        ("cps-resnet101", "59.468", 0),
        ("unimatch-resnet50", "40.476", 0),
        ("unimatch-resnet101", "59.468", 0),
        ("augseg-resnet50", "40.476", 0),
        ("augseg-resnet101", "59.468", 0),
        ("dinov2-small-dpt", "24.796", 384),  # counted there, though only pre-training uses it
        ("dinov2-base-dpt", "97.529", 768),
    ],
)
def test_parameters_are_the_reported_millions(name, millions, mask_token):
    assert f"{(count(on_meta(name, 21)) + mask_token) / 1e6:.3f}" == millions


def test_u2pl_has_the_parts_and_shapes_of_its_code(shared):
    golden = np.load(shared("reference", "golden", "deeplab_params.npz"))
    rows = zip(
        *(golden[key] for key in ("arch", "num_classes", "rep_head", "aux", "total_params")),
        golden["submodule_params"].tolist(),
        golden["out_shapes_pred_rep_aux"].reshape(-1, 4, 3, 4).tolist(),
        strict=True,
    )
    for arch, classes, representation, auxiliary, total, parts, shapes in rows:
        if classes == 11:
            continue  # CamVid's number, of which the authors have no network: 19 and 21 suffice
        given = {"representation": bool(representation), "auxiliary": bool(auxiliary)}
        net = on_meta(f"u2pl-{arch}", int(classes), **given).eval()
        assert count(net) == total
        wanted = dict(zip(golden["submodules"].tolist(), parts, strict=True))
        sizes = {name: count(child) for name, child in net.named_children()}
        assert sizes.pop("decoder") == wanted["low_conv"] + wanted["aspp"] + wanted["head"]
        for name, golden_name in (("auxiliary", "auxor"), ("representation",) * 2):
            assert sizes.pop(name, 0) == wanted[golden_name]
        assert sizes == {name: wanted[name] for name in ("encoder", "classifier")}
        if (arch, classes, representation) != ("resnet50", 19, True):
            continue  # the same shapes again
        for size, (logits, embedding, side) in zip(golden["input_sizes"], shapes, strict=True):
            features = net.encode(torch.empty(1, 3, *size, device="meta"))
            fused = net.fuse(features)
            # The authors upsample outside of their network.
            assert list(net.classifier(fused).shape) == logits
            assert list(net.representation(fused).shape) == embedding
            assert list(net.auxiliary(features[-2]).shape) == side
            assert net.decode(features, size.tolist()).shape[2:] == tuple(size)


def resnet_names(depth: int, stem: str = "conv1.", last_norm: str = "bn1") -> list[str]:
    """State-dict keys of a bottleneck ResNet with a deep stem, written down from its definition."""
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    names = []
    for conv, bn in ((f"{stem}0", f"{stem}1"), (f"{stem}3", f"{stem}4"), (f"{stem}6", last_norm)):
        names += [f"{conv}.weight", *(f"{bn}.{n}" for n in norm)]
    for layer, blocks in enumerate(DEPTHS[depth], 1):
        for block in range(blocks):
            at = f"layer{layer}.{block}."
            for i in (1, 2, 3):
                names += [f"{at}conv{i}.weight", *(f"{at}bn{i}.{n}" for n in norm)]
            if block == 0:
                names += [f"{at}downsample.0.weight", *(f"{at}downsample.1.{n}" for n in norm)]
    return names


def resnet(s: dict[str, Tensor], x: Tensor, dilations: list, strides: list, ceil: bool) -> list:
    """Features of the four stages in evaluation mode, from a state dict alone. `dilations` has a
    list for each stage: of its first block, its second, and all further ones."""

    def conv_bn(x, conv, bn, stride=1, dilation=1):
        padding = dilation * (s[f"{conv}.weight"].shape[-1] // 2)
        x = F.conv2d(x, s[f"{conv}.weight"], None, stride, padding, dilation)
        mean, var = s[f"{bn}.running_mean"], s[f"{bn}.running_var"]
        return F.batch_norm(x, mean, var, s[f"{bn}.weight"], s[f"{bn}.bias"], eps=1e-5)

    x = conv_bn(x, "conv1.0", "conv1.1", 2).relu()
    x = conv_bn(x, "conv1.3", "conv1.4").relu()
    x = conv_bn(x, "conv1.6", "bn1").relu()
    x = F.max_pool2d(x, 3, 2, 1, ceil_mode=ceil)
    features = []
    for layer, (rates, stride) in enumerate(zip(dilations, strides, strict=True), 1):
        block = 0
        while (at := f"layer{layer}.{block}.") + "conv1.weight" in s:
            step, rate = (stride if block == 0 else 1), rates[min(block, 2)]
            y = conv_bn(x, f"{at}conv1", f"{at}bn1").relu()
            y = conv_bn(y, f"{at}conv2", f"{at}bn2", step, rate).relu()
            y = conv_bn(y, f"{at}conv3", f"{at}bn3")
            if block == 0:
                x = conv_bn(x, f"{at}downsample.0", f"{at}downsample.1", step)
            x, block = (x + y).relu(), block + 1
        features.append(x)
    return features


PLAIN = [1, 1, 1]
RESNETS = {
    "u2pl-resnet101": (101, [PLAIN, PLAIN, [1, 2, 2], [4, 8, 16]], [1, 2, 1, 1], True),
    "cps-resnet50": (50, [PLAIN, PLAIN, PLAIN, [2, 4, 8]], [1, 2, 2, 1], False),
    "augseg-resnet50": (50, [PLAIN, PLAIN, PLAIN, [2, 4, 8]], [1, 2, 2, 1], True),
    "unimatch-resnet50": (50, [PLAIN, PLAIN, PLAIN, [1, 2, 2]], [1, 2, 2, 1], False),
    "mmseg-resnet50": (50, [PLAIN, PLAIN, [1, 2, 2], [2, 4, 4]], [1, 2, 1, 1], False),
}


@pytest.fixture(scope="module")
def nets() -> dict[str, SegNet]:
    """Networks with weights, and BN that does something, in evaluation mode (drawing them here is
    faster than timm's initialisation)."""
    made = {name: on_meta(name, 5).to_empty(device="cpu").eval() for name in RESNETS}
    generator = torch.Generator().manual_seed(0)
    for net in made.values():
        for m in kinds(net, nn.Conv2d):
            nn.init.kaiming_uniform_(m.weight, generator=generator)
            if m.bias is not None:
                nn.init.uniform_(m.bias, -0.1, 0.1, generator=generator)
        for m in kinds(net, nn.BatchNorm2d):
            for values, low in ((m.weight, 0.5), (m.bias, -0.5), (m.running_var, 0.5)):
                nn.init.uniform_(values, low, low + 1, generator=generator)
            nn.init.uniform_(m.running_mean, -0.1, 0.1, generator=generator)
            m.num_batches_tracked.zero_()
    return made


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if "101" in n else ()) for n in RESNETS]
)
@torch.no_grad()
def test_the_encoder_is_the_papers_resnet(nets, name):
    depth, dilations, strides, ceil = RESNETS[name]
    state = nets[name].encoder.state_dict()
    assert list(state) == resnet_names(depth)
    image = torch.randn(1, 3, 65, 72)
    low, deep = nets[name].encode(image)
    stages = resnet(state, image, dilations, strides, ceil)
    torch.testing.assert_close(low, stages[0])
    torch.testing.assert_close(deep, stages[3], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_middle_feature_is_the_last_but_one():
    net = on_meta("u2pl-resnet50", 5, auxiliary=True)
    features = net.encode(torch.empty(1, 3, 64, 64, device="meta"))
    assert [f.shape[1] for f in features] == [256, 1024, 2048]


def test_cps_aspp_equals_one_bn_over_four_convolutions_plus_a_pooled_branch(nets):
    """As TorchSemiSeg writes it: the same values in training mode, with the batch's statistics."""
    decoder = nets["cps-resnet50"].decoder.train()
    low, deep = torch.randn(2, 256, 8, 8), torch.randn(2, 2048, 4, 4)
    with torch.no_grad():
        found = decoder(low, deep)[:, :256]
        maps, norms = [b[0] for b in decoder.branches], [b[1] for b in decoder.branches]
        norm = nn.BatchNorm2d(1024).train()
        norm.weight.copy_(torch.cat([n.weight for n in norms]))
        norm.bias.copy_(torch.cat([n.bias for n in norms]))
        joint = decoder.project[0].weight
        x = F.leaky_relu(norm(torch.cat([conv(deep) for conv in maps], 1)), 0.01)
        pool = F.leaky_relu(decoder.pooled(deep.mean((2, 3), keepdim=True)), 0.01)
        x = F.conv2d(x, joint[:, :1024]) + F.conv2d(pool, joint[:, 1024:]).repeat(1, 1, 4, 4)
        x = F.leaky_relu(decoder.project[1](x), 0.01)
        wanted = F.interpolate(x, (8, 8), mode="bilinear", align_corners=True)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    decoder.eval()


@pytest.mark.parametrize(
    ("name", "rates", "channels"),
    [
        ("u2pl-resnet101", [12, 24, 36], 512),
        ("cps-resnet50", [6, 12, 18], 304),
        ("unimatch-resnet50", [6, 12, 18], 304),
        ("augseg-resnet50", [6, 12, 18], 304),
        ("mmseg-resnet50", [12, 24, 36], 560),
    ],
)
def test_rates_and_the_fused_map_are_the_papers(nets, name, rates, channels):
    branches = nets[name].decoder.branches
    assert [b[0].dilation[0] for b in branches] == [1, *rates]
    assert [b[0].kernel_size[0] for b in branches] == [1, 3, 3, 3]
    with torch.no_grad():
        low, deep = nets[name].encode(torch.randn(1, 3, 64, 96))
        assert nets[name].fuse((low, deep)).shape == (1, channels, *low.shape[2:])
    assert low.shape[2:] == ((17, 25) if RESNETS[name][3] else (16, 24))  # its pool rounds up


@pytest.mark.parametrize(
    ("name", "leaky", "dropouts", "separable", "biased"),
    [
        ("u2pl-resnet101", 0, 3, 0, 4),
        ("cps-resnet50", 6, 0, 0, 1),  # leaky: four branches, the pooled one, their sum
        ("unimatch-resnet50", 0, 0, 0, 1),
        ("augseg-resnet50", 0, 0, 0, 2),
        ("mmseg-resnet50", 0, 1, 5, 1),
    ],
)
def test_what_differs_between_the_decoders(nets, name, leaky, dropouts, separable, biased):
    parts = nn.ModuleList([nets[name].decoder, nets[name].classifier])
    assert len(kinds(parts, nn.LeakyReLU)) == leaky
    assert [m.p for m in kinds(parts, nn.Dropout2d)] == [0.1] * dropouts
    assert sum(m.groups > 1 for m in kinds(parts, nn.Conv2d)) == separable
    assert sum(m.bias is not None for m in kinds(parts, nn.Conv2d)) == biased
    assert kinds(nets[name].decoder.pooled, nn.BatchNorm2d)


@torch.no_grad()
def test_logits_are_upsampled_as_the_paper_aligns_corners(nets):
    for name, net in nets.items():
        image = torch.randn(1, 3, 33, 41)
        coarse = net.classifier(net.fuse(net.encode(image)))
        aligned = name != "mmseg-resnet50"
        assert net.decoder.align_corners is aligned
        wanted = F.interpolate(coarse, (33, 41), mode="bilinear", align_corners=aligned)
        assert torch.equal(net(image), wanted)


def test_the_auxiliary_head_learns_through_the_middle_feature():
    net = SegNet(4, encoder="test_resnet", width=16, low_width=8, rates=[2], auxiliary=True)
    image = torch.randn(2, 3, 32, 48)
    features = net.encode(image)
    assert len(features) == 3
    assert torch.equal(net.decode(features, (32, 48)), net.decode(net.encode(image), (32, 48)))
    logits = net.auxiliary_logits(features, (32, 48))
    assert logits.shape == (2, 4, 32, 48)
    logits.square().sum().backward()
    reached = {n.split(".")[0] for n, p in net.named_parameters() if p.grad is not None}
    assert reached == {"encoder", "auxiliary"}
    assert all(p.grad is None for p in net.encoder.layer4.parameters())


def test_a_network_without_auxiliary_head_says_so():
    net = build_net("tiny", 4)
    assert net.auxiliary is None and net.representation is None
    with pytest.raises(ValueError, match="auxiliary=True"):
        net.auxiliary_logits(net.encode(torch.zeros(2, 3, 32, 32)), (32, 32))


# DINOv2 and DPT


@pytest.fixture(scope="module")
def dinov2() -> SegNet:
    torch.manual_seed(0)
    return build_net("dinov2-small-dpt", 5).eval()


@torch.no_grad()
def test_tokens_are_those_after_the_taps_through_the_last_norm(dinov2):
    vit, image = dinov2.encoder.vit, torch.randn(2, 3, 28, 42)
    features = dinov2.encode(image)
    assert [tuple(f.shape) for f in features] == [(2, 384, 2, 3)] * 4
    x, wanted = vit._pos_embed(vit.patch_embed(image)), []
    for block in vit.blocks:
        x = block(x)
        wanted.append(vit.norm(x)[:, 1:].transpose(1, 2).reshape(2, 384, 2, 3))
    for feature, tap in zip(features, (2, 5, 8, 11), strict=True):
        torch.testing.assert_close(feature, wanted[tap])


@pytest.mark.parametrize(
    ("size", "nearest"), [((30, 40), (28, 42)), ((5, 20), (14, 14)), ((35, 49), (42, 56))]
)
@torch.no_grad()
def test_images_of_any_size_are_seen_at_the_nearest_multiple_of_a_patch(dinov2, size, nearest):
    image = torch.randn(1, 3, *size)
    resized = F.interpolate(image, nearest, mode="bilinear", align_corners=True)
    for a, b in zip(dinov2.encode(image), dinov2.encode(resized), strict=True):
        assert torch.equal(a, b)
    assert dinov2(image).shape == (1, 5, *size)


@torch.no_grad()
def test_dpt_equals_its_definition(dinov2):
    """RefineNet's fusion, coarse to fine, written without modules."""
    s = dinov2.decoder.state_dict()
    features = [torch.randn(1, 384, 3, 5) for _ in range(4)]

    def conv(x, name, **how):
        return F.conv2d(x, s[f"{name}.weight"], s.get(f"{name}.bias"), **how)

    def unit(x, name):
        return x + conv(conv(x.relu(), f"{name}.1", padding=1).relu(), f"{name}.3", padding=1)

    levels = [conv(f, f"levels.{i}") for i, f in enumerate(features)]
    assert [m.shape[1] for m in levels] == [48, 96, 192, 384]
    for i, stride in ((0, 4), (1, 2)):
        weight, bias = s[f"resize.{i}.weight"], s[f"resize.{i}.bias"]
        levels[i] = F.conv_transpose2d(levels[i], weight, bias, stride=stride)
    levels[3] = conv(levels[3], "resize.3", stride=2, padding=1)
    maps = [conv(m, f"reduce.{i}", padding=1) for i, m in enumerate(levels)]
    assert [tuple(m.shape) for m in maps] == [
        (1, 64, 12, 20),
        (1, 64, 6, 10),
        (1, 64, 3, 5),
        (1, 64, 2, 3),
    ]
    path = maps[3]
    for i, size in ((3, (3, 5)), (2, (6, 10)), (1, (12, 20)), (0, (24, 40))):
        if i < 3:
            path = path + unit(maps[i], f"fusions.{i}.skip")
        path = unit(path, f"fusions.{i}.refine")
        path = F.interpolate(path, size, mode="bilinear", align_corners=True)
        path = conv(path, f"fusions.{i}.out")
    torch.testing.assert_close(dinov2.fuse(tuple(features)), path)
    assert not kinds(nn.ModuleList([dinov2.decoder, dinov2.classifier]), nn.BatchNorm2d)


def test_gradients_reach_all_but_the_unit_that_has_nothing_to_add(dinov2):
    dinov2(torch.randn(1, 3, 28, 28)).square().sum().backward()
    without = {n for n, p in dinov2.named_parameters() if p.grad is None}
    dinov2.zero_grad(set_to_none=True)
    assert {n.rsplit(".", 2)[0] for n in without} == {"decoder.fusions.3.skip"}


def test_another_vision_transformer_works_too():
    net = on_meta("dinov2-small-dpt", 4, encoder="vit_tiny_patch16_224")
    assert net(torch.empty(2, 3, 100, 70, device="meta")).shape == (2, 4, 100, 70)
    assert isinstance(net.encoder, Tokens)


# Published files


def published(net: SegNet, rename=lambda name: name, **extra: Tensor) -> dict[str, Tensor]:
    """A checkpoint as its authors would name it, with other values than the network has."""
    state = net.encoder.state_dict()
    numbers = {k: torch.full_like(v, i % 97 + 1) for i, (k, v) in enumerate(state.items())}
    return {rename(k): v for k, v in numbers.items()} | extra


CLASSIFIER = {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}


def to_mmseg(name: str) -> str:
    """MMSegmentation's name: its deep stem is one sequence, its BN included."""
    return re.sub(r"^bn1\.", "stem.7.", re.sub(r"^conv1\.", "stem.", name))


@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        pytest.param("u2pl-resnet101", lambda s: s | CLASSIFIER, marks=pytest.mark.slow),
        ("unimatch-resnet50", lambda s: {f"module.{k}": v for k, v in (s | CLASSIFIER).items()}),
        ("cps-resnet50", lambda s: {"model": {f"module.backbone.{k}": v for k, v in s.items()}}),
        ("cps-resnet50", lambda s: {k: v for k, v in s.items() if "num_batches" not in k}),
        ("mmseg-resnet50", lambda s: {"meta": {}, "state_dict": {to_mmseg(k): s[k] for k in s}}),
    ],
)
def test_published_resnets_load_completely(tmp_path, nets, name, wrap):
    net, path = nets[name], tmp_path / "resnet.pth"
    before = {k: v.clone() for k, v in net.encoder.state_dict().items()}
    given = published(net)
    torch.save(wrap(given), path)
    load_encoder(net, path)
    after = net.encoder.state_dict()
    loaded = {k: torch.equal(after[k], given[k]) for k in after if "num_batches" not in k}
    net.encoder.load_state_dict(before)
    assert all(loaded.values())


def test_mmsegs_names_are_written_down_from_its_code(nets):
    names = {to_mmseg(k) for k in nets["mmseg-resnet50"].encoder.state_dict()}
    assert names == set(resnet_names(50, stem="stem.", last_norm="stem.7"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("layer4.2.conv3.weight"), ["lacks", "layer4.2.conv3.weight"]),
        (lambda s: s.update(other=torch.zeros(1)), ["no place for", "other"]),
        (
            lambda s: s.update({"conv1.6.weight": torch.zeros(64, 32, 3, 3)}),
            ["other shapes", "conv1.6.weight"],
        ),
    ],
)
def test_a_resnet_with_another_stem_or_depth_is_refused(tmp_path, nets, change, words):
    net, path = nets["cps-resnet50"], tmp_path / "resnet.pth"
    given = published(net)
    change(given)
    torch.save({f"module.{k}": v for k, v in given.items()}, path)
    with pytest.raises(ValueError, match="another architecture") as error:
        load_encoder(net, path)
    assert all(word in str(error.value) for word in words)


def test_metas_dinov2_file_loads(tmp_path, dinov2):
    path = tmp_path / "dinov2_vits14_pretrain.pth"
    before = {k: v.clone() for k, v in dinov2.encoder.state_dict().items()}
    given = published(dinov2, lambda k: k.removeprefix("vit."), mask_token=torch.zeros(1, 384))
    assert {"cls_token", "pos_embed", "blocks.11.ls2.gamma", "norm.bias"} <= given.keys()
    torch.save(given, path)
    load_encoder(dinov2, path)
    after = dinov2.encoder.state_dict()
    loaded = {k: torch.equal(after[k], given[k.removeprefix("vit.")]) for k in after}
    dinov2.encoder.load_state_dict(before)
    assert all(loaded.values())


def test_named_networks_give_logits_of_any_size():
    names = [n for n in NETS if "-" in n and ("101" not in n or "plus" in n) and "base" not in n]
    assert len(names) == 9
    for name in names:
        net = on_meta(name, 7)
        assert net(torch.empty(2, 3, 97, 130, device="meta")).shape == (2, 7, 97, 130), name
