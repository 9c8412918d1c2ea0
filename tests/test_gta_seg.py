"""GTA-Seg: its equations by hand, the released code's numbers, both algorithms written naively."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GRADIENT, LOSS, equal
from torch import nn

from s4lib.build import build_method
from s4lib.losses import IGNORE, ce, confidence_weight, ignore_unsure, pseudo_label
from s4lib.method import Batch, Clock
from s4lib.methods.gta_seg import GTASeg
from s4lib.minimizer import Minimizer

CPU = torch.device("cpu")
CODE = GTASeg.presets["code"]
SEMI = Clock(1, 1, 4)  # a step after the warm-up


class Shift(nn.Module):
    def __init__(self):
        super().__init__()
        self.by = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        return x + self.by[:, None, None]


class Shifts(nn.Module):
    """Logits of two classes = image of two channels + three shifts, so all can be had by hand."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder, self.classifier = Shift(), Shift(), Shift()

    def forward(self, image):
        return self.classifier(self.decoder(self.encoder(image)))

    def shifts(self):
        return [self.encoder.by.tolist(), self.decoder.by.tolist(), self.classifier.by.tolist()]


class Descent:
    """Gradient descent with learning rate 1; remembers what it was asked to minimise."""

    def __init__(self):
        self.losses = []

    def __call__(self, loss, *nets):
        self.losses.append(loss.item())
        parameters = [p for net in nets for p in net.parameters()]
        for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            p.data.sub_(gradient)
        return True


def logits(*probs: float) -> torch.Tensor:
    """An image (1, 2, 1, len(probs)) for which an unshifted net gives class 1 these `probs`."""
    p = torch.tensor(probs)
    return torch.stack([(1 - p).log(), p.log()])[None, :, None]


def one_step(image, label, weak, clock=SEMI, **settings):
    """(method, what was minimised, what was logged) after a step from nets that do not shift."""
    method, minimize = GTASeg(Shifts, **settings), Descent()
    valid = torch.ones(len(weak), *weak.shape[2:], dtype=torch.bool)
    found = method.step(Batch(image, torch.tensor([[label]]), weak, (), valid), clock, minimize)
    return method, minimize.losses, found


# One labeled pixel of class 0 that the nets give 1/2; two unlabeled of class 1, at 0.75 and 0.9.
CASE = (logits(0.5, 0.5), [0, IGNORE], logits(0.75, 0.9))


def test_eq_1_label_and_confidence_are_the_teachers_argmax_and_max():
    method = GTASeg(Shifts)
    weak = logits(0.75, 0.1)
    valid = torch.ones(1, 1, 2, dtype=torch.bool)
    image, label, confidence = method.pseudo_labels(Batch(weak, None, weak, (), valid))
    assert torch.equal(image, weak) and label.tolist() == [[[1, 0]]]
    torch.testing.assert_close(confidence, torch.tensor([[[0.75, 0.9]]]))


def test_eq_2_the_least_confident_fifth_is_ignored_and_so_are_ties():
    confidence = torch.tensor([0.6, 0.5, 0.2, 0.4, 0.2, 0.7]).view(1, 2, 3)
    label = torch.tensor([0, 1, 2, 3, 4, 5]).view(1, 2, 3)
    label, kept = ignore_unsure(label, confidence, 0.2)  # the second smallest of six is 0.2
    assert label.flatten().tolist() == [0, 1, IGNORE, 3, IGNORE, 5]
    torch.testing.assert_close(kept.flatten(), torch.tensor([0.6, 0.5, 0, 0.4, 0, 0.7]))


def test_eq_2_the_threshold_lies_between_two_pixels_and_looks_at_no_void():
    confidence = torch.tensor([[[0.1, 0.2, 0.4, 0.8, 0.9]]])
    label = torch.tensor([[[IGNORE, 0, 0, 0, 0]]])
    found = [ignore_unsure(label, confidence, drop)[0].tolist() for drop in (0.3, 0.35, 0.0, 1.0)]
    i = IGNORE  # thresholds 0.38, 0.42, 0.2, 0.9 over the last four
    assert found == [[[[i, i, 0, 0, 0]]], [[[i, i, i, 0, 0]]], [[[i, i, 0, 0, 0]]], [[[i] * 5]]]


def test_eq_2_all_void_keeps_nothing_and_weighs_nothing():
    label = torch.full((1, 2, 2), IGNORE)
    found, confidence = ignore_unsure(label, torch.rand(1, 2, 2), 0.2)
    assert torch.equal(found, label)
    for normaliser in ("kept", "all", "inv_kept"):
        assert torch.isfinite(confidence_weight(found, confidence, "confidence", normaliser)).all()


def test_eq_3_without_assistant_the_student_minimises_the_sum_of_both_losses():
    method, losses, found = one_step(
        *CASE, assistant_data="none", student_data="both", reweight="none"
    )
    sup, unsup = math.log(2), -math.log(0.9)  # 0.75 is the less confident half
    assert losses == pytest.approx([sup + unsup], rel=1e-5)
    assert [found[k].item() for k in ("sup", "unsup", "kept")] == pytest.approx([sup, unsup, 0.5])
    assert list(method.networks()) == ["student", "teacher"]


def test_eq_4_without_assistant_the_student_steps_down_both_gradients():
    method, _, _ = one_step(*CASE, assistant_data="none", student_data="both")
    moved = [0.5 - 0.1, 0.1 - 0.5]  # of sup (0.5, -0.5), of unsup (-0.1, 0.1)
    torch.testing.assert_close(method.student.shifts(), [moved] * 3)


def test_eq_5_without_assistant_the_teacher_averages_the_student():
    method, _, _ = one_step(*CASE, assistant_data="none", student_data="both", teacher_decay=0.75)
    torch.testing.assert_close(method.teacher.shifts(), [[0.1, -0.1]] * 3)


CONFIDENCE, KEPT = torch.tensor([[[0.0, 0.6, 0.8]]]), torch.tensor([[[IGNORE, 0, 1]]])


@pytest.mark.parametrize(
    ("reweight", "normaliser", "wanted"),
    [
        ("laplace", "kept", [1.6 * 2 / 3.4, 1.8 * 2 / 3.4]),
        ("confidence", "kept", [0.6 * 2 / 1.4, 0.8 * 2 / 1.4]),
        ("none", "kept", [1, 1]),
        ("laplace", "all", [1.6 * 2 / 4.4, 1.8 * 2 / 4.4]),  # the dropped pixel adds tau = 1
        ("none", "inv_kept", [1.5, 1.5]),  # two of three pixels are kept
    ],
)
def test_eq_6_weights_follow_confidence_and_are_one_on_average(reweight, normaliser, wanted):
    weight = confidence_weight(KEPT, CONFIDENCE, reweight, normaliser)[0, 0, 1:]
    torch.testing.assert_close(weight, torch.tensor(wanted, dtype=torch.float))


def test_eq_7_the_assistants_loss_is_the_weighted_mean_over_kept_pixels():
    weak = logits(0.75, 0.8, 0.9)
    _, losses, found = one_step(*CASE[:2], weak)  # 0.75 goes, 1.8 and 1.9 are the weights
    wanted = -(1.8 * math.log(0.8) + 1.9 * math.log(0.9)) / 3.7
    assert losses[0] == pytest.approx(wanted, rel=1e-5)
    assert found["unsup"].item() == losses[0]
    assert found["kept"].item() == pytest.approx(2 / 3)


def test_eq_8_the_whole_assistant_steps_down_the_gradient_of_its_loss():
    method, _, _ = one_step(*CASE)
    torch.testing.assert_close(method.assistant.shifts(), [[-0.1, 0.1]] * 3)


@pytest.mark.parametrize(("scope", "parts"), [("features", 2), ("backbone", 1), ("all", 3)])
def test_eq_9_the_student_averages_the_assistants_features_alone(scope, parts):
    blank = [IGNORE, IGNORE]  # with no label the student itself stands still
    method, _, _ = one_step(CASE[0], blank, CASE[2], student_decay=0.75, ema_scope=scope)
    wanted = [[-0.025, 0.025]] * parts + [[0.0, 0.0]] * (3 - parts)
    torch.testing.assert_close(method.student.shifts(), wanted)


def test_eq_10_the_students_loss_is_the_mean_over_true_labels_after_eq_9():
    image = logits(0.5, 0.5, 0.5)
    label = [0, 1, IGNORE]
    _, losses, found = one_step(image, label, CASE[2], student_decay=0.75)
    gap = 2 * (0.025 + 0.025)  # what eq. 9 has put between the student's logits
    wanted = (math.log1p(math.exp(gap)) + math.log1p(math.exp(-gap))) / 2
    assert losses[1] == pytest.approx(wanted, rel=1e-5)
    assert found["sup"].item() == losses[1]


def test_eq_11_the_whole_student_steps_down_the_gradient_of_its_loss():
    method, _, _ = one_step(*CASE, student_decay=1.0)
    torch.testing.assert_close(method.student.shifts(), [[0.5, -0.5]] * 3)


def test_eq_12_the_teacher_averages_the_whole_student_after_eq_11():
    method, _, _ = one_step(*CASE, student_decay=1.0, teacher_decay=0.9)
    torch.testing.assert_close(method.teacher.shifts(), [[0.05, -0.05]] * 3)
    assert method.deployed == "teacher"


# Numbers of the released code.


@pytest.fixture
def golden(shared):
    def load(name: str) -> dict[str, np.ndarray]:
        with np.load(shared("reference", "golden", name)) as arrays:
            return dict(arrays)

    return load


@pytest.mark.parametrize("which", ["noign", "ign"])
@pytest.mark.parametrize("percent", [80, 100, 50])
def test_the_loss_is_that_of_the_released_code(golden, which, percent):
    """gta_unsup_loss.npz: thresholds, labels, all weightings; losses 1e-5, gradient 1e-4."""
    g = {k: torch.from_numpy(np.asarray(v)) for k, v in golden("gta_unsup_loss.npz").items()}
    predict = g[f"{which}_predict"].requires_grad_()
    _, before = pseudo_label(g[f"{which}_teacher"])
    label, confidence = ignore_unsure(g[f"{which}_target"], before, 1 - percent / 100)
    wanted = {k.split(f"p{percent}_")[1]: v for k, v in g.items() if f"{which}_p{percent}_" in k}
    assert torch.equal(label, wanted["target_after"])
    dropped = (g[f"{which}_target"] != IGNORE) & (label == IGNORE)
    assert before[dropped].max() <= wanted["thresh"] < before[label != IGNORE].min()

    def loss(reweight, normaliser):
        return ce(predict, label, weight=confidence_weight(label, confidence, reweight, normaliser))

    for name, how in {
        "loss": ("laplace", "all"),
        "noreweight_loss": ("none", "inv_kept"),
        "eq67_mean_tau0": ("confidence", "kept"),
        "eq67_mean_tau1": ("laplace", "kept"),
    }.items():
        torch.testing.assert_close(loss(*how).detach(), wanted[name], **LOSS)
    if percent == 80:
        loss("laplace", "all").backward()
        torch.testing.assert_close(predict.grad, wanted["grad"], **GRADIENT)


class Parts(nn.Module):
    """A net with given parameters, whose logits do not depend on them."""

    def __init__(self, names, values):
        super().__init__()
        self.encoder, self.decoder, self.classifier = (nn.ParameterList() for _ in range(3))
        for name, value in zip(names, values, strict=True):
            features = self.encoder if "encoder" in name else self.decoder  # and what else there is
            (self.classifier if "classifier" in name else features).append(value.clone())

    def forward(self, image):
        return image


def test_the_students_ema_is_that_of_the_released_code(golden):
    """gta_ema_encoder.npz: all but the classifier, seven step counts since warm-up; 1e-6."""
    g = golden("gta_ema_encoder.npz")
    names = list(g["names"])
    before, source, *after = (
        Parts(names, torch.from_numpy(values).split(g["sizes"].tolist()))
        for values in (g["before"], g["source"], *g["after"])
    )
    assert len(before.classifier) > 0
    own = {**CODE, "tie_classifier": False, "released_passes": False, "cutmix": 0.0}
    for k, wanted in zip(g["ks"].tolist(), after, strict=True):
        method = GTASeg(lambda: copy.deepcopy(before), **own)
        method.assistant.load_state_dict(source.state_dict())
        image = torch.zeros(1, 2, 2, 2)
        batch = Batch(image, image[:, 0].long(), image, (), image[:, 0] == 0)
        method.step(batch, Clock(3 + k, 3, 10_000), lambda loss, *nets: True)  # warm-up: 3 steps
        pairs = zip(method.student.parameters(), wanted.parameters(), strict=True)
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs, **LOSS)


# Both algorithms, naively: no BN, no CutMix, three networks of three layers, in float64.

EPOCHS, EACH = 4, 3  # steps 0 to 2 warm up, 3 to 5 are the first semi-supervised epoch
LR, WEIGHT_DECAY = 0.1, 0.01


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder, self.classifier = (
            nn.Conv2d(*sizes, 3, padding=1, dtype=torch.double)
            for sizes in ((3, 5), (5, 5), (5, 4))
        )

    def forward(self, image):
        return self.classifier(self.decoder(self.encoder(image).tanh()).tanh())


def trajectory_batch(step: int) -> Batch:
    g = torch.Generator().manual_seed(step)
    image, weak = (torch.randn(2, 3, 8, 8, generator=g, dtype=torch.double) for _ in range(2))
    label = torch.randint(0, 4, (2, 8, 8), generator=g)
    label[0, :2] = IGNORE
    return Batch(image, label, weak, (), torch.ones(2, 8, 8, dtype=torch.bool))


def ours(tiny, settings, change=lambda batch: batch):
    """States of the three networks after each step of the class, driven by the real minimizer."""
    torch.manual_seed(0)
    method = GTASeg(Tiny, **settings).train()
    config = tiny(optimizer="sgd", lr=LR, weight_decay=WEIGHT_DECAY)
    minimizer = Minimizer(method, config, CPU)
    for step in range(EPOCHS * EACH):
        clock = Clock(step, EACH, EPOCHS)
        minimizer.begin(clock)
        method.step(change(trajectory_batch(step)), clock, minimizer)
        pointers = [p.untyped_storage().data_ptr() for p in method.parameters()]
        assert len(set(pointers)) == len(pointers) == 18  # whatever is tied, nothing is shared
        yield snapshot(method.student, method.assistant, method.teacher)


def snapshot(*nets):
    return [[p.detach().clone() for p in net.parameters()] for net in nets]


def furthest(a, b) -> float:
    """Largest difference of two snapshots."""
    flat = [torch.cat([p.flatten() for net in x for p in net]) for x in (a, b)]
    return (flat[0] - flat[1]).abs().max().item()


def sgd(net):
    return torch.optim.SGD(net.parameters(), lr=LR, momentum=0.9, weight_decay=WEIGHT_DECAY)


def update(optimizer, loss, step=None):
    """One step of an optimizer, on the poly schedule if it is told the time."""
    if step is not None:
        optimizer.param_groups[0]["lr"] = LR * (1 - step / (EPOCHS * EACH)) ** 0.9
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def released(student_cap, teacher_cap):
    """Section 5.3 of the specification: the released code, with storage that really is shared."""
    torch.manual_seed(0)
    student = Tiny()
    assistant, teacher = copy.deepcopy(student), copy.deepcopy(student)
    optimizer, optimizer_a = sgd(student), sgd(assistant)
    for step in range(EPOCHS * EACH):
        image, label, weak, *_ = trajectory_batch(step)
        epoch, k = step // EACH, step - EACH
        if epoch == 0:
            update(optimizer, F.cross_entropy(student(image), label, ignore_index=255), step)
            yield snapshot(student, assistant, teacher)
            continue
        if epoch == 1:
            for net in (teacher, assistant):
                for p, s in zip(net.parameters(), student.parameters(), strict=True):
                    p.data = s.data
        with torch.no_grad():
            confidence, pseudo = teacher(weak).softmax(1).max(1)
        threshold = np.percentile(confidence.numpy().ravel(), 20)
        kept = confidence > threshold
        weight = torch.where(kept, confidence, 0) + 1
        loss = F.cross_entropy(assistant(weak), pseudo, reduction="none")
        update(optimizer_a, (weight * kept * loss).sum() / weight.sum())
        decay = min(1 - 1 / (k + 1), student_cap)
        pairs = zip(student.named_parameters(), assistant.parameters(), strict=True)
        for (name, s), a in pairs:
            if not name.startswith("classifier"):
                s.data = decay * s.data + (1 - decay) * a.data
        update(optimizer, F.cross_entropy(student(image), label, ignore_index=255), step)
        decay = min(1 - 1 / (k + 1), teacher_cap)
        for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
            t.data = decay * t.data + (1 - decay) * s.data
        assert student.classifier.weight.data_ptr() == assistant.classifier.weight.data_ptr()
        yield snapshot(student, assistant, teacher)


def papers(student_decay, teacher_decay, padding):
    """Section 5.2 of the specification: the paper. `padding` rows are no part of any image."""
    torch.manual_seed(0)
    student = Tiny()
    optimizer = sgd(student)
    for step in range(EPOCHS * EACH):
        image, label, weak, *_ = trajectory_batch(step)
        if step < EACH:
            update(optimizer, F.cross_entropy(student(image), label, ignore_index=255), step)
            yield snapshot(student, student, student)
            continue
        if step == EACH:
            assistant, teacher = copy.deepcopy(student), copy.deepcopy(student)
            optimizer_a = sgd(assistant)
        with torch.no_grad():
            confidence, pseudo = teacher(weak)[:, :, padding:].softmax(1).max(1)
        kept = confidence > np.percentile(confidence.numpy().ravel(), 20)
        weight = (confidence + 1) * kept / ((confidence + 1) * kept).sum() * kept.sum()
        loss = F.cross_entropy(assistant(weak)[:, :, padding:], pseudo, reduction="none")
        update(optimizer_a, (weight * loss).sum() / kept.sum(), step)
        with torch.no_grad():
            for part in ("encoder", "decoder"):
                for name in ("weight", "bias"):
                    s, a = (getattr(getattr(n, part), name) for n in (student, assistant))
                    s.copy_(student_decay * s + (1 - student_decay) * a)
        update(optimizer, F.cross_entropy(student(image), label, ignore_index=255), step)
        with torch.no_grad():
            for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
                t.copy_(teacher_decay * t + (1 - teacher_decay) * s)
        yield snapshot(student, assistant, teacher)


@pytest.mark.parametrize("caps", [(0.999, 0.999), (0.6, 0.75)])
def test_the_code_preset_is_the_released_code_with_its_shared_storage(tiny, caps):
    settings = {**CODE, "cutmix": 0.0, "student_decay": caps[0], "teacher_decay": caps[1]}
    reference = list(released(*caps))
    found = list(ours(tiny, settings))
    for step, (theirs, mine) in enumerate(zip(reference, found, strict=True)):
        if step < EACH:  # what the others are before they are overwritten does not matter
            theirs, mine = theirs[:1], mine[:1]
        assert furthest(theirs, mine) < 1e-6, step
    student, assistant, _ = found[-1]
    assert equal(student[4:], assistant[4:]) and not equal(student[:2], assistant[:2])
    untied = list(ours(tiny, {**settings, "tie_classifier": False}))[-1]
    assert furthest(reference[-1], untied) > 1e-3  # it is the tie that the reference checks


@pytest.mark.parametrize("decays", [(0.99, 0.99), (0.6, 0.75)])
@pytest.mark.parametrize("padding", [0, 3])
def test_the_paper_preset_is_the_papers_algorithm(tiny, decays, padding):
    def pad(batch):
        return batch._replace(valid=batch.valid & (torch.arange(8)[:, None] >= padding))

    settings = {"student_decay": decays[0], "teacher_decay": decays[1]}
    reference = list(papers(*decays, padding))
    for step, (theirs, mine) in enumerate(zip(reference, ours(tiny, settings, pad), strict=True)):
        assert furthest(theirs, mine) < 1e-6, step
    swapped = {"student_decay": 0.5, "teacher_decay": decays[1]}
    assert furthest(reference[-1], list(ours(tiny, swapped, pad))[-1]) > 1e-4


def test_value_copies_instead_of_shared_storage_start_the_epoch_after_warm_up_anew(tiny):
    """The code without its tie: the others equal the student at each start of a step, no longer."""
    settings = {**CODE, "cutmix": 0.0, "tie_classifier": False}
    method, minimize = GTASeg(Tiny, **settings).train(), Descent()
    seen = []
    method.assistant.register_forward_pre_hook(
        lambda *_: seen.append(snapshot(method.student, method.assistant, method.teacher))
    )
    for step in range(9):
        method.step(trajectory_batch(step), Clock(step, 3, 3), minimize)
    same = [equal(s, a) and equal(s, t) for s, a, t in seen]
    assert same == [False] * 3 + [True] * 3 + [False] * 3


# Passes, phases, switches.


def world(tiny, **settings):
    """(method, minimizer) on the tiny net with BN, as the trainer builds them."""
    config = tiny(method="gta_seg", optimizer="sgd", lr=LR, **settings)
    method = build_method(config, 4)
    return method, Minimizer(method, config, CPU)


def images(step: int, labeled: int = 2, unlabeled: int = 3) -> Batch:
    g = torch.Generator().manual_seed(step)
    image, weak = (torch.randn(n, 3, 32, 32, generator=g) for n in (labeled, unlabeled))
    label = torch.randint(0, 4, (labeled, 32, 32), generator=g)
    return Batch(image, label, weak, (), torch.ones(unlabeled, 32, 32, dtype=torch.bool))


def advance(method, minimizer, step):
    torch.manual_seed(step)
    clock = Clock(step, 2, 3)
    minimizer.begin(clock)
    return method.step(images(step), clock, minimizer)


# network, images, train mode (BN of the batch), gradient
PASSES = {
    ("paper", "warm-up"): [("student", 2, True, True)],
    ("paper", "semi"): [
        ("teacher", 3, False, False),
        ("assistant", 3, True, True),
        ("student", 2, True, True),
    ],
    ("code", "warm-up"): [
        ("student", 2, True, True),
        ("assistant", 2, True, False),
        ("teacher", 2, True, False),
    ],
    ("code", "semi"): [
        ("teacher", 3, False, False),
        ("teacher", 5, True, False),
        ("assistant", 5, True, True),
        ("student", 5, True, True),
    ],
}


@pytest.mark.parametrize("preset", ["paper", "code"])
def test_each_phase_makes_these_forward_passes_and_no_others(tiny, preset):
    method, minimizer = world(tiny, preset=preset)
    seen = []
    for name, net in method.named_children():
        net.register_forward_hook(
            lambda net, inputs, logits, name=name: seen.append(
                (name, len(inputs[0]), net.training, logits.requires_grad)
            )
        )
    for step in range(6):
        seen.clear()
        advance(method, minimizer, step)
        assert seen == PASSES[preset, "warm-up" if step < 2 else "semi"], step


@pytest.mark.parametrize("preset", ["paper", "code"])
def test_a_run_resumed_after_any_step_goes_on_bit_equal(tiny, preset):
    """Middle and end of the warm-up, of the epoch after it, of the last one."""
    run, states = world(tiny, preset=preset), []
    for step in range(6):
        losses = advance(*run, step)
        states.append((losses, copy.deepcopy([part.state_dict() for part in run])))
    for step in range(1, 6):
        resumed = world(tiny, preset=preset, seed=1)
        for part, saved in zip(resumed, copy.deepcopy(states[step - 1][1]), strict=True):
            part.load_state_dict(saved)
        losses = advance(*resumed, step)
        assert equal((losses, [part.state_dict() for part in resumed]), states[step]), step


@pytest.mark.parametrize("data", ["labeled", "pseudo", "both"])
def test_table_7_either_network_learns_from_what_it_is_told(data):
    parts = {"labeled": ["sup"], "pseudo": ["unsup"], "both": ["sup", "unsup"]}[data]
    value = {"sup": math.log(2), "unsup": -math.log(0.9)}
    for joint_bn in (False, True):  # what is seen besides must not count
        _, losses, found = one_step(
            *CASE,
            assistant_data=data,
            student_data="pseudo",
            student_decay=1.0,
            released_passes=joint_bn,
        )
        wanted = [sum(value[part] for part in parts), value["unsup"]]
        assert losses == pytest.approx(wanted, rel=1e-5)
        assert set(found) == {*parts, "unsup", "kept"}
        _, losses, _ = one_step(
            *CASE, student_data=data, student_decay=1.0, released_passes=joint_bn
        )
        assert losses == pytest.approx(wanted[::-1], rel=1e-5)


def test_warm_up_makes_all_three_one_network_in_the_paper(tiny):
    method, minimizer = world(tiny)
    for step in range(2):
        advance(method, minimizer, step)
        student = method.student.state_dict()
        assert equal(student, method.assistant.state_dict())
        assert equal(student, method.teacher.state_dict())
    assert not minimizer.optimizers["assistant"].state  # so its momentum starts from nothing
    advance(method, minimizer, 2)
    assert not equal(method.student.state_dict(), method.assistant.state_dict())


def statistics(net):
    return [b.clone() for b in net.buffers()]


@pytest.mark.parametrize("preset", ["paper", "code"])
def test_bn_statistics_come_from_own_passes_but_the_papers_teacher_has_the_students(tiny, preset):
    method, minimizer = world(tiny, preset=preset)
    advance(method, minimizer, 0)
    last = {}
    for name, net in method.named_children():  # a pass must find what the last one left
        net.register_forward_pre_hook(
            lambda net, _, name=name: last.setdefault(name, []).append(statistics(net))
        )
        net.register_forward_hook(
            lambda net, _, logits, name=name: last[name].append(statistics(net))
        )
    for step in range(1, 4):
        advance(method, minimizer, step)
        teacher, student = statistics(method.teacher), statistics(method.student)
        assert equal(teacher, student) == (preset == "paper")
    own = ["student", "assistant"] if preset == "paper" else ["student", "assistant", "teacher"]
    for name in own:
        left, found = last[name][1:-1:2], last[name][2::2]
        assert len(found) >= 1 and equal(left, found), name


def test_no_warm_up_starts_with_pseudo_labels():
    for preset in GTASeg.presets.values():
        settings = {**preset, "warmup": 0}
        _, losses, found = one_step(*CASE, clock=Clock(0, 1, 1), **settings)
        assert len(losses) == 2 and {"sup", "unsup", "kept"} == set(found)


@pytest.mark.parametrize("preset", ["paper", "code"])
def test_the_assistants_learning_rate_falls_in_the_paper_and_not_in_the_code(tiny, preset):
    method, minimizer = world(tiny, preset=preset)
    minimizer.begin(Clock(3, 2, 3))
    rates = {n: o.param_groups[0]["lr"] for n, o in minimizer.optimizers.items()}
    fallen = LR * 0.5**0.9
    wanted = {"student": fallen, "assistant": fallen if preset == "paper" else LR}
    assert rates == pytest.approx(wanted)


def test_cutmix_mixes_images_labels_confidence_and_padding_alike():
    method = GTASeg(Shifts, cutmix=1.0, drop=0.0)
    weak = torch.randn(4, 2, 16, 16)
    valid = torch.rand(4, 16, 16) < 0.8
    torch.manual_seed(0)
    image, label, confidence = method.pseudo_labels(Batch(weak, None, weak, (), valid))
    shown = image == weak  # in the box another image is shown, in half of each
    assert 0.4 < shown.float().mean() < 0.6
    wanted, sure = pseudo_label(method.teacher(image))
    valid = torch.where(shown.all(1), valid, valid.roll(-1, 0))
    assert torch.equal(label, torch.where(valid, wanted, IGNORE))
    assert torch.equal(confidence, torch.where(valid, sure, 0))


def test_confidence_of_a_second_pass_sees_the_mixed_batch_in_train_mode(tiny):
    """And its BN sees the labeled images too; it leaves the labels alone."""
    found = {}
    for confidence in ("weak_eval", "mixed_train"):
        method, _ = world(tiny, method_args={"confidence": confidence})
        found[confidence] = method.pseudo_labels(images(0))
    (_, label, sure), (_, same, other) = found.values()
    twin = world(tiny)[0].student.train()
    with torch.no_grad():
        logits = twin(torch.cat([images(0).image, images(0).weak]))[2:]
    assert torch.equal(label, same) and not torch.equal(sure, other)
    torch.testing.assert_close(other, pseudo_label(logits)[1])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"assistant_data": "all"}, "pseudo, labeled, both, none"),
        ({"student_data": "none"}, "labeled, pseudo, both$"),
        ({"ema_scope": "classifier"}, "features, backbone, all"),
        ({"reweight": "conf"}, "laplace, confidence, none"),
        ({"normaliser": "valid"}, "kept, all, inv_kept"),
        ({"confidence": "train"}, "weak_eval, mixed_train"),
        ({"released_passes": "never"}, "expected bool"),
        ({"assistant_lr": "cosine"}, "poly, const"),
        ({"drop": 1.2}, "from 0 to 1"),
        ({"cutmix": -0.1}, "from 0 to 1"),
        ({"student_decay": 2.0}, "from 0 to 1"),
        ({"teacher_decay": -1.0}, "from 0 to 1"),
        ({"warmup": -1}, "0 or more"),
    ],
)
def test_a_wrong_setting_is_refused_by_name_and_value(settings, says):
    name, value = next(iter(settings.items()))
    with pytest.raises(ValueError, match=f"{name}={value!r}: .*{says}"):
        GTASeg(Shifts, **settings)


def test_table_6_the_teacher_is_deployed_and_every_network_is_evaluated():
    method, _, _ = one_step(*CASE)
    assert method.deployed == "teacher"
    assert list(method.networks()) == ["student", "assistant", "teacher"]
