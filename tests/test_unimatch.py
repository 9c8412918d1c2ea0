"""UniMatch and UniMatch V2: the released loss, who sees what in a step, complementary dropout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import LOSS, equal
from torch import nn

from s4lib.build import build_method
from s4lib.losses import IGNORE, ce, ohem, pseudo_label, weighted_ce
from s4lib.method import Batch, Clock, Crop, ema, frozen_copy
from s4lib.methods import unimatch, unimatch_v2
from s4lib.methods.unimatch import UniMatch
from s4lib.methods.unimatch_v2 import UniMatchV2
from s4lib.mixing import Mix, paste
from s4lib.perturb import complementary_dropout

CLASSES = 3


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Identity(nn.Module):
    """A SegNet whose logits are its image plus a learnt shift; remembers each image and mode."""

    def __init__(self):
        super().__init__()
        self.encoder, self.classifier = (
            nn.Identity(),
            nn.Conv2d(CLASSES, CLASSES, 1, groups=CLASSES),
        )
        nn.init.ones_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)
        self.seen, self.decoded = [], []

    def encode(self, image):
        self.seen.append((image, self.training))
        return (image,)

    def fuse(self, features):
        return features[0]

    def classify(self, fused, size):
        self.decoded.append(fused)
        return self.classifier(fused)

    def forward(self, image):
        return self.classify(self.fuse(self.encode(image)), image.shape[-2:])


class Update:
    """A `minimize` that descends with learning rate `lr` and remembers losses."""

    def __init__(self, lr: float = 0.1, updates: bool = True):
        self.lr, self.updates, self.losses = lr, updates, []

    def __call__(self, loss, *nets):
        self.losses.append(loss.detach())
        parameters = [p for net in nets for p in net.parameters()]
        for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            p.data -= self.lr * g * self.updates
        return self.updates


def batch_of(u: int = 4, size: int = 8) -> Batch:
    """Sharp random logits as images; padding in some of the unlabeled ones."""
    image, weak, one, two = (5 * torch.randn(u, CLASSES, size, size) for _ in range(4))
    valid = torch.ones(u, size, size, dtype=torch.bool)
    valid[0, :, 5:] = False
    valid[1, 3:] = False
    label = torch.randint(0, CLASSES, (u, size, size))
    label[:, 0] = IGNORE
    weak_2, one_2, two_2 = (5 * torch.randn_like(weak) for _ in range(3))
    second = Crop(weak_2, (one_2, two_2), valid.flip(0))
    return Batch(image, label, weak, (one, two), valid, second=second)


@pytest.fixture
def boxes(monkeypatch) -> list[torch.Tensor]:
    """The masks that the next steps draw, in both modules."""
    found, real = [], unimatch.cutmix_small

    def draw(like):
        found.append(real(like, p=1.0))
        return found[-1]

    for module in (unimatch, unimatch_v2):
        monkeypatch.setattr(module, "cutmix_small", draw)
    return found


# Parity


@pytest.mark.parametrize("prefix", ["", "zero_"])
def test_losses_are_those_of_unimatch(golden, prefix):
    """unimatch_losses.npz: all four terms and their sum, threshold 0.95 with CE, 0 with OHEM; 1e-5.

    What is pasted comes from a batch of its own, as in `paste`; ignore masks are mixed as labels.
    """
    g = {
        key.removeprefix(prefix): value
        for key, value in golden("unimatch_losses.npz").items()
        if key.startswith(prefix) and (prefix or not key.startswith("zero_"))
    }
    threshold = float(g["conf_thresh"])

    def targets(logits, ignore):
        label, confidence = pseudo_label(g[logits])
        return torch.where(g[ignore] == 255, IGNORE, label), confidence

    own = targets("pred_u_w", "ignore_mask")
    other = targets("pred_u_w_mix", "ignore_mask_mix")
    found = {}
    for view in "12":
        mix = Mix(g[f"cutmix_box{view}"] == 1, torch.arange(2))
        label, confidence = (paste(mix, b, a) for a, b in zip(own, other, strict=True))
        found[f"loss_u_s{view}"] = weighted_ce(
            g[f"pred_u_s{view}"], label, confidence, threshold, "pixel"
        )
        if view == "1":
            kept = label != IGNORE
            assert torch.equal(~kept, g["ignore_cutmixed1"] == 255)
            assert torch.equal(label[kept], g["mask_cutmixed1"][kept])
            torch.testing.assert_close(confidence, g["conf_cutmixed1"], **LOSS)
    found["loss_u_w_fp"] = weighted_ce(g["pred_u_w_fp"], *own, threshold, "pixel")
    limits = {"threshold": 0.7, "min_kept": 150}
    found["loss_x"] = (
        ohem(g["pred_x"], g["mask_x"], **limits) if prefix else ce(g["pred_x"], g["mask_x"])
    )
    image, feature = (found["loss_u_s1"] + found["loss_u_s2"]) / 2, found["loss_u_w_fp"]
    paper = {
        key: UniMatch.hyper_parameters()[key].default for key in ("image_weight", "feature_weight")
    }
    found["loss"] = (
        found["loss_x"] + paper["image_weight"] * image + paper["feature_weight"] * feature
    ) / 2
    for name, value in found.items():
        torch.testing.assert_close(value, g[name], **LOSS)
    sure = (own[1] >= threshold) & (own[0] != IGNORE)
    torch.testing.assert_close(sure.sum() / (own[0] != IGNORE).sum(), g["mask_ratio"], **LOSS)


# UniMatch's step


@pytest.mark.parametrize("preset", ["paper", "code"])
def test_eq_a_step_is_the_released_loss_block_written_naively(boxes, preset):
    """Pixel by pixel; `code` pastes the same image's second crop, labelled in evaluation mode."""
    method, batch, update = (
        UniMatch(Identity, **UniMatch.presets[preset]).train(),
        batch_of(),
        Update(),
    )
    found = method.step(batch, Clock(0, 1, 1), update)
    u = len(batch.weak)
    assert found["sup"] == ce(batch.image, batch.label)
    probs, pseudo = batch.weak.softmax(1).max(1)
    second, pseudo_2 = batch.second.weak.softmax(1).max(1)
    terms = []
    for k, mix in enumerate(boxes):
        total = count = 0
        image = batch.strong[k].clone()
        for i in range(u):
            for y, x in torch.cartesian_prod(torch.arange(8), torch.arange(8)).tolist():
                valid, confidence, label = batch.valid[i, y, x], probs[i, y, x], pseudo[i, y, x]
                if mix.mask[i, y, x] and preset == "paper":
                    j = (i + 1) % u
                    valid, confidence, label = batch.valid[j, y, x], probs[j, y, x], pseudo[j, y, x]
                    image[i, :, y, x] = batch.strong[k][j, :, y, x]
                elif mix.mask[i, y, x]:
                    valid, confidence = batch.second.valid[i, y, x], second[i, y, x]
                    label = pseudo_2[i, y, x]
                    image[i, :, y, x] = batch.second.strong[k][i, :, y, x]
                count += bool(valid)
                if valid and confidence >= 0.95:
                    total += F.cross_entropy(image[None, i, :, y, x], label[None])
        terms.append(total / count)
    pixels = batch.valid.nonzero()
    fp = method.student.decoded[preset == "code"][-u:]  # what is dropped is tested below
    feature = sum(
        F.cross_entropy(fp[None, i, :, y, x], pseudo[None, i, y, x])
        for i, y, x in pixels
        if probs[i, y, x] >= 0.95
    ) / len(pixels)
    torch.testing.assert_close(found["unsup"], sum(terms) / 2)
    torch.testing.assert_close(found["feature"], feature)
    whole = (found["sup"] + sum(terms) / 4 + feature / 2) / 2
    torch.testing.assert_close(update.losses[0], whole)
    assert 0 < found["kept"] < batch.valid.float().mean()


def test_images_are_encoded_once_and_decoded_as_often_as_there_are_streams(boxes):
    """Passes: labeled and weak together, then both strong views; `code` labels first, in eval."""
    batch = batch_of(2)
    for preset, images, decoded, modes in (
        ("paper", [4, 4], [6, 4], [True, True]),
        ("code", [2, 4, 4], [2, 8, 4], [False, True, True]),
    ):
        method = UniMatch(Identity, **UniMatch.presets[preset]).train()
        method.step(batch, Clock(0, 1, 1), Update())
        net = method.student
        assert [len(image) for image, _ in net.seen] == images
        assert [len(fused) for fused in net.decoded] == decoded
        assert [mode for _, mode in net.seen] == modes
        assert net.training
        joint = net.seen[-2][0]
        assert equal(joint, torch.cat([batch.image, batch.weak]))
        if preset == "code":
            assert equal(net.seen[0][0], batch.second.weak)


def test_half_of_the_channels_are_dropped_and_the_rest_doubled(boxes, monkeypatch):
    method, batch = UniMatch(Identity).train(), batch_of(64)
    method.step(batch, Clock(0, 1, 1), Update())
    ratio = method.student.decoded[0][-64:] / batch.weak
    assert set(ratio.flatten().round(decimals=4).tolist()) == {0.0, 2.0}
    each = ratio.flatten(2)
    assert (each == each[..., :1]).logical_or(each.isclose(each[..., :1])).all()  # whole channels
    assert 0.35 < (each[..., 0] == 0).float().mean() < 0.65
    assert equal(method.student.decoded[0][:128], torch.cat([batch.image, batch.weak]))


def test_no_gradient_flows_through_pseudo_labels(boxes):
    """With no supervised pixel and nothing dropped, weights of zero leave nothing to learn."""
    batch = batch_of()
    batch = batch._replace(label=torch.full_like(batch.label, IGNORE))
    method = UniMatch(Identity, image_weight=0.0, feature_weight=0.0).train()
    before = [p.clone() for p in method.parameters()]
    method.step(batch, Clock(0, 1, 1), Update())
    assert equal(before, [p.detach() for p in method.parameters()])


@pytest.mark.parametrize("views", [1, 3])
def test_the_image_streams_loss_is_a_mean_over_views(boxes, views):
    batch = batch_of()
    batch = batch._replace(strong=(batch.strong[0],) * views)
    found = (
        UniMatch(Identity, views=views, threshold=0.0).train().step(batch, Clock(0, 1, 1), Update())
    )
    label, confidence = pseudo_label(batch.weak)
    label = torch.where(batch.valid, label, IGNORE)
    each = [ce(mix(batch.strong[0]), mix(label), over="valid") for mix in boxes]
    torch.testing.assert_close(found["unsup"], sum(each) / views)
    assert len(boxes) == views and not equal(boxes[0].mask, boxes[-1].mask) == (views > 1)


def test_a_step_without_views_is_refused():
    with pytest.raises(ValueError, match="views=0: choose 1 or more"):
        UniMatch(Identity, views=0)


# Complementary dropout


def test_two_views_of_one_map_add_up_to_twice_it():
    x = torch.randn(5, 16, 4, 4).repeat(2, 1, 1, 1)
    (out,) = complementary_dropout([x])
    torch.testing.assert_close(out[:5] + out[5:], 2 * x[:5])
    factors = (out / x)[..., 0, 0].round(decimals=4)
    torch.testing.assert_close(out, x * factors[..., None, None])  # whole channels
    alone = (factors == 1).all(1)
    assert torch.equal(alone[:5], alone[5:]) and alone[:5].sum() == 2  # half of 5, rounded down
    assert set(factors[~alone].flatten().tolist()) == {0.0, 2.0}


def test_coins_are_fair_and_every_image_is_left_alone_equally_often():
    x = torch.ones(12, 8, 1, 1)
    draws = torch.stack([complementary_dropout([x])[0][:6, :, 0, 0] for _ in range(400)])
    alone = (draws == 1).all(2)
    assert (alone.sum(1) == 3).all()
    assert (alone.float().mean(0) - 0.5).abs().max() < 0.1
    coins = draws[~alone]
    assert abs((coins == 2).float().mean() - 0.5) < 0.03


@pytest.mark.parametrize(("kept", "alone"), [(0.0, 0), (0.3, 1), (1.0, 4)])
def test_the_share_that_is_left_alone(kept, alone):
    (out,) = complementary_dropout([torch.ones(8, 32, 1, 1)], kept)
    assert (out[:4] == 1).flatten(1).all(1).sum() == alone


def test_layers_of_equal_width_share_the_coins():
    """As the four taps of a transformer do; a pyramid's features have coins of their own."""
    wide, narrow = torch.ones(6, 16, 2, 2), torch.ones(6, 8, 4, 4)
    one, other, low = complementary_dropout([wide, 3 * wide, narrow])
    torch.testing.assert_close(3 * one, other)
    assert not torch.equal(one[:, :8, 0, 0], low[..., 0, 0])
    assert torch.equal((one == 1).flatten(1).all(1), (low == 1).flatten(1).all(1))


def test_complementary_dropout_by_recorded_draws(monkeypatch):
    """Three images, the first permutation number 0 is left alone; coins below 0.5 double."""
    u = torch.tensor([[0.1, 0.9], [0.6, 0.4], [0.2, 0.3]])
    monkeypatch.setattr(torch, "randperm", lambda n: torch.tensor([2, 0, 1]))
    monkeypatch.setattr(torch, "rand", lambda *shape: u)
    (out,) = complementary_dropout([torch.ones(6, 2, 1, 1)])
    assert out[..., 0, 0].tolist() == [[2, 0], [1, 1], [2, 2], [0, 2], [1, 1], [0, 0]]


def test_half_precision_stays_half_and_gradients_pass():
    x = torch.ones(4, 8, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    (out,) = complementary_dropout([x], 0.0)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())


@pytest.mark.parametrize(
    ("images", "kept", "message"),
    [
        (3, 0.5, "3 images: complementary dropout needs two views of each"),
        (4, 1.5, "kept=1.5: choose a share from 0 to 1"),
    ],
)
def test_what_cannot_be_dropped_complementarily_is_refused(images, kept, message):
    with pytest.raises(ValueError, match=message):
        complementary_dropout([torch.ones(images, 2, 1, 1)], kept)


# UniMatch V2's step


@pytest.mark.parametrize("preset", ["paper", "code"])
def test_eq_a_step_of_v2_is_a_mean_over_both_views_and_over_both_terms(boxes, preset, monkeypatch):
    method = UniMatchV2(Identity, **UniMatchV2.presets[preset]).train()
    with torch.no_grad():
        method.teacher.classifier.bias[1] = 3.0  # so that it labels otherwise than the student
    masks, real = [], complementary_dropout
    monkeypatch.setattr(
        unimatch_v2,
        "complementary_dropout",
        lambda f, kept: masks.append(real([torch.ones_like(f[0])], kept)[0]) or (f[0] * masks[0],),
    )
    batch, update = batch_of(3), Update(updates=False)
    before = frozen_copy(method.teacher)
    found = method.step(batch, Clock(0, 1, 1), update)
    order = torch.tensor([1, 2, 0] if preset == "paper" else [2, 1, 0])
    probs, label = before(batch.weak).softmax(1).max(1)
    label = torch.where(batch.valid, label, IGNORE)
    each = []
    for k, mix in enumerate(boxes):
        image, target, sure = (
            torch.where(mix.mask[:, None] if x.ndim == 4 else mix.mask, x[order], x)
            for x in (batch.strong[k], label, probs >= 0.95)
        )
        loss = F.cross_entropy(
            image * masks[0].chunk(2)[k], target, ignore_index=IGNORE, reduction="none"
        )
        each.append((loss * sure).sum() / (target != IGNORE).sum())
    torch.testing.assert_close(found["unsup"], sum(each) / 2)
    torch.testing.assert_close(update.losses[0], (found["sup"] + found["unsup"]) / 2)
    assert found["sup"] == ce(batch.image, batch.label)
    assert equal(before.state_dict(), method.teacher.state_dict())  # no update, no average


def test_the_teacher_labels_weak_views_and_the_student_never_sees_them(boxes):
    method, batch = UniMatchV2(Identity).train(), batch_of()
    method.student.decoded.clear()
    method.step(batch, Clock(0, 1, 1), Update())
    assert [mode for _, mode in method.teacher.seen] == [False]
    assert method.teacher.seen[0][0] is batch.weak
    strong = torch.cat([mix(view) for mix, view in zip(boxes, batch.strong, strict=True)])
    assert equal([image for image, _ in method.student.seen], [strong, batch.image])


def test_the_average_covers_buffers_and_starts_as_a_mean(tiny):
    method = build_method(tiny(method="unimatch_v2"), 8)
    g = torch.Generator().manual_seed(0)
    images = [torch.randn(4, 3, 32, 32, generator=g) for _ in range(4)]
    label = torch.randint(0, 8, (4, 32, 32), generator=g)
    batch = Batch(images[0], label, images[1], tuple(images[2:]), torch.ones_like(label) > 0)
    expected = frozen_copy(method.teacher)
    for step, decay in ((0, 0.0), (1, 0.5), (999, 0.996)):
        method.step(batch, Clock(step, 10, 101), Update())
        ema(expected, method.student, decay, "ema")
        assert equal(dict(expected.state_dict()), dict(method.teacher.state_dict()))


def test_without_dropout_features_stay_whole(boxes):
    method, batch = UniMatchV2(Identity, dropout="none").train(), batch_of()
    method.step(batch, Clock(0, 1, 1), Update())
    assert equal(method.student.decoded[0], method.student.seen[0][0])


def test_v2_takes_the_four_layers_of_a_transformer(tiny, boxes):
    """A small vision transformer with DPT: the coins of all four taps are the same."""
    small = {"embed_dim": 24, "depth": 4, "num_heads": 2, "img_size": 28}
    changes = {"encoder_args": small, "taps": [0, 1, 2, 3], "width": 8, "low_width": 4}
    config = tiny(method="unimatch_v2", net="dinov2-small-dpt", net_args=changes)
    method = build_method(config, CLASSES)
    images = [torch.randn(2, 3, 28, 28) for _ in range(4)]
    label = torch.randint(0, CLASSES, (2, 28, 28))
    batch = Batch(images[0], label, images[1], tuple(images[2:]), torch.ones_like(label) > 0)
    found, before = [], frozen_copy(method.student)

    def minimize(loss, net):
        loss.backward()
        found.append([p.grad for p in net.parameters() if p.grad is not None])
        return True

    losses = method.step(batch, Clock(0, 1, 1), minimize)
    assert all(torch.isfinite(v) for v in losses.values()) and found
    assert equal(dict(before.state_dict()), dict(method.teacher.state_dict()))
