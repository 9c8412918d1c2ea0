"""U2PL: the released functions' numbers, its contrast written naively, memory, switches."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import GRADIENT, LOSS, equal

from s4lib.build import build_method
from s4lib.contrast import entropy, entropy_split, onehot, pixels, prototype_nce, u2pl_samples
from s4lib.losses import IGNORE, ce, confidence_weight, ignore_unsure
from s4lib.memory import Bank, buffers, channels, place
from s4lib.method import Batch, Clock
from s4lib.methods.u2pl import U2PL
from s4lib.minimizer import Minimizer

K, D, B = 5, 8, 4  # of what follows: classes, width, images, half of them labeled


@pytest.mark.parametrize("epoch", [0, 1, 40, 79])
def test_the_unlabeled_loss_is_that_of_the_released_code(golden, epoch):
    """u2pl_unsup_loss.npz: share, threshold, labels exact; loss 1e-5, gradient 1e-4."""
    g = golden("u2pl_unsup_loss.npz")
    predict, unsure = g["predict"].requires_grad_(), entropy(g["teacher"])
    share = U2PL.drop * (1 - epoch / 80)
    assert 100 * (1 - share) == pytest.approx(float(g[f"e{epoch}_percent"]))
    label, _ = ignore_unsure(g["target"], -unsure, share)
    assert torch.equal(label, g[f"e{epoch}_target_after"])
    assert unsure[label != IGNORE].max() < g[f"e{epoch}_thresh"] + 1e-6
    loss = ce(predict, label, weight=confidence_weight(label, unsure, "none", "inv_kept"))
    torch.testing.assert_close(loss.detach(), g[f"e{epoch}_loss"], **LOSS)
    if epoch == 1:
        loss.backward()
        torch.testing.assert_close(predict.grad, g["e1_grad"], **GRADIENT)


def test_one_hot_labels_are_right_or_those_of_the_released_code(golden):
    """u2pl_label_onehot.npz; exact."""
    g = golden("u2pl_label_onehot.npz")
    assert torch.equal(onehot(g["inputs"], K, merged=True), g["official"] > 0)
    assert torch.equal(onehot(g["inputs"], K), g["correct"] > 0)


# The contrastive loss. `case` has the arguments of a golden file, `contrast` is ours on them.


def contrast(g: dict, queue_of: str, negatives: str = "alike"):
    """(loss, gradient, bank) of ours for the arrays of u2pl_contra_*.npz."""
    rep = g["rep"].clone().requires_grad_()
    label = torch.cat([g["label_l"], g["label_u"]]) > 0
    masks = (g[f"{name}_mask"][:, 0] > 0 for name in ("low", "high"))
    ranks = int(g["cfg_low_rank"]), int(g["cfg_high_rank"])
    probs = torch.cat([g["prob_l"], g["prob_u"]])
    labeled = len(g["label_l"])
    samples = u2pl_samples(label, probs, *masks, labeled, ranks=ranks, negatives=negatives)
    bank = Bank(**buffers(g["queue_size"].tolist(), rep.shape[1]))
    for c, start in enumerate(bank.start.tolist()):
        old = g[f"bank0_{c}"]
        bank.keys[start : start + len(old)] = old
        bank.seen[c] = len(old)
    bank.push(pixels(g["rep_teacher"]), samples.negatives)
    temperature = float(g["cfg_temperature"])
    loss = prototype_nce(rep, g["rep_teacher"], samples, bank, *draws(g), temperature, queue_of)
    loss.backward()
    return loss.detach(), rep.grad, bank, samples


def draws(g: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Recorded indices of the classes that have a term, as uniform draws: official terms' order."""
    q, m = int(g["cfg_num_queries"]), int(g["cfg_num_negatives"])
    classes = len(g["queue_size"])
    u_anchor, u_negative = torch.full((classes, q), 0.5), torch.full((classes, q, m), 0.5)
    terms = official_terms(g)
    assert 2 * len(terms) == int(g["n_draws"])
    for i, (c, _) in enumerate(terms):
        for into, j in ((u_anchor, 2 * i), (u_negative, 2 * i + 1)):
            u = (g[f"draw{j}"] + 0.5) / g[f"draw{j}_high"]
            into[c] = u.view(into[c].shape)
    return u_anchor, u_negative


def official_terms(g: dict) -> list[tuple[int, int]]:
    """(class of the anchors, class of the memory) of each term of the released loop."""
    low = g["low_mask"] > 0
    label = (torch.cat([g["label_l"], g["label_u"]]) > 0) & low
    probs = torch.cat([g["prob_l"], g["prob_u"]])
    anchors = (label & (probs > 0.3)).sum((0, 2, 3))
    valid = [c for c in range(label.shape[1]) if label[:, c].any()]
    size = [len(g[f"bank1_{c}"]) for c in range(label.shape[1])]
    return [(i, c) for i, c in enumerate(valid) if anchors[i] > 0 and size[c] > 0]


def assert_memories(bank: Bank, g: dict) -> None:
    for c in range(len(bank.seen)):
        wanted = g[f"bank1_{c}"]
        assert bank.size[c] == len(wanted)
        u = (torch.arange(len(wanted)) + 0.5)[None] / len(wanted)
        assert torch.equal(bank.rows(torch.tensor([c]), u)[0], wanted)


@pytest.mark.parametrize("queue_of", ["class", "place"])
def test_the_contrast_is_that_of_the_released_code(golden, queue_of):
    """u2pl_contra_all.npz: memories exact, loss 1e-5, gradient 1e-4. No class is missing."""
    g = golden("u2pl_contra_all.npz")
    loss, gradient, bank, samples = contrast(g, queue_of)
    assert_memories(bank, g)
    assert samples.negatives.sum(1).tolist() == g["new_keys"].tolist()
    torch.testing.assert_close(loss, g["loss"], **LOSS)
    torch.testing.assert_close(gradient, g["grad_rep"], **GRADIENT)


def test_with_a_missing_class_the_released_mix_up_is_reproduced_and_only_on_request(golden):
    """u2pl_contra_missing.npz: "place" equals it as above, "class" must not."""
    g = golden("u2pl_contra_missing.npz")
    loss, gradient, bank, _ = contrast(g, "place")
    assert_memories(bank, g)
    torch.testing.assert_close(loss, g["loss"], **LOSS)
    torch.testing.assert_close(gradient, g["grad_rep"], **GRADIENT)
    corrected, other, _, _ = contrast(g, "class")
    assert abs(corrected - g["loss"]) > 1e-3
    assert not torch.allclose(other, g["grad_rep"], rtol=1e-2, atol=1e-4)


def world(missing: tuple[int, ...], seed: int = 0) -> dict:
    """Random arguments of the contrast in which some classes are nobody's label."""
    t = torch.Generator().manual_seed(seed)
    there = torch.tensor([c for c in range(K) if c not in missing])
    label = there[torch.randint(len(there), (B, 6, 6), generator=t)]
    label[0, :2], label[3, 4:] = IGNORE, IGNORE
    probs = (2 * torch.randn(B, K, 6, 6, generator=t)).softmax(1)
    low, high = (torch.rand(2, B, 6, 6, generator=t) < 0.7) & (label != IGNORE)
    low[:2] = high[:2] = label[:2] != IGNORE
    rep, rep_teacher = torch.randn(2, B, D, 6, 6, generator=t)
    bank = Bank(**buffers([20, 9, 9, 9, 9], D))
    for n in (3, 12):  # the second time some are full
        bank.push(torch.randn(n, D, generator=t), torch.rand(K, n, generator=t) < 0.9)
    u = torch.rand(K, 6, generator=t), torch.rand(K, 6, 4, generator=t)
    return dict(
        label=label, probs=probs, masks=(low, high), reps=(rep, rep_teacher), bank=bank, u=u
    )


def ours(w: dict, queue_of: str, negatives: str):
    w["reps"][0].requires_grad_()
    hot = onehot(w["label"], K)
    samples = u2pl_samples(hot, w["probs"], *w["masks"], 2, ranks=(1, 4), negatives=negatives)
    w["bank"].push(pixels(w["reps"][1]), samples.negatives)
    loss = prototype_nce(*w["reps"], samples, w["bank"], *w["u"], 0.5, queue_of)
    return loss, torch.autograd.grad(loss, w["reps"][0])[0]


def naive(w: dict, queue_of: str, negatives: str) -> tuple[float, torch.Tensor]:
    """The same pixel by pixel, in lists, in float64."""
    low, high = w["masks"]
    rep, rep_teacher = (x.detach().double().movedim(1, -1) for x in w["reps"])
    rep.requires_grad_()
    probs, label = w["probs"].movedim(1, -1), w["label"]
    bank, u_anchor, u_negative = w["bank"], *w["u"]
    memories = []
    for c in range(K):
        there = (torch.arange(int(bank.size[c])) + 0.5)[None] / bank.size[c]
        memories.append(list(bank.rows(torch.tensor([c]), there)[0].double()))
    members, anchors = [[] for _ in range(K)], [[] for _ in range(K)]
    for b in range(B):
        for y in range(6):
            for x in range(6):
                p, mine = probs[b, y, x], int(label[b, y, x])
                order = p.argsort(descending=True).tolist()
                for c in range(K):
                    rank = order.index(c)
                    unlikely = 1 <= rank < 4 if b >= 2 else rank < 1 and mine != c
                    if negatives == "alike":
                        unlikely = unlikely and mine == c
                    if unlikely and high[b, y, x]:
                        memories[c].append(rep_teacher[b, y, x])
                    if mine == c and low[b, y, x]:
                        members[c].append(rep_teacher[b, y, x])
                        if p[c] > 0.3:
                            anchors[c].append(rep[b, y, x])
    memories = [m[-int(n) :] for m, n in zip(memories, bank.lengths, strict=True)]
    valid = [c for c in range(K) if members[c]]
    total = 0
    for i, memory_of in enumerate(valid):
        c = memory_of if queue_of == "class" else i
        if not anchors[c] or not memories[memory_of]:
            continue
        mean = torch.stack(members[c]).mean(0)
        for q in range(6):
            anchor = anchors[c][int(u_anchor[c, q] * len(anchors[c]))]
            memory = memories[memory_of]
            keys = [memory[int(u * len(memory))] for u in u_negative[c, q]]
            near = torch.stack([F.cosine_similarity(anchor, k, dim=0) for k in [mean, *keys]]) / 0.5
            total = total + (near.logsumexp(0) - near[0]) / 6
    loss = total / len(valid) if len(valid) > 1 else 0 * rep.sum()
    return loss.item(), torch.autograd.grad(loss, rep)[0].movedim(-1, 1).float()


@pytest.mark.parametrize("missing", [(), (1,), (0, 3), (4,), (0, 1, 2, 3)])
@pytest.mark.parametrize("queue_of", ["class", "place"])
@pytest.mark.parametrize("negatives", ["unlike", "alike"])
def test_the_contrast_is_what_lists_and_loops_give(missing, queue_of, negatives):
    wanted, wanted_gradient = naive(world(missing), queue_of, negatives)
    loss, gradient = ours(world(missing), queue_of, negatives)
    assert loss.item() == pytest.approx(wanted, rel=1e-5)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-4, atol=1e-6)
    assert (wanted == 0) == (len(missing) == 4)


def test_the_mix_up_changes_the_loss_if_and_only_if_a_class_before_the_last_is_missing():
    for missing, same in (((), True), ((4,), True), ((1,), False), ((0, 3), False)):
        losses = [ours(world(missing), kind, "unlike")[0] for kind in ("class", "place")]
        assert (abs(losses[0] - losses[1]) < 1e-6) == same, missing


def test_by_place_the_last_class_never_is_an_anchor_when_another_is_missing():
    for queue_of, moved in (("class", True), ("place", False)):
        w = world((1,))
        _, gradient = ours(w, queue_of, "unlike")
        here = (w["label"] == K - 1) & w["masks"][0]
        assert (gradient.movedim(1, -1)[here].abs().sum() > 0) == moved


def test_autocast_does_not_round_the_contrast():
    plain, _ = ours(world(()), "class", "unlike")
    with torch.autocast("cpu", torch.bfloat16):
        mixed, _ = ours(world(()), "class", "unlike")
    assert mixed.dtype == torch.float32 and torch.equal(mixed, plain)


def test_alike_leaves_no_negative_of_a_labeled_image():
    w = world(())
    for negatives, some in (("unlike", True), ("alike", False)):
        hot = onehot(w["label"], K)
        taken = u2pl_samples(hot, w["probs"], *w["masks"], 2, ranks=(1, 4), negatives=negatives)
        assert taken.negatives.view(K, B, 36)[:, :2].any() == some


# Memory.


def test_a_ring_keeps_the_newest_of_its_class_in_their_order():
    t = torch.Generator().manual_seed(0)
    bank, lists = Bank(**buffers([4, 1, 3], 2)), [[], [], []]
    for n in (0, 2, 1, 9, 3, 5):
        new, where = torch.randn(n, 2, generator=t), torch.rand(3, n, generator=t) < 0.5
        bank.push(new, where)
        for c, kept in enumerate(lists):
            kept.extend(new[where[c]])
            del kept[: -int(bank.lengths[c])]
            assert bank.size[c] == len(kept)
            if kept:
                u = (torch.arange(len(kept)) + 0.5)[None] / len(kept)
                assert torch.equal(bank.rows(torch.tensor([c]), u)[0], torch.stack(kept))
    assert not bank.keys[-1].any()


def test_draws_reach_every_place_and_none_beyond():
    u = torch.tensor([0.0, 0.24, 0.26, 0.99, 1 - 2**-24])
    assert place(u, torch.tensor(4)).tolist() == [0, 0, 1, 3, 3]
    assert place(u, torch.tensor(30_000)).max() == 29_999
    assert place(u, torch.tensor(0)).tolist() == [0] * 5


def test_bad_lengths_and_words_are_refused():
    with pytest.raises(ValueError, match="lengths"):
        buffers([3, 0], 2)
    w = world(())
    with pytest.raises(ValueError, match="queue_of"):
        ours(w, "other", "alike")
    with pytest.raises(ValueError, match="negatives"):
        ours(w, "class", "other")


def test_entropy_is_split_by_its_quantiles_among_valid_pixels():
    unsure = torch.arange(10.0).view(1, 2, 5)
    valid = unsure > 0
    low, high = entropy_split(unsure, valid, 0.25)  # of 1 to 9: quantiles 3 and 7
    assert unsure[low].tolist() == [1, 2, 3] and unsure[high].tolist() == [7, 8, 9]


def test_entropy_is_that_of_the_softmax():
    logits = torch.randn(2, 5, 3, 3)
    p = logits.double().softmax(1)
    torch.testing.assert_close(entropy(logits), -(p * p.log()).sum(1).float())


# The method.


def method_and_batch(tiny, classes: int = 8, **changes):
    method = build_method(
        tiny(method="u2pl", method_args={"queue": 50, "queue_first": 70} | changes), classes
    )
    g = torch.Generator().manual_seed(1)
    image, weak = torch.randn(2, 4, 3, 32, 32, generator=g)
    label = (
        torch.randint(0, classes, (4, 8, 8), generator=g)
        .repeat_interleave(4, 1)
        .repeat_interleave(4, 2)
    )
    return method, Batch(image, label, weak, (), torch.ones(4, 32, 32, dtype=torch.bool))


SEMI = Clock(1, 1, 4)  # a step after the warm-up


def step(method, batch, config, clock=SEMI):
    minimizer = Minimizer(method, config, torch.device("cpu"))
    minimizer.begin(clock)
    torch.manual_seed(0)
    return method.step(batch, clock, minimizer)


def test_during_the_warm_up_the_student_learns_from_labels_and_nothing_is_remembered(tiny):
    method, batch = method_and_batch(tiny)
    found = step(method, batch, tiny(), Clock(0, 1, 4))
    assert list(found) == ["sup"] and not method.seen.any()
    assert equal(method.student.state_dict(), method.teacher.state_dict())


def test_a_step_fills_the_memory_and_learns_an_embedding(tiny):
    method, batch = method_and_batch(tiny, sure=0.1)
    head = method.student.representation[-1].weight
    before = head.clone()
    found = step(method, batch, tiny())
    assert found["contra"] > 0 and method.seen.sum() > 100
    assert found["kept"] == pytest.approx(1 - 0.2 * (1 - 1 / 4), abs=0.01)  # epoch 1 of 4
    assert (head - before).abs().max() > 1e-5
    assert channels(method.student.representation) == method.keys.shape[1] == 16


def test_without_weight_the_contrast_moves_nothing(tiny):
    method, batch = method_and_batch(tiny, contrast=0.0)
    before = method.student.representation[-1].weight.clone()
    step(method, batch, tiny(optimizer="sgd", weight_decay=0.0))
    assert torch.equal(method.student.representation[-1].weight, before)


def test_the_share_without_label_shrinks_to_nothing(tiny):
    shares = []
    for epoch in (1, 50, 99):
        method, batch = method_and_batch(tiny)
        shares.append(1 - float(step(method, batch, tiny(), Clock(epoch, 1, 100))["kept"]))
    assert shares == pytest.approx([0.198, 0.1, 0.002], abs=0.002)


def test_the_released_teacher_is_the_student_for_an_epoch_then_an_average(tiny):
    method, batch = method_and_batch(tiny, **U2PL.presets["code"])
    method.teacher.classifier[-1].weight.data.add_(1)
    before = method.student.classifier[-1].weight.clone()
    step(method, batch, tiny(), Clock(1, 1, 4))  # k = 0: decay 0
    after = method.student.classifier[-1].weight
    assert torch.equal(method.teacher.classifier[-1].weight, after) and not torch.equal(
        after, before
    )
    method.teacher.classifier[-1].weight.data.add_(1)
    teacher = method.teacher.classifier[-1].weight.clone()
    step(method, batch, tiny(), Clock(2, 1, 4))  # k = 1: decay 1/2
    wanted = (teacher + method.student.classifier[-1].weight) / 2
    torch.testing.assert_close(method.teacher.classifier[-1].weight, wanted)


def test_with_two_classes_a_class_is_unlikely_from_rank_one_on(tiny):
    method, batch = method_and_batch(tiny, classes=2)
    assert method.ranks == (1, 20)
    assert step(method, batch, tiny())["contra"] > 0
