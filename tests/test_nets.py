"""Networks: any timm encoder with a pyramid, DeepLabV3+ decoder, weights from files."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from s4lib.nets import SegNet, build_net
from s4lib.weights import load_encoder, read_tensors

ENCODERS = {
    "test_resnet": (8, 16, 32),
    "resnet18": (16, 32),
    "mobilenetv1_100": (8, 16, 32),
    "convnext_atto": (16, 32),
    "efficientnet_lite0": (16,),
}
CASES = [(encoder, stride) for encoder, strides in ENCODERS.items() for stride in strides]


@pytest.mark.parametrize(("encoder", "stride"), CASES)
def test_many_encoders_give_logits_at_input_size_from_features_at_their_strides(encoder, stride):
    net = SegNet(5, encoder=encoder, output_stride=stride, width=16, low_width=8, rates=[2]).eval()
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        low, deep = net.encode(image)
        assert net(image).shape == (1, 5, 64, 96)
    assert low.shape[2:] == (16, 24)
    assert deep.shape[2:] == (64 // stride, 96 // stride)


@pytest.mark.parametrize("name", ["light", "tiny", "mobilenetv1", "deeplabv3plus-resnet18"])
def test_small_named_networks_give_logits(name):
    net = build_net(name, 3).eval()
    with torch.no_grad():
        assert net(torch.randn(1, 3, 64, 64)).shape == (1, 3, 64, 64)


@pytest.mark.parametrize(
    ("name", "tensors", "weights", "logits"),
    [("light", 124, 9013.5179, 0.07732773), ("tiny", 130, 21177.1855, 0.19770745)],
)
def test_recorded_networks_start_and_compute_as_when_they_were_recorded(
    name, tensors, weights, logits
):
    """Published records of the embedded dataset stand on these; a changed order of drawing initial
    weights, a renamed layer or another upsampling would part them from the code."""
    torch.manual_seed(0)
    net = build_net(name, 4).eval()
    state = net.state_dict()
    assert len(state) == tensors and "decoder.pooled.weight" in state
    total = sum(v.double().abs().sum() for v in state.values() if v.is_floating_point())
    assert float(total) == pytest.approx(weights, rel=1e-6)
    image = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    with torch.no_grad():
        assert float(net(image).double().abs().mean()) == pytest.approx(logits, rel=1e-4)


def test_sizes_that_strides_do_not_divide_work():
    net = build_net("tiny", 4).eval()
    assert net(torch.randn(2, 3, 37, 51)).shape == (2, 4, 37, 51)


@pytest.fixture(scope="module")
def net() -> SegNet:
    torch.manual_seed(0)
    return build_net("tiny", 4).eval()


@torch.no_grad()
def test_forward_is_encode_then_decode(net):
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(net(image), net.decode(net.encode(image), image.shape[-2:]))


@torch.no_grad()
def test_perturb_is_called_on_features_between_encode_and_decode(net):
    image = torch.randn(2, 3, 32, 32)
    shapes = []

    def double(features: torch.Tensor) -> torch.Tensor:
        shapes.append(features.shape)
        return 2 * features

    logits = net(image, perturb=double)
    features = net.encode(image)
    assert shapes == [f.shape for f in features]
    assert torch.equal(logits, net.decode(tuple(2 * f for f in features), image.shape[-2:]))
    assert not torch.equal(logits, net(image))
    assert torch.equal(net(image, perturb=lambda f: f), net(image))


def test_group_norm_makes_results_independent_of_the_batch():
    image = torch.randn(4, 3, 32, 32)
    for name in ("tiny", "light"):
        net = build_net(name, 4, norm="group").train()
        assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules())
        torch.testing.assert_close(net(image)[:1], net(image[:1]), rtol=1e-4, atol=1e-5)
    with_batch_norm = build_net("tiny", 4).train()
    assert (with_batch_norm(image)[:1] - with_batch_norm(image[:1])).abs().max() > 1e-3


def test_gradients_reach_every_parameter():
    for name in ("tiny", "light"):
        net = build_net(name, 4)
        net(torch.randn(2, 3, 64, 64)).square().sum().backward()
        assert all(p.grad is not None for p in net.parameters()), name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "huge"}, ["net='huge'", "light", "tiny"]),
        ({"name": "tiny", "depth": 3}, ["'depth'", "encoder", "output_stride"]),
        ({"name": "tiny", "encoder": "resnet1"}, ["resnet1"]),
        ({"name": "tiny", "norm": "layer"}, ["norm='layer'", "batch", "group"]),
        ({"name": "tiny", "skip_stride": 3}, ["skip_stride=3"]),
        ({"name": "tiny", "output_stride": 5}, ["output_stride=5"]),
        ({"name": "tiny", "encoder": "vit_tiny_patch16_224"}, ["vit_tiny_patch16_224"]),
        ({"name": "tiny", "decoder": "cpd"}, ["decoder='cpd'", "u2pl", "cps", "dpt"]),
        ({"name": "tiny", "decoder": "dpt"}, ["test_resnet", "vision transformer"]),
        ({"name": "tiny", "multi_grid": [2, 2]}, ["multi_grid=[2, 2]", "layer4"]),
        ({"name": "mobilenetv1", "multi_grid": [2]}, ["multi_grid=[2]", "which has 0"]),
        ({"name": "mobilenetv1", "ceil_mode": True}, ["ceil_mode=True", "no max-pool"]),
        (
            {"name": "tiny", "decoder": "dpt", "encoder": "test_vit", "taps": [1, 2, 3, 9]},
            ["taps=[1, 2, 3, 9]", "four rising"],
        ),
    ],
)
def test_bad_arguments_are_named_in_one_line(arguments, words):
    with pytest.raises(ValueError) as error:
        build_net(classes=4, **arguments)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.fixture
def encoder_file(tmp_path) -> Path:
    """Weights of timm's whole test_resnet, classifier included."""
    torch.manual_seed(1)
    path = tmp_path / "encoder.safetensors"
    safetensors.torch.save_file(timm.create_model("test_resnet").state_dict(), path)
    return path


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_a_classifiers_weights_initialise_the_encoder(encoder_file, ending):
    given = read_tensors(encoder_file)
    assert "fc.weight" in given
    if ending == ".pth":
        encoder_file = encoder_file.with_suffix(ending)
        torch.save(given, encoder_file)
    loaded = build_net("tiny", 4, weights=str(encoder_file)).encoder.state_dict()
    assert all(torch.equal(loaded[k], given[k]) for k in loaded)


@pytest.mark.parametrize("encoder", ["resnet18", "convnext_atto", "efficientnet_lite0"])
def test_whatever_timm_names_its_classifier_it_may_be_left_over(tmp_path, encoder):
    torch.manual_seed(1)
    path = tmp_path / "classifier.pth"
    classifier = timm.create_model(encoder, num_classes=7).eval()
    torch.save(classifier.state_dict(), path)
    net = SegNet(4, encoder=encoder, width=16, low_width=8, rates=[2], output_stride=32).eval()
    load_encoder(net, path)
    image = torch.randn(1, 3, 64, 64)
    features = timm.create_model(encoder, features_only=True).eval()
    extra = {k.replace(".", "_", 1): v for k, v in classifier.state_dict().items()}
    features.load_state_dict(
        {k: {**extra, **classifier.state_dict()}[k] for k in features.state_dict()}
    )
    with torch.no_grad():
        torch.testing.assert_close(net.encode(image)[1], features(image)[-1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("conv1.0.weight"), ["lacks", "conv1.0.weight"]),
        (lambda s: s.update(extra=torch.zeros(1)), ["no place for", "extra"]),
        (
            lambda s: s.update({"conv1.0.weight": torch.zeros(1)}),
            ["other shapes", "conv1.0.weight"],
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_in_one_line(tmp_path, encoder_file, change, words):
    state = read_tensors(encoder_file)
    change(state)
    path = tmp_path / "other.safetensors"
    safetensors.torch.save_file(state, path)
    with pytest.raises(ValueError) as error:
        build_net("tiny", 4, weights=str(path))
    text = str(error.value)
    assert "\n" not in text and "another architecture" in text and str(path) in text
    assert all(word in text for word in words)


def test_weights_of_another_architecture_are_refused(tmp_path):
    path = tmp_path / "resnet18.safetensors"
    safetensors.torch.save_file(timm.create_model("resnet18").state_dict(), path)
    with pytest.raises(ValueError, match="another architecture"):
        build_net("mobilenetv1", 4, weights=str(path))


class Malicious:
    """A pickle of it would write a file."""

    def __init__(self, victim: Path):
        self.victim = victim

    def __reduce__(self):
        return Path.touch, (self.victim,)


@pytest.mark.parametrize("zipped", [False, True])
def test_code_in_a_pickle_is_never_run(tmp_path, zipped):
    path, victim = tmp_path / "weights.pth", tmp_path / "owned"
    content = {"conv1.0.weight": Malicious(victim)}
    if zipped:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError) as error:
        build_net("tiny", 4, weights=str(path))
    assert not victim.exists()
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not tensors", b"\x80\x02", None])
def test_a_corrupt_weights_file_is_refused_in_one_line(tmp_path, encoder_file, name, content):
    path = tmp_path / name
    if content is None:
        torch.save(read_tensors(encoder_file), tmp_path / "whole.pth")
        source = encoder_file if path.suffix == ".safetensors" else tmp_path / "whole.pth"
        content = source.read_bytes()[:-2000]
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_tensors(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_weights_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="no-such.pth: no such file"):
        build_net("tiny", 4, weights=str(tmp_path / "no-such.pth"))


def test_a_file_that_holds_no_state_dict_is_refused(tmp_path):
    path = tmp_path / "list.pth"
    torch.save([1, 2], path)
    with pytest.raises(ValueError) as error:
        build_net("tiny", 4, weights=str(path))
    assert str(path) in str(error.value)


def test_shared_imagenet_weights_load_strictly_and_change_the_outputs(shared):
    path = shared("weights", "mobilenetv1_100_stride16.safetensors")
    torch.manual_seed(0)
    net = build_net("mobilenetv1", 4).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = net.encode(image)[1]
        load_encoder(net, path)
        after = net.encode(image)[1]
    assert (before - after).abs().max() > 1e-2
    assert torch.isfinite(after).all()
    given = read_tensors(path)
    loaded = net.encoder.state_dict()
    assert all(torch.equal(loaded[k], v.to(loaded[k].dtype)) for k, v in given.items())


def test_shared_weights_of_another_width_are_refused(shared):
    path = shared("weights", "mobilenetv1_025.safetensors")
    with pytest.raises(ValueError, match="another architecture"):
        build_net("mobilenetv1", 4, weights=str(path))
