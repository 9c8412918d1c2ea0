"""Entropy minimisation, FixMatch, ClassMix, CutMix-MT: by hand, naively, and measured numbers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import GRADIENT, LOSS
from torch import nn

from s4lib.build import build_method
from s4lib.losses import IGNORE, mse, soft_ce
from s4lib.method import Batch, Clock
from s4lib.methods import classmix as classmix_file
from s4lib.methods import cutmix_mt as cutmix_mt_file
from s4lib.methods import fixmatch as fixmatch_file
from s4lib.methods.classmix import ClassMix
from s4lib.methods.cutmix_mt import CutMixMT
from s4lib.methods.entropy_min import EntropyMin
from s4lib.methods.fixmatch import FixMatch
from s4lib.mixing import Mix

LATE = Clock(9, 1, 10)  # after every ramp-up


class Shown(nn.Module):
    """Logits are the image's first channels plus a trainable shift, which starts at zero."""

    def __init__(self, classes: int = 2):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(classes))

    def forward(self, image):
        return image[:, : len(self.shift)] + self.shift[:, None, None]


class Update:
    """A `minimize` that moves nothing and remembers the loss and its gradient."""

    def __call__(self, loss, *nets):
        self.loss = loss.detach()
        (self.grad,) = torch.autograd.grad(loss, [p for net in nets for p in net.parameters()])
        return True


def images(*probs: float, size: int = 4) -> torch.Tensor:
    """One image for each probability of class 0 of two, the same at every pixel."""
    logits = torch.tensor([[math.log(p), math.log(1 - p)] for p in probs])
    return F.pad(logits, (0, 1))[:, :, None, None].expand(-1, -1, size, size).contiguous()


def batch_of(weak, strong=None, valid=None, image=None) -> Batch:
    image = torch.zeros_like(weak) if image is None else image
    valid = torch.ones(len(weak), *weak.shape[-2:], dtype=torch.bool) if valid is None else valid
    label = torch.zeros(len(image), *image.shape[-2:], dtype=torch.int64)
    return Batch(image, label, weak, () if strong is None else (strong,), valid)


def entropy_of(p: float) -> float:
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


# Entropy minimisation


def test_entropy_by_hand_over_valid_pixels():
    weak = images(0.9, 0.5)
    valid = torch.ones(2, 4, 4, dtype=torch.bool)
    valid[1, 2:] = False  # half of the image that is unsure
    method, update = EntropyMin(Shown, weight=0.5), Update()
    losses = method.step(batch_of(weak, valid=valid), LATE, update)
    wanted = (2 * entropy_of(0.9) + entropy_of(0.5)) / 3
    assert float(losses["unsup"]) == pytest.approx(wanted, rel=1e-5)
    assert float(update.loss) == pytest.approx(math.log(2) + 0.5 * wanted, rel=1e-5)


def test_the_gradient_of_entropy_reaches_both_its_factors():
    """d/dz0 of -sum p log p for two classes is -p (1 - p) ln(p / (1 - p)), and makes p surer."""
    p, method, update = 0.8, EntropyMin(Shown), Update()
    image = images(1 - 1e-7)  # known already: no supervised gradient
    method.step(batch_of(images(p), image=image), LATE, update)
    wanted = -p * (1 - p) * math.log(p / (1 - p))
    assert update.grad.tolist() == pytest.approx([wanted, -wanted], rel=1e-4)


def test_relative_entropy_is_a_share_of_its_maximum():
    weak = torch.zeros(1, 3, 2, 2)
    unsup = {
        relative: float(
            EntropyMin(lambda: Shown(3), relative=relative).step(batch_of(weak), LATE, Update())[
                "unsup"
            ]
        )
        for relative in (False, True)
    }
    assert unsup[False] == pytest.approx(math.log(3)) and unsup[True] == pytest.approx(1)


def test_the_weight_of_entropy_rises():
    weights = []
    for step in (0, 5, 20, 50):
        update = Update()
        losses = EntropyMin(Shown).step(batch_of(images(0.7)), Clock(step, 10, 10), update)
        weights.append(float((update.loss - losses["sup"]) / losses["unsup"]))
    assert weights[0] == pytest.approx(math.exp(-5), rel=1e-3)
    assert weights == sorted(weights) and weights[2:] == pytest.approx([1, 1], rel=1e-3)


# FixMatch


def test_fixmatch_by_hand():
    """Sure of class 0, unsure of it, sure of class 1: two of three pixels give a loss, over all."""
    weak, strong = images(0.96, 0.94, 0.03), images(0.6, 0.6, 0.6)
    method, update = FixMatch(Shown, weight=2.0), Update()
    losses = method.step(batch_of(weak, strong), LATE, update)
    wanted = (-math.log(0.6) - math.log(0.4)) / 3
    assert float(losses["unsup"]) == pytest.approx(wanted, rel=1e-5)
    assert float(losses["kept"]) == pytest.approx(2 / 3)
    assert float(update.loss) == pytest.approx(math.log(2) + 2 * wanted, rel=1e-5)


def test_fixmatch_has_no_gradient_through_its_labels():
    """Only the strong view of one sure image: d/dz0 of -log p is p - 1."""
    image = images(1 - 1e-7)
    update = Update()
    FixMatch(Shown).step(batch_of(images(0.99), images(0.6), image=image), LATE, update)
    assert update.grad.tolist() == pytest.approx([0.6 - 1, 1 - 0.6], rel=1e-4)


def test_padding_leaves_fixmatchs_mean():
    weak, strong = images(0.99, 0.99), images(0.6, 0.2)
    valid = torch.ones(2, 4, 4, dtype=torch.bool)
    valid[1, :, :2] = False
    losses = FixMatch(Shown).step(batch_of(weak, strong, valid), LATE, Update())
    wanted = (-2 * math.log(0.6) - math.log(0.2)) / 3
    assert float(losses["unsup"]) == pytest.approx(wanted, rel=1e-5)
    assert float(losses["kept"]) == 0.75


def test_fixmatch_as_released_written_naively(tiny, monkeypatch):
    """UniMatch@0324f3dd, fixmatch.py: modes, passes, pasted labels, denominator, half the loss."""
    arguments = {"threshold": 0.2}  # between: some pixels of an untrained network pass
    config = tiny(method="fixmatch", preset="code", method_args=arguments)
    ours, theirs = build_method(config, 8).train(), build_method(config, 8).train()
    g = torch.Generator().manual_seed(0)
    image, weak, strong = torch.randn(3, 4, 3, 32, 32, generator=g)
    label = torch.randint(0, 8, (4, 32, 32), generator=g)
    valid = torch.rand(4, 32, 32, generator=g) < 0.9
    mask = torch.zeros(4, 32, 32, dtype=torch.bool)
    mask[:2, 5:20, 8:30] = True
    partner = torch.tensor([1, 2, 3, 0])
    monkeypatch.setattr(fixmatch_file, "cutmix_small", lambda like, p: Mix(mask, partner))

    net = theirs.student
    with torch.no_grad():
        conf_b, label_b = net.eval()(weak[partner]).softmax(1).max(1)
    net.train()
    mixed = strong.clone()
    for i in range(4):
        mixed[i][:, mask[i]] = strong[partner[i]][:, mask[i]]
    pred_x, pred_w = net(torch.cat([image, weak])).chunk(2)
    pred_s = net(mixed)
    conf, target = pred_w.detach().softmax(1).max(1)
    inside = valid.clone()
    conf[mask], target[mask], inside[mask] = conf_b[mask], label_b[mask], valid[partner][mask]
    each = F.cross_entropy(pred_s, target, reduction="none")
    keep = (conf >= 0.2) & inside
    assert 0.02 < keep.float().mean() < 0.9
    loss = (F.cross_entropy(pred_x, label) + (each * keep).sum() / inside.sum()) / 2
    wanted = torch.autograd.grad(loss, list(net.parameters()))

    found = []

    def minimize(total, student):
        found.append((total.detach(), torch.autograd.grad(total, list(student.parameters()))))
        return True

    losses = ours.step(Batch(image, label, weak, (strong,), valid), LATE, minimize)
    torch.testing.assert_close(found[0][0], loss.detach())
    torch.testing.assert_close(found[0][1], wanted, rtol=1e-3, atol=1e-6)
    assert float(losses["kept"]) == pytest.approx(float(keep.float().mean()))
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value)  # BN statistics too


def test_fixmatchs_paper_shows_everything_in_one_pass():
    passes = []
    method = FixMatch(Shown)
    method.student.register_forward_hook(lambda net, x, out: passes.append(len(x[0])))
    method.step(batch_of(images(0.9, 0.9), images(0.6, 0.6)), LATE, Update())
    assert passes == [6]


# ClassMix


@pytest.mark.parametrize("unsure", ["batch", "pixel", "none"])
def test_a_step_of_classmix_has_the_losses_of_its_authors(golden, monkeypatch, unsure):
    """classmix_mask.npz: chosen classes, images, mixed softmax and losses through `step`; 1e-5."""
    g = golden("classmix_mask.npz")
    keep = g["mask"].bool()
    partner = torch.arange(len(keep)).roll(-1)
    monkeypatch.setattr(classmix_file, "classmix", lambda label: Mix(~keep, partner))
    logits_t, seen = g["softmax_weak"].log(), []

    class Recorded(nn.Module):
        def __init__(self):
            super().__init__()
            self.zero = nn.Parameter(torch.zeros(()))

        def forward(self, image):
            if not self.zero.requires_grad:
                return logits_t
            seen.append(image)
            return g["student_logits"] + self.zero

    arguments = {"unsure": unsure, "threshold": float(g["threshold"]), "view": "weak"}
    method = ClassMix(Recorded, **arguments).train()
    losses = method.step(batch_of(g["img"]), LATE, Update())
    assert torch.equal(seen[1], g["mixed_img"])
    plain = F.cross_entropy(g["student_logits"], g["pseudo_label"].long())
    wanted = {
        "batch": g["loss_u_threshold_uniform"],
        "pixel": g["loss_u_threshold"],
        "none": plain,
    }[unsure]
    torch.testing.assert_close(losses["unsup"], wanted, **LOSS)
    torch.testing.assert_close(losses["kept"], g["uniform_weight"], **LOSS)
    assert 0 < g["uniform_weight"] < 1


def test_padding_is_no_class_to_paste(monkeypatch):
    """Of an image whose padding looks like another class, the one class it has cannot be halved."""
    weak = images(0.99, 0.01)
    weak[0, :, 2:] = images(0.01)[0, :, 2:]
    valid = torch.ones(2, 4, 4, dtype=torch.bool)
    valid[0, 2:] = False
    seen = []
    real = classmix_file.classmix
    monkeypatch.setattr(
        classmix_file, "classmix", lambda label: seen.append(label.clone()) or real(label)
    )
    ClassMix(Shown, view="weak").step(batch_of(weak, valid=valid), LATE, Update())
    assert (seen[0][0, 2:] == IGNORE).all() and (seen[0][0, :2] == 0).all()


def test_classmix_averages_parameters_alone(tiny):
    """The teacher, in training mode, has BN statistics of its own; the decay is 0 at first."""
    method = build_method(tiny(method="classmix"), 8).train()
    assert method.teacher.training and not any(p.requires_grad for p in method.teacher.parameters())
    g = torch.Generator().manual_seed(0)
    image, weak, strong = torch.randn(3, 4, 3, 32, 32, generator=g)

    def minimize(loss, student):
        for p in student.parameters():
            p.data.add_(1)
        return True

    for step, decay in ((0, 0.0), (1, 0.5), (1000, 0.99)):
        before = {k: v.clone() for k, v in method.teacher.named_parameters()}
        method.step(batch_of(weak, strong, image=image), Clock(step, 2000, 1), minimize)
        student = dict(method.student.named_parameters())
        for k, v in method.teacher.named_parameters():
            wanted = decay * before[k] + (1 - decay) * student[k]
            torch.testing.assert_close(v, wanted.detach(), rtol=1e-5, atol=1e-5)
    means = [
        {k: v for k, v in net.named_buffers() if k.endswith("running_mean")}
        for net in (method.student, method.teacher)
    ]
    assert all(not torch.equal(means[0][k], means[1][k]) for k in means[0])


def test_an_update_that_is_not_due_moves_no_teacher(tiny):
    method = build_method(tiny(method="classmix"), 8).train()
    before = {k: v.clone() for k, v in method.teacher.named_parameters()}
    g = torch.Generator().manual_seed(0)
    image, weak, strong = torch.randn(3, 4, 3, 32, 32, generator=g)
    for p in method.student.parameters():
        p.data.add_(1)
    method.step(batch_of(weak, strong, image=image), LATE, lambda loss, net: False)
    assert all(torch.equal(before[k], v) for k, v in method.teacher.named_parameters())


# CutMix-MT


@pytest.mark.parametrize("preset", ["paper", "mt"])
def test_cutmix_mt_written_naively(tiny, monkeypatch, preset):
    """U2PL@ab3d2be, train_semi, with nothing dropped: three steps, BN statistics too."""
    config = tiny(method="cutmix_mt", preset=preset)
    ours, theirs = build_method(config, 8).train(), build_method(config, 8).train()
    mask = torch.zeros(4, 32, 32, dtype=torch.bool)
    mask[:, 3:19, 0:32] = preset == "paper"
    partner = torch.tensor([1, 2, 3, 0])
    coins = []
    monkeypatch.setattr(
        cutmix_mt_file, "cutmix_half", lambda like, p: coins.append(p) or Mix(mask, partner)
    )
    student, teacher = theirs.student, theirs.teacher
    g = torch.Generator().manual_seed(9)
    for name, p in student.named_parameters():  # else it says the same class everywhere
        values = torch.randn(p.shape, generator=g) * (0.3 if p.ndim > 1 else 0.5)
        for net in (student, teacher, ours.student, ours.teacher):
            net.get_parameter(name).data.copy_(values)
    differ = []
    for step in range(3):
        g = torch.Generator().manual_seed(step)
        image, weak = torch.randn(2, 4, 3, 32, 32, generator=g)
        label = torch.randint(0, 8, (4, 32, 32), generator=g)
        with torch.no_grad():
            target = teacher.eval()(weak).argmax(1)
        mixed, pasted = weak.clone(), target.clone()
        for i in range(4):
            mixed[i][:, mask[i]] = weak[partner[i]][:, mask[i]]
            pasted[i][mask[i]] = target[partner[i]][mask[i]]
        differ.append((pasted != target).float().mean())
        both = torch.cat([image, mixed])
        logits = student(both)
        with torch.no_grad():
            teacher.train()(both)
        sup, unsup = F.cross_entropy(logits[:4], label), F.cross_entropy(logits[4:], pasted)
        grads = torch.autograd.grad(sup + unsup, list(student.parameters()))
        decay = min(1 - 1 / (step + 1), 0.99)
        with torch.no_grad():
            for p, grad in zip(student.parameters(), grads, strict=True):
                p -= 0.01 * grad
            for t, p in zip(teacher.parameters(), student.parameters(), strict=True):
                t.copy_(decay * t + (1 - decay) * p)

        def minimize(loss, net):
            ours_grads = torch.autograd.grad(loss, list(net.parameters()))
            for p, grad in zip(net.parameters(), ours_grads, strict=True):
                p.data -= 0.01 * grad
            return True

        losses = ours.step(
            batch_of(weak, image=image)._replace(label=label), Clock(step, 9, 1), minimize
        )
        torch.testing.assert_close(losses["sup"], sup.detach())
        torch.testing.assert_close(losses["unsup"], unsup.detach())
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-4, atol=1e-5)
    assert coins == [{"paper": 0.5, "mt": 0.0}[preset]] * 3
    assert (min(differ) > 0.01) == (preset == "paper")


def test_every_valid_pixel_teaches_in_cutmix_mt_however_unsure():
    weak = images(0.51, 0.4, 0.99)
    valid = torch.ones(3, 4, 4, dtype=torch.bool)
    valid[2] = False
    losses = CutMixMT(Shown, cutmix=0.0).step(batch_of(weak, valid=valid), LATE, Update())
    wanted = (-math.log(0.51) - math.log(0.6)) / 2
    assert float(losses["unsup"]) == pytest.approx(wanted, rel=1e-5)


# French et al.


def test_the_per_pixel_variant_of_french_et_al(golden):
    """cutmixseg_mt_loss.npz, var_perpixel_conf and kld_perpixel: sure pixels alone; 1e-5."""
    g = golden("cutmixseg_mt_loss.npz")
    logits, probs = g["student_logits"].requires_grad_(), g["teacher_logits"].softmax(1)
    keep = (g["valid_mask"][:, 0] > 0) & (probs.amax(1) >= g["conf_thresh"])
    share = keep.float().mean()
    squared = mse(logits, probs, valid=keep, classes="sum") * share
    torch.testing.assert_close(squared.detach(), g["var_perpixel_conf_loss"], **LOSS)
    squared.backward()
    gradient = g["var_perpixel_conf_grad"]
    torch.testing.assert_close(logits.grad, gradient, **GRADIENT)
    entropy = soft_ce(g["teacher_logits"], probs, keep=keep)
    divergence = (soft_ce(logits.detach(), probs, keep=keep) - entropy) * share
    torch.testing.assert_close(divergence, g["kld_perpixel_loss"], rtol=1e-4, atol=1e-6)
