"""DST: the released losses' numbers, gradient reversal, which head learns from what."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import GRADIENT, LOSS, equal

from s4lib.build import build_method
from s4lib.losses import ce, pseudo_label
from s4lib.method import Batch, Clock
from s4lib.methods.dst import DST, reversal, reverse, worst_case

ON = Clock(1, 1, 4)  # a step after the warm-up


def all_of(logits: torch.Tensor) -> torch.Tensor:
    return torch.ones(len(logits), *logits.shape[2:], dtype=torch.bool)


@pytest.mark.parametrize("eta", [1, 2])
def test_the_worst_case_is_that_of_the_released_code(golden, eta):
    """dst_losses.npz: WorstCaseEstimationLoss; loss 1e-5, gradients 1e-4."""
    g = golden("dst_losses.npz")
    logits, worst, logits_u, worst_u = (g[k] for k in ("y_l", "y_l_adv", "y_u", "y_u_adv"))
    worst, worst_u = worst.requires_grad_(), worst_u.requires_grad_()
    valid = all_of(logits), all_of(logits_u)
    loss = worst_case(logits, worst, logits_u, worst_u, eta, *valid)
    torch.testing.assert_close(loss.detach(), g[f"loss_eta{eta}"], **LOSS)
    if eta == 2:
        loss.backward()
        for ours, name in ((worst, "y_l_adv"), (worst_u, "y_u_adv")):
            wanted = g[f"grad_{name}_eta2"]
            torch.testing.assert_close(ours.grad, wanted, **GRADIENT)


def test_self_training_counts_sure_samples_and_averages_over_all(golden):
    """dst_losses.npz: self_loss, labels and mask exact, loss 1e-5."""
    g = golden("dst_losses.npz")
    label, confidence = pseudo_label(g["y_u"])
    keep = confidence >= DST.presets["code"]["threshold"]
    assert torch.equal(label, g["self_pl"]) and torch.equal(keep, g["self_mask"] > 0)
    torch.testing.assert_close(ce(g["y_u_strong"], label, keep=keep, over="all"), g["self_loss"])


def test_the_reversal_rises_as_in_the_released_code(golden):
    """dst_losses.npz: coefficients of WarmStartGradientReverseLayer; 1e-12."""
    g = golden("dst_losses.npz")
    ours = [reversal(int(i)) for i in g["grl_iter"]]
    assert ours == pytest.approx(g["grl_coeff"].tolist(), abs=1e-12)


def test_a_reversed_map_is_the_same_and_its_gradient_turned_round():
    x = torch.randn(3, 5, requires_grad=True)
    y = reverse(x, 0.25)
    assert torch.equal(y, x)
    y.square().sum().backward()
    torch.testing.assert_close(x.grad, -0.25 * 2 * x.detach())


def test_the_worst_case_by_hand_and_without_void():
    p = torch.tensor([0.8, 0.3, 0.9])
    logits = torch.stack([1 - p, p]).log()[None, :, None]  # class 1 has probability p
    main = torch.tensor([0.0, 1.0])[None, :, None, None].expand(1, 2, 1, 3)  # says 1 everywhere
    valid = torch.tensor([[[True, True, False]]])
    loss = worst_case(main, logits, main, logits, 2.0, valid, ~valid)
    wanted = -2 * (math.log(0.8) + math.log(0.3)) / 2 - math.log(0.1 + 1e-6)
    assert loss.item() == pytest.approx(wanted, rel=1e-5)


def method_and_batch(tiny, **changes):
    method = build_method(tiny(method="dst", method_args={"cutmix": 1.0} | changes), 8)
    t = torch.Generator().manual_seed(0)
    image, weak, strong, image_strong = torch.randn(4, 4, 3, 32, 32, generator=t)
    label = torch.randint(0, 8, (4, 32, 32), generator=t)
    valid = torch.ones(4, 32, 32, dtype=torch.bool)
    return method, Batch(image, label, weak, (strong,) * method.strong_views, valid, image_strong)


def gradients(tiny, clock=ON, **changes):
    """({part: its gradient of one step}, what was logged, the method)."""
    method, batch = method_and_batch(tiny, **changes)
    kept = {}

    def minimize(loss, *nets):
        parts = {"encoder": method.student.encoder, "main": method.student.classifier}
        parts |= {"pseudo": method.heads[0], "worst": method.heads[1]}
        for name, part in parts.items():
            found = torch.autograd.grad(
                loss, list(part.parameters()), None, True, allow_unused=True
            )
            kept[name] = torch.cat([torch.zeros(1) if g is None else g.flatten() for g in found])
        return True

    torch.manual_seed(0)
    found = method.step(batch, clock, minimize)
    return kept, found, method


def test_pseudo_labels_never_reach_the_main_head(tiny):
    alone, _, _ = gradients(tiny, weight=0.0, worst=0.0)
    both, found, _ = gradients(tiny, weight=5.0, worst=0.0)
    assert torch.equal(alone["main"], both["main"]) and not torch.equal(
        alone["encoder"], both["encoder"]
    )
    assert not alone["pseudo"].any() and both["pseudo"].any() and not both["worst"].any()
    assert found["kept"] == pytest.approx(0.8, abs=0.01)


def test_the_worst_case_moves_features_the_other_way(tiny):
    """Of one loss, the head steps down and the encoder up; at first the encoder stands still."""
    late = Clock(2000, 1, 4000)
    change = {}
    for most in (0.1, -0.1):
        with_it, _, _ = gradients(tiny, late, weight=0.0, most=most)
        without, _, _ = gradients(tiny, late, weight=0.0, worst=0.0)
        change[most] = with_it["encoder"] - without["encoder"]
        assert torch.equal(with_it["main"], without["main"]) and with_it["worst"].any()
    torch.testing.assert_close(change[0.1], -change[-0.1], rtol=1e-3, atol=1e-6)
    assert change[0.1].abs().max() > 1e-5
    first, _, _ = gradients(tiny, weight=0.0)
    without, _, _ = gradients(tiny, weight=0.0, worst=0.0)
    assert torch.equal(first["encoder"], without["encoder"]) and first["worst"].any()


def test_in_the_warm_up_only_labels_count_and_the_teacher_is_the_student(tiny):
    kept, found, method = gradients(tiny, Clock(0, 1, 4))
    assert list(found) == ["sup"] and list(method.networks()) == ["student", "teacher"]
    assert kept["main"].any() and not kept["pseudo"].any() and not kept["worst"].any()
    states = [net.state_dict() for net in method.networks().values()]
    assert equal(*states) and method.deployed == "teacher"


def test_after_the_warm_up_the_teacher_is_an_average(tiny):
    method, batch = method_and_batch(tiny, decay=0.75)
    first = method.teacher.classifier[-1].weight.clone()

    def wait(loss, *nets):
        method.student.classifier[-1].weight.data.add_(1)
        return False

    method.step(batch, ON, wait)
    assert torch.equal(method.teacher.classifier[-1].weight, first)  # gradients are accumulating

    def minimize(loss, *nets):
        method.student.classifier[-1].weight.data.add_(1)
        return True

    method.student.classifier[-1].weight.data.copy_(first)
    method.step(batch, ON, minimize)
    torch.testing.assert_close(method.teacher.classifier[-1].weight, first + 0.25)


def test_the_code_labels_itself_and_sees_strong_views(tiny):
    code = DST.presets["code"] | {"threshold": 0.0}
    kept, found, method = gradients(tiny, Clock(0, 1, 4), **code)
    assert list(method.networks()) == ["student"] and method.deployed == "student"
    assert (method.strong_views, method.labeled_strong) == (1, True)
    assert found["kept"] == 1 and kept["pseudo"].any()


def test_the_two_heads_start_apart(tiny):
    _, _, method = gradients(tiny)
    heads = [head.state_dict() for head in method.heads]
    assert not equal(*heads) and not equal(heads[0], method.student.classifier.state_dict())
