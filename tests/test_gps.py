"""GPS, line by line of Algorithm 1 (../shared/papers/gps_supplementary.txt).

Where numbers are computed by hand, a network is one number w: it gives a pixel x the logits (0, wx)
of two classes, so that class 1 has probability 1 / (1 + exp(-wx)).
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import equal
from torch import nn

from s4lib.build import build_method
from s4lib.evaluate import evaluated
from s4lib.losses import IGNORE, soft_ce
from s4lib.method import Batch, Clock
from s4lib.methods.gps import GPS
from s4lib.minimizer import Minimizer
from s4lib.mixing import cutmix_xor

CPU = torch.device("cpu")


class Scalar(nn.Module):
    def __init__(self, w: float):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w))

    def forward(self, image):
        x = image[:, 0]
        return torch.stack([torch.zeros_like(x), self.w * x], 1)


def gps(*ws: float, **arguments) -> GPS:
    """Students ws[0] and ws[1], teacher ws[2]."""
    given = iter(ws or (1.0, 2.0, 3.0))
    return GPS(lambda: Scalar(next(given)), **arguments)


def pixels(labeled: list[float], label: list[int], unlabeled: list[float], valid=None) -> Batch:
    """Images of one pixel."""
    image, weak = (
        torch.tensor(v).view(-1, 1, 1, 1).expand(-1, 3, 1, 1) for v in (labeled, unlabeled)
    )
    valid = torch.tensor(valid or [True] * len(unlabeled)).view(-1, 1, 1)
    return Batch(image, torch.tensor(label).view(-1, 1, 1), weak, (), valid)


class Descent:
    """Gradient descent; remembers each loss and which networks it was for."""

    def __init__(self, lr: float = 0.0, updates: bool = True):
        self.lr, self.updates, self.losses, self.nets = lr, updates, [], []

    def __call__(self, loss, *nets):
        self.losses.append(loss.item())
        self.nets.append(nets)
        parameters = [p for net in nets for p in net.parameters()]
        for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            p.data -= self.lr * g
        return self.updates


TEACHER_ALONE, ALL = Clock(0, 1, 2), Clock(1, 1, 2)  # the first of two epochs, and the second


def nll(wx: float) -> float:
    """Minus log probability of class 1; of class 0 it is nll(-wx)."""
    return math.log(1 + math.exp(-wx))


def values(losses: dict) -> dict[str, float]:
    return {name: float(value) for name, value in losses.items()}


ONE = pixels([1.0], [1], [1.0])


@pytest.mark.parametrize(
    ("share", "epochs", "alone"),
    [(0.15, 34, 5), (0.15, 12, 2), (0.15, 3, 1), (0.15, 1, 0), (0.0, 9, 0), (0.99, 4, 3)],
)
def test_lines_5_to_14_last_a_share_of_the_epochs_and_leave_the_students_one(share, epochs, alone):
    assert gps(teacher_share=share).alone(Clock(0, 7, epochs)) == alone


def test_lines_8_to_12_the_teacher_learns_alone_from_labels():
    method, minimize = gps(1.0, 2.0, 3.0), Descent(lr=0.5)
    losses = method.step(pixels([1.0, -1.0], [1, 1], [7.0]), TEACHER_ALONE, minimize)
    assert values(losses) == pytest.approx({"sup": (nll(3) + nll(-3)) / 2})  # 9, 11
    assert minimize.nets == [(method.teacher,)]  # 12
    p = 1 / (1 + math.exp(-3))
    assert method.teacher.w.item() == pytest.approx(3 + 0.5 * ((1 - p) - p) / 2)
    assert [s.w.item() for s in method.students] == [1.0, 2.0]


def test_line_23_is_the_sum_over_both_students():
    losses = gps(1.0, -2.0, 3.0).step(pixels([1.0], [1], [1.0]), ALL, Descent())
    assert float(losses["sup_students"]) == pytest.approx(nll(1) + nll(-2))


def test_line_24_both_students_learn_the_teachers_label():
    losses = gps(1.0, 2.0, -3.0).step(ONE, ALL, Descent())  # the teacher says class 0
    assert float(losses["gps"]) == pytest.approx(nll(-1) + nll(-2))


def test_line_25_each_student_learns_the_others_label():
    losses = gps(1.0, -2.0, 3.0).step(ONE, ALL, Descent())  # they say classes 1 and 0
    assert float(losses["cps"]) == pytest.approx(nll(-1) + nll(-2))
    losses = gps(1.0, 2.0, 3.0).step(ONE, ALL, Descent())
    assert float(losses["cps"]) == pytest.approx(nll(1) + nll(2))


def test_lines_26_and_27_weigh_the_guiding_losses_and_update_both_students_at_once():
    minimize, method = Descent(), gps(1.0, -2.0, 3.0, alpha=10.0, beta=100.0)
    method.step(ONE, ALL, minimize)
    guide = (nll(1) + nll(-2)) + 10 * (nll(1) + nll(-2)) + 100 * (nll(-1) + nll(-2))
    assert minimize.losses[0] == pytest.approx(guide)
    assert minimize.nets[0] == (method.students,)


def test_line_30_the_feedback_comes_from_the_students_after_their_update():
    """Both say class 0 of the unlabeled pixel, until the labeled one has taught them class 1."""
    minimize = Descent(lr=10.0)
    method = gps(-0.1, -0.1, 3.0, alpha=0.0, beta=0.0)
    losses = method.step(ONE, ALL, minimize)
    w = -0.1 + 10 / (1 + math.exp(-0.1))
    assert [s.w.item() for s in method.students] == pytest.approx([w, w])
    assert float(losses["fps"]) == pytest.approx(nll(3))


def test_line_31_averages_probabilities_not_logits_or_votes():
    method = gps(5.0, -4.0, 1.0, feedback="soft")
    mean = (1 / (1 + math.exp(-5)) + 1 / (1 + math.exp(4))) / 2
    losses = method.step(ONE, ALL, Descent())
    assert float(losses["fps"]) == pytest.approx(mean * nll(1) + (1 - mean) * nll(-1))
    hard = gps(5.0, -4.0, 1.0).step(ONE, ALL, Descent())
    assert mean > 0.5 and float(hard["fps"]) == pytest.approx(nll(1))
    surer = gps(0.4, -0.6, 1.0).step(ONE, ALL, Descent())
    assert float(surer["fps"]) == pytest.approx(nll(-1))


def test_lines_33_to_36_weigh_the_feedback_and_update_the_teacher():
    minimize, method = Descent(), gps(1.0, 2.0, -3.0, gamma=10.0)
    losses = method.step(pixels([2.0], [1], [1.0]), ALL, minimize)
    w = math.exp(-5)  # of the first epoch
    assert values(losses)["weight"] == pytest.approx(w)
    assert minimize.losses[1] == pytest.approx(nll(-6) + w * 10 * nll(-3))
    assert minimize.nets[1] == (method.teacher,) and len(minimize.nets) == 2


@pytest.mark.parametrize(
    ("ramp", "expected"),
    [
        ("k5", [0.0067, 0.060, 0.29, 0.73]),
        ("k1", [0.37, 0.57, 0.78, 0.94]),
        ("literal", [0.135, 0.082, 0.050, 0.030]),
    ],
)
def test_line_4_counts_epochs_since_the_students_began(ramp, expected):
    """The values of the specification at e/E = 0, 1/4, 1/2, 3/4; constant within an epoch."""
    found = []
    for step in range(2, 10):  # two steps an epoch; the first of five epochs is the teacher's
        method = gps(ramp=ramp, latch=False)
        found.append(float(method.step(ONE, Clock(step, 2, 5), Descent())["weight"]))
    assert found[::2] == found[1::2]
    assert found[::2] == pytest.approx(expected, rel=0.02)


def test_each_phase_has_a_learning_rate_schedule_and_optimizer_state_of_its_own():
    clocks = [Clock(step, 2, 5) for step in range(10)]
    for child in ("students", "teacher"):
        progress = [gps().schedule(child, clock) for clock in clocks]
        assert progress == [0, 1 / 2, *(i / 8 for i in range(8))]
        assert [i for i, clock in enumerate(clocks) if gps().restarts(child, clock)] == [0, 2]


def test_padding_enters_no_loss_and_no_count():
    plain = gps(1.0, 2.0, 3.0).step(ONE, ALL, Descent())
    padded = pixels([1.0], [1], [1.0, -9.0], valid=[True, False])
    for feedback in ("hard", "soft"):
        method = gps(1.0, 2.0, 3.0, feedback=feedback)
        losses = method.step(padded, ALL, Descent())
        for name in ("gps", "cps"):
            assert float(losses[name]) == pytest.approx(float(plain[name])), name
        alone = gps(1.0, 2.0, 3.0, feedback=feedback).step(ONE, ALL, Descent())
        assert float(losses["fps"]) == pytest.approx(float(alone["fps"]))


def test_soft_ce_is_ce_for_certain_labels_and_ignores_what_is_not_kept():
    logits = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    label = torch.arange(32).view(2, 4, 4) % 3
    keep = torch.arange(32).view(2, 4, 4) % 5 > 0
    probs = F.one_hot(label, 3).movedim(-1, 1).float()
    expected = F.cross_entropy(logits, label.masked_fill(~keep, IGNORE), ignore_index=IGNORE)
    torch.testing.assert_close(soft_ce(logits, probs, keep=keep), expected)
    assert soft_ce(logits * 1e30, probs, keep=torch.zeros_like(keep)) == 0


class Synthetic:
    """A supervised loss that is given, not computed: two students and the teacher, step by step."""

    def __init__(self, *steps: tuple[float, float, float]):
        self.values = [value for step in steps for value in step]

    def __call__(self, logits, label):
        return self.values.pop(0) + 0 * logits.sum()


def latched(method: GPS, *steps, per_epoch: int = 2, first: int = 2, minimize=None) -> list[bool]:
    """Whether the weight is 1 in each of some steps; two an epoch, the teacher's epoch is over."""
    method.criterion = Synthetic(*steps)
    found = []
    for i in range(first, first + len(steps)):
        losses = method.step(ONE, Clock(i, per_epoch, 10), minimize or Descent())
        found.append(float(losses["weight"]) == 1)
    return found


# With AHEAD in one epoch, BEHIND still comes out level (5 and 5), FAR_BEHIND does not.
AHEAD, LEVEL, BEHIND = (1.0, 2.0, 3.0), (2.5, 1.5, 2.0), (4.0, 3.0, 2.0)
FAR_BEHIND = (4.0, 3.1, 2.0)


def test_lines_38_to_40_the_weight_is_1_after_an_epoch_in_which_the_students_caught_up():
    method = gps(teacher_share=0.1)
    assert latched(method, BEHIND, BEHIND, LEVEL, LEVEL, BEHIND) == [False] * 4 + [True]


def test_line_38_compares_sums_over_the_epoch_not_steps():
    assert latched(gps(teacher_share=0.1), AHEAD, BEHIND, BEHIND)[-1]
    assert not latched(gps(teacher_share=0.1), AHEAD, FAR_BEHIND, BEHIND)[-1]
    # An epoch's sums begin at zero: what was far behind in the last one does not count.
    assert latched(gps(teacher_share=0.1), FAR_BEHIND, FAR_BEHIND, LEVEL, LEVEL, BEHIND)[-1]


def test_line_39_stays_when_the_students_fall_back():
    method = gps(teacher_share=0.1)
    assert latched(method, AHEAD, AHEAD, *[BEHIND] * 5) == [False] * 2 + [True] * 5


def test_without_the_latch_the_ramp_goes_on():
    assert not any(latched(gps(teacher_share=0.1, latch=False), *[AHEAD] * 6))


def test_the_sums_of_a_half_finished_epoch_survive_a_resume():
    whole, killed, resumed = (gps(teacher_share=0.1) for _ in range(3))
    latched(whole, AHEAD, BEHIND)
    latched(killed, AHEAD)
    resumed.load_state_dict(killed.state_dict())
    latched(resumed, BEHIND, first=3)
    assert equal(whole.state_dict(), resumed.state_dict()) and whole.caught_up
    again = gps(teacher_share=0.1)
    again.load_state_dict(resumed.state_dict())
    assert latched(again, BEHIND, first=4) == [True]


def test_with_accumulated_gradients_an_epoch_ends_once():
    """The two batches of an epoch's last update: only with the second is the epoch complete."""
    method = gps(teacher_share=0.1)
    latched(method, AHEAD, per_epoch=1, first=1, minimize=Descent(updates=False))
    assert not method.caught_up and method.sums.tolist() == [3, 3]
    latched(method, FAR_BEHIND, per_epoch=1, first=1)
    assert not method.caught_up and method.sums.tolist() == [0, 0]


SIZE, CLASSES = 8, 4


def small_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, CLASSES, 1)
    )


def small_batch(step: int) -> Batch:
    g = torch.Generator().manual_seed(100 + step)
    image, weak = (torch.randn(3, 3, SIZE, SIZE, generator=g) for _ in range(2))
    label = torch.randint(0, CLASSES, (3, SIZE, SIZE), generator=g)
    valid = torch.ones_like(label, dtype=torch.bool)
    valid[0, :3] = valid[1, :, 5:] = False
    return Batch(image, label.masked_fill(~valid, IGNORE), weak, (), valid)


def small_config(tiny):
    return tiny(optimizer="sgd", lr=0.05, weight_decay=1e-3)


def small_gps(tiny, **arguments) -> tuple[GPS, Minimizer]:
    torch.manual_seed(0)
    method = GPS(small_net, **arguments).train()
    return method, Minimizer(method, small_config(tiny), CPU)


PER_EPOCH, EPOCHS, FIRST = 2, 6, 1  # the students' epochs begin with the second


def paste(mask: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Each of three images, with the next one where the mask is True."""
    parts = [torch.where(mask[k], x[(k + 1) % 3], x[k]) for k in range(3)]
    return torch.stack(parts)


def naive(networks: list[nn.Module], mixes: bool, soft: bool) -> list[float]:
    """The algorithm once more, in another style, one optimizer a network. Returns the weights."""
    student_1, student_2, teacher = networks
    new = lambda net: torch.optim.SGD(net.parameters(), lr=0, momentum=0.9, weight_decay=1e-3)  # noqa: E731
    optimizers, weights, caught_up = [new(net) for net in networks], [], False

    def update(which: list[int], rate: float, loss):
        for i in which:
            optimizers[i].param_groups[0]["lr"] = rate
            optimizers[i].zero_grad()
        loss.backward(inputs=[p for i in which for p in networks[i].parameters()])
        for i in which:
            optimizers[i].step()

    def supervise(net, batch):
        return F.cross_entropy(net(batch.image), batch.label, ignore_index=IGNORE)

    def pseudo(logits, label, valid):
        return F.cross_entropy(logits, label.masked_fill(~valid, IGNORE), ignore_index=IGNORE)

    for step in range(FIRST * PER_EPOCH):
        rate = 0.05 * (1 - step / (FIRST * PER_EPOCH)) ** 0.9
        update([2], rate, supervise(teacher, small_batch(step)))
    optimizers[2] = new(teacher)
    for epoch in range(EPOCHS - FIRST):
        sum_s, sum_t = 0.0, 0.0
        for i in range(PER_EPOCH):
            done = epoch * PER_EPOCH + i
            batch = small_batch(FIRST * PER_EPOCH + done)
            rate = 0.05 * (1 - done / ((EPOCHS - FIRST) * PER_EPOCH)) ** 0.9
            torch.manual_seed(FIRST * PER_EPOCH + done)
            mask = cutmix_xor(batch.weak).mask if mixes else torch.zeros_like(batch.valid)
            view, valid = paste(mask, batch.weak), paste(mask, batch.valid)
            z_1, z_2 = student_1(view), student_2(view)
            y_t = paste(mask, teacher(batch.weak).argmax(1))
            y_1, y_2 = z_1.argmax(1), z_2.argmax(1)
            if mixes:
                y_1, y_2 = (
                    paste(mask, net(batch.weak).argmax(1)) for net in (student_1, student_2)
                )
            l_s = supervise(student_1, batch) + supervise(student_2, batch)
            l_gps = pseudo(z_1, y_t, valid) + pseudo(z_2, y_t, valid)
            l_cps = pseudo(z_1, y_2, valid) + pseudo(z_2, y_1, valid)
            update([0, 1], rate, l_s + 0.5 * l_gps + 1.5 * l_cps)
            l_t = supervise(teacher, batch)
            p_s = (student_1(batch.weak).softmax(1) + student_2(batch.weak).softmax(1)).detach() / 2
            p_s = paste(mask, p_s)
            z_t = teacher(view)
            if soft:
                l_fps = F.cross_entropy(z_t, p_s, reduction="none")[valid].mean()
            else:
                l_fps = pseudo(z_t, p_s.argmax(1), valid)
            x = epoch / (EPOCHS - FIRST)
            w = math.exp(-1 - x) ** 2 if soft else math.exp(-5 * (1 - x) ** 2)
            weights.append(1.0 if caught_up else w)
            update([2], rate, l_t + weights[-1] * 0.5 * l_fps)
            sum_s, sum_t = sum_s + l_s.item(), sum_t + l_t.item()
        caught_up = caught_up or 0.5 * sum_s <= sum_t
    return weights


@pytest.mark.parametrize("preset", GPS.presets)
def test_a_whole_training_is_that_of_a_naive_implementation(tiny, preset):
    method, minimizer = small_gps(tiny, **GPS.presets[preset])
    reference, _ = small_gps(tiny)
    expected = naive(
        [*reference.students, reference.teacher], preset == "cutmix", preset == "literal"
    )
    weights = []
    for step in range(PER_EPOCH * EPOCHS):
        clock = Clock(step, PER_EPOCH, EPOCHS)
        torch.manual_seed(step)
        minimizer.begin(clock)
        weights.append(method.step(small_batch(step), clock, minimizer).get("weight"))
    assert weights[:2] == [None, None]
    assert list(map(float, weights[2:])) == pytest.approx(expected)
    for net, other in zip(
        [*method.students, method.teacher], [*reference.students, reference.teacher], strict=True
    ):
        torch.testing.assert_close(net.state_dict(), other.state_dict(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("clock", "cutmix", "expected"),
    [
        # (with a gradient, without) for each student and the teacher, then updates
        (TEACHER_ALONE, False, ([0, 0], [0, 0], [1, 0], 1)),
        (ALL, False, ([2, 1], [2, 1], [2, 1], 2)),
        (ALL, True, ([2, 2], [2, 2], [2, 1], 2)),
    ],
)
def test_forwards_and_updates_are_counted(clock, cutmix, expected):
    method, minimize, counts = gps(cutmix=cutmix), Descent(), []
    for net in (*method.students, method.teacher):
        counts.append([0, 0])

        def count(net, given, logits, of=counts[-1]):
            of[0 if logits.requires_grad else 1] += 1

        net.register_forward_hook(count)
    method.step(ONE, clock, minimize)
    assert (*counts, len(minimize.losses)) == expected


def test_guiding_leaves_the_teachers_weights_alone_and_feedback_the_students(tiny):
    method, minimizer = small_gps(tiny)
    clock = Clock(3, 2, 6)
    minimizer.begin(clock)

    def weights(net: nn.Module) -> dict:
        return {name: p.detach().clone() for name, p in net.named_parameters()}

    def watched(loss, *nets):
        (net,) = nets
        (other,) = {method.students, method.teacher} - {net}
        before, rests = weights(net), weights(other)
        minimizer(loss, net)
        assert all(p.grad is None for p in other.parameters())
        assert equal(rests, weights(other)) and not equal(before, weights(net))
        return True

    method.step(small_batch(3), clock, watched)


def test_the_networks_begin_at_different_weights(tiny):
    method = build_method(tiny(method="gps"), 4)
    first = [next(net.parameters()) for net in method.networks().values()]
    assert len(first) == 3
    assert not any(torch.equal(first[i], first[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_encoder_lr_reaches_the_encoders_of_both_students(tiny):
    config = tiny(method="gps", encoder_lr=0.1)
    method = build_method(config, 4)
    minimizer = Minimizer(method, config, CPU)
    for name, nets in (("students", [*method.students]), ("teacher", [method.teacher])):
        (slow,) = (g for g in minimizer.optimizers[name].param_groups if g["factor"] == 0.1)
        wanted = {p for net in nets for p in net.encoder.parameters()}
        assert set(slow["params"]) == wanted


@pytest.mark.parametrize("deploy", ["students.0", "students.1", "teacher", "ensemble"])
def test_deploy_says_who_predicts_and_is_evaluated(deploy):
    method = gps(1.0, -2.0, 3.0, deploy=deploy)
    image = torch.ones(1, 3, 1, 1)
    probs = {w: 1 / (1 + math.exp(-w)) for w in (1.0, -2.0, 3.0)}
    wanted = {
        "students.0": probs[1.0],
        "students.1": probs[-2.0],
        "teacher": probs[3.0],
        "ensemble": (probs[1.0] + probs[-2.0]) / 2,
    }
    assert method(image).softmax(1)[0, 1].item() == pytest.approx(wanted[deploy])
    names = ["students.0", "students.1", "teacher"]
    assert list(evaluated(method)) == names + (["ensemble"] if deploy == "ensemble" else [])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ramp", "k2"),
        ("feedback", "probs"),
        ("deploy", "student"),
        ("teacher_share", 1.0),
        ("teacher_share", -0.1),
    ],
)
def test_bad_settings_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r}: choose "):
        gps(**{name: value})
