"""CPS and n-CPS: the released codes' numbers through `step`, brute force, votes by hand."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch
from conftest import GRADIENT, LOSS
from torch import nn

from s4lib.build import build_method
from s4lib.losses import IGNORE
from s4lib.method import Batch, Clock, Crop
from s4lib.methods import cps, n_cps
from s4lib.methods.cps import CPS, cross
from s4lib.methods.n_cps import NCPS, ensemble, sure_label
from s4lib.mixing import Mix, paste

START = Clock(0, 1, 1)
HOW = ["single", "max_confidence", "max_confidence_softmax", "soft_voting", "hard_voting"]


class Recorded(nn.Module):
    """Gives recorded logits: `sup` for a black image, `unsup` for any other."""

    def __init__(self, sup, unsup):
        super().__init__()
        self.sup, self.unsup = nn.Parameter(sup.clone()), nn.Parameter(unsup.clone())

    def forward(self, image):
        return torch.where(image.sum() == 0, self.sup, self.unsup)


class Update:
    """A `minimize` that updates nothing and remembers the loss and its gradients."""

    def __call__(self, loss, *nets):
        parameters = [p for net in nets for p in net.parameters()]
        self.loss, self.grads = loss.detach(), torch.autograd.grad(loss, parameters)
        return True


def built(kind, nets, **arguments):
    """The method with these networks."""
    nets = iter(nets)
    return kind(lambda: next(nets), **arguments).train()


def batch_of(image, label, weak, valid=None) -> Batch:
    valid = torch.ones(len(weak), *weak.shape[-2:], dtype=torch.bool) if valid is None else valid
    return Batch(image, label, weak, (), valid)


def recorded_step(kind, sup, unsup, label, **arguments):
    """(losses, Update) of a step without CutMix of networks with recorded logits."""
    nets = [Recorded(*pair) for pair in zip(sup, unsup, strict=True)]
    method, update = built(kind, nets, cutmix=False, padding=True, **arguments), Update()
    black = torch.zeros(len(label), 3, *label.shape[1:])
    return method.step(batch_of(black, label, black + 1), START, update), update


def test_a_step_without_cutmix_is_that_of_torchsemiseg(golden):
    """cps_loss.npz: VOC CPS, weight 1.5, labels with void; losses 1e-5, gradients 1e-4."""
    g = golden("cps_loss.npz")
    assert (g["target"] == IGNORE).any()
    sup, unsup = ([g[f"pred_{kind}_{i}"] for i in (1, 2)] for kind in ("sup", "unsup"))
    weight = float(g["cps_weight"])
    losses, update = recorded_step(CPS, sup, unsup, g["target"], weight=weight)
    torch.testing.assert_close(weight * losses["cps"], g["cps_loss_weighted"], **LOSS)
    torch.testing.assert_close(losses["sup"], g["loss_sup_1"] + g["loss_sup_2"], **LOSS)
    torch.testing.assert_close(update.loss, g["total"], **LOSS)
    names = ["sup_1", "unsup_1", "sup_2", "unsup_2"]
    for ours, name in zip(update.grads, names, strict=True):
        torch.testing.assert_close(ours, g[f"grad_{name}"], **GRADIENT)


@pytest.mark.parametrize("kind", [CPS, NCPS])
def test_a_step_with_cutmix_is_that_of_torchsemiseg(golden, monkeypatch, kind):
    """cps_cutmix_step.npz: one convolution each, recorded mask; losses 1e-5, gradients 1e-4.

    Their two unlabeled batches are the halves of ours, of which one is pasted into the other.
    """
    g = golden("cps_cutmix_step.npz")
    mask, nets = g["mix_mask"] > 0, []
    for i in (1, 2):
        nets.append(nn.Conv2d(3, 7, 3, padding=1))
        nets[-1].load_state_dict({k: g[f"net{i}.{k}"] for k in ("weight", "bias")})

    mix = Mix(mask[:, 0], torch.tensor([1, 0]))  # the partners are not what its boxes show
    torch.testing.assert_close(paste(mix.same(), g["images_u1"], g["images_u0"]), g["mixed"])
    monkeypatch.setattr(cps if kind is CPS else n_cps, "cutmix_xor", lambda like: mix)
    arguments = {"weight": float(g["cps_weight"]), "partner": "same"}
    method, update = built(kind, nets, **arguments, **({} if kind is CPS else {"n": 2})), Update()
    assert method.second_crop
    batch = batch_of(g["images_l"], g["target_l"], g["images_u0"])
    batch = batch._replace(second=Crop(g["images_u1"], (), batch.valid))
    _, _, teaching, _ = cps.predictions(nets, batch, mix)
    for i, x in enumerate(teaching, 1):
        assert torch.equal(x.argmax(1), g[f"pseudo_{i}"]) and not x.requires_grad
    losses = method.step(batch, START, update)
    torch.testing.assert_close(losses["cps"], g["cps_loss_weighted"], **LOSS)
    torch.testing.assert_close(losses["sup"], g["loss_sup_1"] + g["loss_sup_2"], **LOSS)
    torch.testing.assert_close(update.loss, g["total"], **LOSS)
    names = [f"net{i}.{k}_grad" for i in (1, 2) for k in ("weight", "bias")]
    for ours, name in zip(update.grads, names, strict=True):
        torch.testing.assert_close(ours, g[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_the_losses_of_n_networks_are_those_of_n_cps(golden, n):
    """ncps_loss.npz: calc_cps_loss, calc_sup_loss, calc_loss with and without 2/n; 1e-5."""
    g = golden("ncps_loss.npz")
    sup, unsup, label = g[f"n{n}_sup_logits"], g[f"n{n}_unsup_logits"], g["target"]
    for normalised, name in ((False, ""), (True, "_normalised_2_over_n")):
        losses, update = recorded_step(NCPS, sup, unsup, label, n=n, normalised=normalised)
        torch.testing.assert_close(losses["sup"], g[f"n{n}_L_sup"][0], **LOSS)
        torch.testing.assert_close(losses["cps"], g[f"n{n}_L_cps"][0], **LOSS)
        torch.testing.assert_close(update.loss, g[f"n{n}_total_w1p5{name}"][0], **LOSS)
        if n == 3 and not normalised:
            ours = torch.stack(update.grads[1::2])
            torch.testing.assert_close(ours, g["n3_grad_unsup"], **GRADIENT)


def test_the_confidence_pass_is_that_of_n_cps(golden):
    """ncps_loss.npz, n3_L_cps_threshold0p5: unsure pixels teach nothing; 1e-5."""
    g = golden("ncps_loss.npz")
    three = g["n3_sup_logits"], g["n3_unsup_logits"], g["target"]
    losses, _ = recorded_step(NCPS, *three, threshold=0.5)
    torch.testing.assert_close(losses["cps"], g["n3_L_cps_threshold0p5"][0], **LOSS)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_cross_is_a_loop_over_pixels_and_ordered_pairs(n):
    g = torch.Generator().manual_seed(n)
    logits = torch.randn(n, 2, 4, 3, 5, generator=g, dtype=torch.float64)
    labels = torch.randint(0, 4, (n, 2, 3, 5), generator=g)
    labels[0, 0, 0] = IGNORE
    keep = torch.rand(2, 3, 5, generator=g) < 0.6
    total = 0.0
    for i, j in permutations(range(n), 2):
        found = [
            -float(logits[i, b, :, y, x].log_softmax(0)[labels[j, b, y, x]])
            for b, y, x in keep.nonzero().tolist()
            if labels[j, b, y, x] != IGNORE
        ]
        total += sum(found) / len(found)
    assert float(cross(logits, labels, keep)) == pytest.approx(total / (n - 1), rel=1e-5)


def test_cross_needs_two_networks():
    with pytest.raises(ValueError, match="of 1 network"):
        cross([torch.zeros(1, 2, 1, 1)], [torch.zeros(1, 1, 1, dtype=torch.int64)])
    with pytest.raises(ValueError, match="n=1: choose 2 or more"):
        NCPS(nn.Identity, n=1)


def test_each_learns_from_the_other_and_not_from_itself():
    """One says class 0 with probability 0.9, the other class 1 with 0.75."""
    said = [torch.tensor([0.9, 0.1]), torch.tensor([0.25, 0.75])]
    logits = [p.log().view(1, 2, 1, 1).expand(2, 2, 3, 3) for p in said]
    label = torch.zeros(2, 3, 3, dtype=torch.int64)
    losses, update = recorded_step(CPS, logits, logits, label, weight=2.0)
    wanted = -math.log(0.1) - math.log(0.25)  # each is wrong about what the other says
    assert float(losses["cps"]) == pytest.approx(wanted, rel=1e-5)
    assert float(losses["sup"]) == pytest.approx(-math.log(0.9) - math.log(0.25), rel=1e-5)
    assert float(update.loss) == pytest.approx(float(losses["sup"]) + 2 * wanted, rel=1e-5)


def test_labels_come_from_plain_images_in_training_mode(tiny, monkeypatch):
    """With CutMix: running statistics move, and what is mixed are predictions, not images."""
    method = build_method(tiny(method="cps"), 8).train()
    g = torch.Generator().manual_seed(0)
    weak = torch.randn(4, 3, 32, 32, generator=g)
    seen = []
    for net in method.students:
        net.register_forward_hook(lambda net, images, out: seen.append((images[0], net.training)))
    label = torch.zeros(4, 32, 32, dtype=torch.int64)
    batch = batch_of(torch.randn(4, 3, 32, 32, generator=g), label, weak)
    method.step(batch, START, lambda loss, *nets: True)
    assert len(seen) == 6 and all(training for _, training in seen)
    images = [image for image, _ in seen]
    assert sum(torch.equal(x, weak) for x in images) == 2
    assert sum(torch.equal(x, batch.image) for x in images) == 2
    mixed = [x for x in images if not torch.equal(x, weak) and not torch.equal(x, batch.image)]
    assert torch.equal(*mixed)
    pasted = (mixed[0] != weak).all(1).float().mean()
    assert 0.05 < pasted < 0.5  # three boxes that cancel where they overlap
    assert torch.equal(torch.where((mixed[0] != weak), weak.roll(-1, 0), weak), mixed[0])


@pytest.mark.parametrize("padding", [False, True])
def test_padding_and_void_teach_if_the_code_is_asked_for(padding):
    """Without CutMix; on half of each picture the networks disagree, and there nothing is known."""
    one, other = torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2)
    one[:, 0], other[:, 0] = math.log(4), math.log(4)
    other[..., 1, :] *= -1
    label = torch.tensor([[[0, 0], [IGNORE, IGNORE]]])
    valid = label != IGNORE
    nets = [Recorded(x, x) for x in (one, other)]
    method = built(CPS, nets, cutmix=False, padding=padding)
    black = torch.zeros(1, 3, 2, 2)
    losses = method.step(batch_of(black, label, black + 1, valid), START, Update())
    agree, disagree = -math.log(0.8), -math.log(0.2)
    wanted = 2 * ((agree + disagree) / 2 if padding else agree)
    assert float(losses["cps"]) == pytest.approx(wanted, rel=1e-5)


# Votes


@pytest.mark.parametrize("n", [2, 3, 4])
def test_ensembles_are_loops_over_pixels(n):
    g = torch.Generator().manual_seed(n)
    logits = 3 * torch.randn(n, 2, 5, 3, 4, generator=g)
    found = {how: ensemble(list(logits), how) for how in HOW}
    for b in range(2):
        for y in range(3):
            for x in range(4):
                at = [logits[i, b, :, y, x].tolist() for i in range(n)]
                z = [sum(map(math.exp, v)) for v in at]
                probs = [[math.exp(v) / t for v in row] for row, t in zip(at, z, strict=True)]
                votes = [row.index(max(row)) for row in at]
                classes = range(5)
                wanted = {
                    "single": at[0],
                    "max_confidence": [max(row[c] for row in at) for c in classes],
                    "max_confidence_softmax": [max(row[c] for row in probs) for c in classes],
                    "soft_voting": [sum(row[c] for row in probs) for c in classes],
                    "hard_voting": [float(votes.count(c)) for c in classes],
                }
                for how in HOW:
                    ours = found[how][b, :, y, x].tolist()
                    assert ours == pytest.approx(wanted[how], rel=1e-5), how


def test_ensembles_disagree_where_they_should():
    """Two lukewarm votes for class 0 against one that is sure of class 1, at another scale."""
    at = [[1.0, 0.5, -9.0], [1.0, 0.5, -9.0], [-30.0, -20.0, -40.0]]
    logits = [torch.tensor(row).view(1, 3, 1, 1) for row in at]
    chosen = {how: int(ensemble(logits, how).argmax(1)) for how in HOW}
    assert chosen["single"] == chosen["max_confidence"] == chosen["hard_voting"] == 0
    assert chosen["max_confidence_softmax"] == chosen["soft_voting"] == 1


def test_an_unknown_ensemble_is_refused():
    with pytest.raises(ValueError, match="'mean': choose single or max_confidence"):
        ensemble([torch.zeros(1, 2, 1, 1)], "mean")


@pytest.mark.parametrize("how", HOW)
def test_what_is_deployed_decides_as_its_scores_do(tiny, how):
    arguments = {"deploy": how, "n": 2}
    method = build_method(tiny(method="n_cps", method_args=arguments), 8).eval()
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        scores = ensemble([net(image) for net in method.students], how)
        logits = method(image)
    assert torch.equal(logits.argmax(1), scores.argmax(1)) and torch.isfinite(logits).all()
    if how == "soft_voting":
        torch.testing.assert_close(logits.softmax(1), scores / 2)


def test_a_sure_label_exceeds_the_threshold():
    logits = torch.tensor([[0.5, 0.5], [0.6, 0.4]]).log().T[None, :, :, None]
    assert sure_label(logits, 0.0).flatten().tolist() == [0, 0]
    assert sure_label(logits, 0.5).flatten().tolist() == [IGNORE, 0]
    assert sure_label(logits, 0.7).flatten().tolist() == [IGNORE, IGNORE]
