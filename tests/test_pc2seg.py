"""PC2Seg: its contrast written naively, both rules for negatives, which view learns."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from s4lib.build import build_method
from s4lib.contrast import pixel_nce
from s4lib.losses import IGNORE
from s4lib.method import Batch, Clock

K, D = 4, 6


def world(size: int = 3, seed: int = 0):
    t = torch.Generator().manual_seed(seed)
    rep, target = torch.randn(2, size, D, 5, 4, generator=t)
    label = torch.randint(0, K - 1, (size, 5, 4), generator=t)
    label[0, :2] = IGNORE
    return rep, target, label, torch.rand(12, generator=t), torch.rand(12, 7, generator=t)


def naive(rep, target, label, u_anchor, u_negative, same_image, debias):
    """Pixel by pixel, in lists, in float64."""
    places = [(b, y, x) for b in range(len(rep)) for y in range(5) for x in range(4)]
    known = [p for p in places if label[p] != IGNORE]
    rep = rep.double().movedim(1, -1).requires_grad_()
    target, total = target.double().movedim(1, -1), 0
    for u, drawn in zip(u_anchor, u_negative, strict=True):
        anchor = known[int(u * len(known))]
        pool = [p for p in known if not debias or label[p] != label[anchor]]
        logits = [F.cosine_similarity(rep[anchor], target[anchor], dim=0) / 0.1]
        for v in drawn:
            p = pool[int(v * len(pool))] if pool else anchor
            if pool and (same_image or p[0] != anchor[0]):
                logits.append(F.cosine_similarity(rep[anchor], target[p], dim=0) / 0.1)
        total = total + torch.stack(logits).logsumexp(0) - logits[0]
    loss = total / len(u_anchor)
    return loss.item(), torch.autograd.grad(loss, rep)[0].movedim(-1, 1).float()


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("same_image", [False, True])
@pytest.mark.parametrize("debias", [False, True])
def test_the_contrast_is_what_lists_and_loops_give(size, same_image, debias):
    rep, target, label, *u = world(size)
    wanted, wanted_gradient = naive(rep, target, label, *u, same_image, debias)
    rep.requires_grad_(), target.requires_grad_()
    loss = pixel_nce(rep, target, label, K, *u, 0.1, same_image, debias)
    assert loss.item() == pytest.approx(wanted, rel=1e-5)
    gradient = torch.autograd.grad(loss, [rep, target], allow_unused=True)
    torch.testing.assert_close(gradient[0], wanted_gradient, rtol=1e-4, atol=1e-6)
    assert gradient[1] is None
    assert (wanted == 0) == (size == 1 and not same_image)


def test_one_class_alone_has_no_debiased_negative_and_void_no_anchor():
    rep, target, label, *u = world()
    one = torch.where(label == IGNORE, IGNORE, 1)
    assert pixel_nce(rep, target, one, K, *u, 0.1) == 0
    assert pixel_nce(rep, target, one, K, *u, 0.1, debias=False) > 1
    rep.requires_grad_()
    nothing = pixel_nce(rep, target, torch.full_like(label, IGNORE), K, *u, 0.1)
    assert nothing == 0 and not torch.autograd.grad(nothing, rep)[0].isnan().any()


def test_autocast_does_not_round_the_contrast():
    rep, target, label, *u = world()
    plain = pixel_nce(rep, target, label, K, *u)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pixel_nce(rep, target, label, K, *u), plain)


def losses(tiny, **changes):
    """Gradients of what is minimised with regard to (strong, weak) views; what is logged."""
    method = build_method(tiny(method="pc2seg", net_args={"norm": "group"}, method_args=changes), 8)
    t = torch.Generator().manual_seed(0)
    image, weak, strong = torch.randn(3, 4, 3, 32, 32, generator=t)
    weak.requires_grad_(), strong.requires_grad_()
    label = torch.randint(0, 8, (4, 32, 32), generator=t)
    valid = torch.ones(4, 32, 32, dtype=torch.bool)
    kept = []

    def minimize(loss, *nets):
        kept.extend(torch.autograd.grad(loss, [strong, weak], materialize_grads=True))

    torch.manual_seed(0)
    found = method.step(Batch(image, label, weak, (strong,), valid), Clock(0, 1, 4), minimize)
    return kept, found


def test_the_strong_view_learns_from_the_weak_one_alone(tiny):
    (strong, weak), found = losses(tiny)
    assert strong.abs().max() > 1e-7 and not weak.any()
    assert found["cons"] > 0 and found["contra"] > 1


@pytest.mark.parametrize("name", ["weight", "contrast"])
def test_each_loss_has_a_weight_of_its_own(tiny, name):
    other = {"weight": "contrast", "contrast": "weight"}[name]
    (strong, _), _ = losses(tiny, **{name: 0.0, other: 0.0})
    assert not strong.any()
    (strong, _), _ = losses(tiny, **{name: 1.0, other: 0.0})
    (twice, _), _ = losses(tiny, **{name: 2.0, other: 0.0})
    assert strong.any()
    torch.testing.assert_close(twice, 2 * strong, rtol=1e-4, atol=1e-9)
