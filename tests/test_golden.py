"""Parity with arrays measured by running the authors' own code (../shared/reference/golden)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import GRADIENT, LOSS
from torch import Tensor, nn
from torch.distributions import Beta

from s4lib.losses import ce, mse, ohem, pseudo_label
from s4lib.method import Clock, ema
from s4lib.metrics import confusion, iou, miou
from s4lib.mixing import (
    Mix,
    classmix,
    cutmix,
    cutmix_beta,
    cutmix_half,
    cutmix_small,
    cutmix_xor,
    paint,
)
from s4lib.schedules import cosine, linear_warmup, poly, ramp_up, warm_decay


@pytest.fixture
def replay(monkeypatch):
    """Make the next calls of `owner.name`, say torch.rand, return recorded draws."""

    def give(owner: object, name: str, *draws: Tensor) -> None:
        queue = [draw if draw.dtype == torch.int64 else draw.float() for draw in draws]

        def draw(*shape):
            assert name != "rand" or queue[0].shape == shape
            return queue.pop(0)

        monkeypatch.setattr(owner, name, draw)

    return give


def chosen(value: Tensor, low: float, high: float | Tensor) -> Tensor:
    """What torch.rand has to return so that `value` is drawn from the integers in [low, high)."""
    return (value - low + 0.5) / (high - low)


@pytest.mark.parametrize(("data", "classes"), [("voc", 21), ("city", 19)])
def test_miou_is_that_of_u2pl(golden, data, classes):
    """miou.npz: intersectionAndUnion, absent classes count as zero; counts exact, 1e-9."""
    g = golden("miou.npz")
    matrix = confusion(g[f"{data}_pred"], g[f"{data}_label"], classes)
    assert torch.equal(matrix.diag(), g[f"{data}_inter"])
    assert torch.equal(matrix.sum(1), g[f"{data}_target"])
    assert torch.equal(matrix.sum(0) + matrix.sum(1) - matrix.diag(), g[f"{data}_union"])
    torch.testing.assert_close(
        iou(matrix).nan_to_num(0) / 100, g[f"{data}_iou"], rtol=1e-9, atol=1e-9
    )
    assert miou(matrix, absent="zero") / 100 == pytest.approx(float(g[f"{data}_miou"]), abs=1e-9)
    assert miou(matrix) > miou(matrix, absent="zero")  # class 4 is absent


def test_miou_is_that_of_st_plus_plus(golden):
    """stpp_miou.npz: meanIOU, absent classes left out; 1e-5."""
    g = golden("stpp_miou.npz")
    matrix = confusion(g["pred"].long(), g["gt"].long(), int(g["num_classes"]))
    assert miou(matrix) / 100 == pytest.approx(float(g["miou"]), rel=1e-5)
    torch.testing.assert_close(iou(matrix).float() / 100, g["iou"], equal_nan=True, **LOSS)


def test_miou_is_that_of_unimatch(golden):
    """unimatch_miou.npz: accumulated over images, absent class 5 counts as zero, percent; 1e-5."""
    g = golden("unimatch_miou.npz")
    pairs = zip(g["pred"].long(), g["gt"].long(), strict=True)
    matrices = [confusion(pred, truth, int(g["nclass"])) for pred, truth in pairs]
    for matrix, counts in zip(matrices, g["per_image_inter_union_target"], strict=True):
        union = matrix.sum(0) + matrix.sum(1) - matrix.diag()
        assert torch.equal(torch.stack([matrix.diag(), union, matrix.sum(1)]), counts)
    whole = sum(matrices)
    torch.testing.assert_close(iou(whole).nan_to_num(0).float(), g["iou_class"], **LOSS)
    assert miou(whole, absent="zero") == pytest.approx(float(g["mIoU"]), rel=1e-5)


def test_mean_teacher_loss_is_that_of_torchsemiseg(golden):
    """mt_loss.npz: squared difference, mean over classes, weight 100; losses 1e-5, gradients 1e-4.

    Their consistency covers the labeled images too, and equal batches make the mean of two means.
    """
    g = golden("mt_loss.npz")
    sup_logits = g["student_sup"].requires_grad_()
    unsup_logits = g["student_unsup"].requires_grad_()
    sup = ce(sup_logits, g["target"])
    logits = torch.cat([sup_logits, unsup_logits])
    probs = torch.cat([g["teacher_sup"], g["teacher_unsup"]]).softmax(1)
    cons = float(g["unsup_weight"]) * mse(logits, probs, classes="mean")
    torch.testing.assert_close(sup.detach(), g["loss_sup"], **LOSS)
    torch.testing.assert_close(cons.detach(), g["csst_loss_weighted"], **LOSS)
    torch.testing.assert_close((sup + cons).detach(), g["total"], **LOSS)
    (sup + cons).backward()
    torch.testing.assert_close(sup_logits.grad, g["grad_student_sup"], **GRADIENT)
    torch.testing.assert_close(unsup_logits.grad, g["grad_student_unsup"], **GRADIENT)


def test_cutmix_seg_loss_is_that_of_french_et_al(golden):
    """cutmixseg_mt_loss.npz, var_batchmean_conf: sum over classes, share of sure pixels; 1e-5.

    Theirs divides by all pixels, ours by the valid ones, so that padding does not weaken it.
    """
    g = golden("cutmixseg_mt_loss.npz")
    logits, valid = g["student_logits"].requires_grad_(), g["valid_mask"][:, 0] > 0
    _, confidence = pseudo_label(g["teacher_logits"])
    share = (confidence >= g["conf_thresh"]).float().mean()
    torch.testing.assert_close(share, g["conf_rate"], **LOSS)
    ours = mse(logits, g["teacher_logits"].softmax(1), valid=valid, classes="sum") * share
    theirs = ours * valid.float().mean()
    torch.testing.assert_close(theirs.detach(), g["var_batchmean_conf_loss"], **LOSS)
    theirs.backward()
    torch.testing.assert_close(logits.grad, g["var_batchmean_conf_grad"], **GRADIENT)
    assert 0 < valid.float().mean() < 1


def filled(net: nn.Module, arrays: dict, prefix: str) -> nn.Module:
    net.load_state_dict({key: arrays[f"{prefix}.{key}"] for key in net.state_dict()})
    return net


def test_ema_that_keeps_buffers_is_that_of_torchsemiseg(golden):
    """mt_ema.npz: parameters averaged, BN statistics of the teacher its own; 1e-7."""
    g = golden("mt_ema.npz")

    def net(prefix: str) -> nn.Module:
        return filled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), g, prefix)

    teacher = net("teacher_before")
    ema(teacher, net("student"), float(g["decay_f64"]), "keep")
    for key, value in net("teacher_after").state_dict().items():
        torch.testing.assert_close(teacher.state_dict()[key], value, rtol=1e-6, atol=1e-7)


class Block(nn.Module):
    """The networks of psmt_ema.npz."""

    def __init__(self, inputs: int):
        super().__init__()
        self.c, self.bn, self.k = (
            nn.Conv2d(inputs, 4, 3, bias=False),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 2, 1),
        )


@pytest.mark.parametrize("part", ["enc", "dec"])
def test_ema_that_averages_buffers_is_that_of_ps_mt(golden, part):
    """psmt_ema.npz: parameters and BN statistics averaged; 1e-7.

    Their counter num_batches_tracked is averaged and truncated, ours copied: nothing reads it.
    """
    g = golden("psmt_ema.npz")
    inputs = g[f"student_{part}.c.weight"].shape[1]
    teacher, student, after = (
        filled(Block(inputs), g, f"{who}_{part}{when}")
        for who, when in (("teacher", "_before"), ("student", ""), ("teacher", "_after"))
    )
    ema(teacher, student, float(g["keep_rate_f64"]), "ema")
    for key, value in after.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            torch.testing.assert_close(teacher.state_dict()[key], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["u2pl_ema_teacher.npz", "gta_ema_encoder.npz"])
def test_decay_warm_up_is_that_of_u2pl_and_gta_seg(golden, name):
    """min(1 - 1/(k + 1), cap) at step counts from 0 to 5000; decays exact, weights 1e-6."""
    g = golden(name)
    decays = [warm_decay(float(g["alpha"]), int(k)) for k in g["ks"]]
    assert decays == pytest.approx(g["decays"].tolist(), abs=1e-12)
    source = nn.ParameterList([g["source"]])
    for decay, after in zip(decays, g["after"], strict=True):
        target = nn.ParameterList([g["before"].clone()])
        ema(target, source, decay)
        moved = (
            after != g["before"] if name.startswith("gta") else torch.ones_like(after, dtype=bool)
        )
        assert moved.float().mean() > 0.5  # GTA-Seg leaves its classifier alone
        torch.testing.assert_close(target[0].detach()[moved], after[moved], **LOSS)


def test_a_restarting_counter_copies_the_student_as_dual_teacher_does(golden):
    """dual_ema.npz: the released code's trajectory over one counter; parameters 1e-5."""
    g = golden("dual_ema.npz")
    teacher = nn.ParameterList([g["teacher_init"].clone()])
    student = nn.ParameterList([g["student_init"].clone()])
    with torch.no_grad():
        for step, wanted in enumerate(g["teacher_w_and_buffer_traj"]):
            student[0] += g["student_step"]
            ema(teacher, student, warm_decay(float(g["alpha"]), step))
            torch.testing.assert_close(teacher[0].detach(), wanted[:2], rtol=1e-5, atol=1e-5)


def test_poly_is_that_of_u2pl(golden):
    """poly_lr.npz: lr_used of two groups; rtol 1e-9."""
    g = golden("poly_lr.npz")
    steps = int(g["epochs"] * g["iters_per_epoch"])
    ours = [
        [float(b) * poly(i / steps, float(g["power"])) for b in g["base_lr"]] for i in range(steps)
    ]
    np.testing.assert_allclose(ours, g["lr_used"].numpy(), rtol=1e-9)


def test_poly_is_that_of_cps(golden):
    """poly_lr_cps.npz: WarmUpPolyLR, without and with 5 steps of warm-up; atol 1e-12.

    Their warm-up begins at 0, which loses a step, and leaves the decay out; CPS has none.
    """
    g = golden("poly_lr_cps.npz")
    steps, rise = int(g["total_iters"]), 5
    decayed = np.array([0.01 * poly(i / steps) for i in range(steps)])
    np.testing.assert_allclose(decayed, g["lr_f64"].numpy(), rtol=0, atol=1e-12)
    warm = g["lr_warm5_f64"].numpy()
    rising = [0.01 * linear_warmup(Clock(i, steps, 1), rise / steps) for i in range(rise - 1)]
    assert warm[0] == 0
    np.testing.assert_allclose(warm[1:rise], rising, rtol=0, atol=1e-12)
    np.testing.assert_allclose(warm[rise:], decayed[rise:], rtol=0, atol=1e-12)


def test_poly_is_that_of_ps_mt(golden):
    """poly_lr_psmt.npz; atol 1e-12."""
    g = golden("poly_lr_psmt.npz")
    ours = [0.01 * poly(i / 28) for i in range(28)]
    np.testing.assert_allclose(ours, g["lr_used_at_iter_f64"].numpy(), rtol=0, atol=1e-12)
    assert 0.01 * poly(1.0) == float(g["lr_after_last_f64"])


def test_ramps_are_those_of_ps_mt(golden):
    """psmt_rampup.npz: sigmoid_rampup and cosine_rampup, 12 of 15 epochs; atol 1e-7."""
    g = golden("psmt_rampup.npz")
    per_epoch, rise = int(g["iters_per_epoch"]), int(g["rampup_epochs"])
    epochs = len(g["iteration"]) // per_epoch
    clocks = [Clock(int(i), per_epoch, epochs) for i in g["iteration"]]
    for name, ours in (
        ("sigmoid", [ramp_up(clock, rise / epochs) for clock in clocks]),
        ("cosine", [cosine(clock.step / (rise * per_epoch)) for clock in clocks]),
    ):
        theirs = g[f"{name}_rampup_f64"].numpy()
        np.testing.assert_allclose(1.5 * np.array(ours), theirs, rtol=0, atol=1e-7)


@pytest.mark.parametrize("case", ["a", "b", "c", "d"])
def test_ohem_is_that_of_cps_and_ps_mt(golden, case):
    """ohem.npz: ProbOhemCrossEntropy2d; loss 1e-5, kept pixels exact, gradient 1e-4."""
    g = golden("ohem.npz")
    logits = g["logits"].requires_grad_()
    threshold, least = float(g[f"{case}_thresh"]), int(g[f"{case}_min_kept"])
    loss = ohem(logits, g["target"], threshold, least)
    torch.testing.assert_close(loss.detach(), g[f"{case}_loss"], **LOSS)
    loss.backward()
    kept = logits.grad.abs().sum(1) > 0
    assert torch.equal(kept, g[f"{case}_kept_mask"]) and kept.any()
    if case == "a":
        torch.testing.assert_close(logits.grad, g["a_grad"], **GRADIENT)


@pytest.mark.parametrize("least", [100, 500, 100_000])
def test_ohem_is_that_of_u2pl(golden, least):
    """u2pl_ohem.npz: OhemCrossEntropy2dTensor, threshold 0.7; loss and sum of |gradient| 1e-5."""
    g = golden("u2pl_ohem.npz")
    logits = g["pred"].requires_grad_()
    loss = ohem(logits, g["target"], 0.7, least)
    torch.testing.assert_close(loss.detach(), g[f"min_kept{least}_loss"], **LOSS)
    loss.backward()
    torch.testing.assert_close(logits.grad.abs().sum(), g[f"min_kept{least}_gradsum"], **LOSS)


def test_the_supervised_losses_are_those_of_u2pl(golden):
    """u2pl_ohem.npz: cross-entropy, and OHEM with an auxiliary head of weight 0.4; 1e-5."""
    g = golden("u2pl_ohem.npz")
    main, aux = (ohem(g[name], g["target"], 0.7, 500) for name in ("pred", "aux"))
    torch.testing.assert_close(main + 0.4 * aux, g["criterion_ohem_aux0.4_min_kept500"], **LOSS)
    torch.testing.assert_close(ce(g["pred"], g["target"]), g["criterion_ce"], **LOSS)


def test_cutmix_half_is_that_of_u2pl(golden, replay):
    """u2pl_cutmix.npz: generate_unsup_data, recorded draws of width, left, top; exact."""
    g = golden("u2pl_cutmix.npz")
    low, high, value = g["cutmix_draws_lo_hi_val"].unbind(2)
    width, left, top = chosen(value, low.floor(), high).T
    replay(torch, "rand", torch.stack([width, top, left], 1), torch.tensor([0.4]))
    mix = cutmix_half(g["data"])
    y0, x0, y1, x1 = g["cutmix_boxes_y0x0y1x1"].T
    assert torch.equal(mix.mask, paint(y0, x0, y1 - y0, x1 - x0, g["data"]))
    for name in ("data", "target", "logits"):
        assert torch.equal(mix(g[name]), g[f"cutmix_{name}"])


def test_classmix_is_that_of_u2pl(golden, replay):
    """u2pl_cutmix.npz: generate_unsup_data, recorded classes; exact."""
    g = golden("u2pl_cutmix.npz")
    replay(torch, "rand", torch.full((3, 256), 0.9).scatter(1, g["classmix_selected"], 0.1))
    mix = classmix(g["target"])
    for name in ("data", "target", "logits"):
        assert torch.equal(mix(g[name]), g[f"classmix_{name}"])


def test_classmix_is_that_of_its_authors(golden, replay):
    """classmix_mask.npz: generate_class_mask, mix and losses; masks exact, losses 1e-5."""
    g = golden("classmix_mask.npz")
    label, picked = g["argmax"].long(), g["chosen_classes"]
    draws = torch.full((3, 256), 0.9).scatter(1, picked.where(picked >= 0, 255), 0.1)
    replay(torch, "rand", draws)
    mix = classmix(label)
    assert torch.equal(~mix.mask, g["mask"] > 0)
    assert torch.equal(mix(g["img"]), g["mixed_img"])
    confidence, pseudo = mix(g["softmax_weak"]).max(1)
    assert torch.equal(pseudo, g["pseudo_label"].long()) and torch.equal(pseudo, mix(label))
    sure = (confidence >= g["threshold"]).float()
    torch.testing.assert_close(sure.mean(), g["uniform_weight"], **LOSS)
    uniform = sure.mean() * ce(g["student_logits"], pseudo)
    torch.testing.assert_close(uniform, g["loss_u_threshold_uniform"], **LOSS)
    pixelwise = ce(g["student_logits"], pseudo, weight=sure, over="all")
    torch.testing.assert_close(pixelwise, g["loss_u_threshold"], **LOSS)


def test_cutmix_beta_is_that_of_dual_teacher(golden, replay):
    """dual_cutmix.npz: cut_mixer, recorded share, centres, partners; exact."""
    g = golden("dual_cutmix.npz")
    replay(Beta, "sample", g["draws_lam"][0])
    replay(torch, "rand", chosen(g["draws_cx_cy"].T, 40 // 8, 40))
    replay(torch, "randperm", g["perm"])
    mix = cutmix_beta(g["mix_data"])
    top, left, bottom, right = g["bbox_x1y1x2y2"]
    assert torch.equal(mix.mask, paint(top, left, bottom - top, right - left, g["mix_data"]))
    assert torch.equal(mix(g["mix_data"]), g["mixed_data"])
    assert torch.equal(mix(g["mix_target"]), g["mixed_target"])


def test_cutmix_beta_is_that_of_ps_mt(golden, replay):
    """psmt_cutmix_voc.npz: rand_bbox_1 at five shares with the same centres, cut_mix; exact.

    The centres are read off the smallest boxes, of which the last one is cut off at the right.
    """
    g = golden("psmt_cutmix_voc.npz")
    like = g["cm_images"]
    size = torch.tensor(like.shape[-2:])
    low, high = g["boxes_for_lams_seed11"][-1].view(4, 2, 2).unbind(2)
    half = (size / 2 * (1 - g["lam_list"][-1]).sqrt()).floor().long()
    centre = torch.where(high == size, low + half, high - half)
    for share, boxes in zip(g["lam_list"], g["boxes_for_lams_seed11"], strict=True):
        replay(Beta, "sample", share)
        replay(torch, "rand", chosen(centre, size // 8, size))
        top, bottom, left, right = boxes.T
        assert torch.equal(
            cutmix_beta(like).mask, paint(top, left, bottom - top, right - left, like)
        )
    top, bottom, left, right = g["cm_boxes_r0r1c0c1"].T
    mix = Mix(paint(top, left, bottom - top, right - left, like), g["cm_perm"])
    assert torch.equal(mix(like), g["cm_mixed_images"])
    assert torch.equal(mix(g["cm_targets"]), g["cm_mixed_targets"])


def cps_draws(seed: int, size: tuple[int, int], boxes: int, area: tuple[float, float]) -> Tensor:
    """BoxMaskGenerator's draws for 4 images, in our order and with places as ours are drawn.

    It rounds a place, so that the border is half as likely as with us: the place is what counts.
    """
    rng = np.random.RandomState(seed)
    share, high = rng.uniform(*area, (4, boxes)), rng.uniform(size=(4, boxes))
    height = share**high
    sides = np.stack([height, share / height], 2) / np.sqrt(boxes)
    room = size - np.round(sides * size)
    place = chosen(np.round(room * rng.uniform(size=(4, boxes, 2))), 0, room + 1)
    u = (share - area[0]) / max(area[1] - area[0], 1e-9)
    return torch.from_numpy(np.concatenate([u[..., None], high[..., None], place], 2))


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_cutmix_xor_is_that_of_cps(golden, replay, seed):
    """cps_cutmix_masks.npz: BoxMaskGenerator, three boxes, numpy's seeds 0 to 3; exact."""
    g = golden("cps_cutmix_masks.npz")
    name = next(key for key in g if key.startswith(f"seed{seed}_") and key.endswith("_bits"))
    size = tuple(int(side) for side in name.split("_")[1].split("x"))
    replay(torch, "rand", cps_draws(seed, size, 3, (0.25, 0.5)))
    mask = cutmix_xor(torch.zeros(4, *size)).mask
    assert np.array_equal(np.packbits(mask.flatten(1).numpy(), axis=1), g[name].numpy())


def test_cutmix_is_that_of_french_et_al(golden, replay):
    """cps_cutmix_masks.npz, one_box_half_seed5_64x64: one box of area 0.5; exact."""
    g = golden("cps_cutmix_masks.npz")
    replay(torch, "rand", cps_draws(5, (64, 64), 1, (0.5, 0.5)))
    mask = cutmix(torch.zeros(4, 64, 64)).mask
    theirs = g["one_box_half_seed5_64x64_bits"].numpy()
    assert np.array_equal(np.packbits(mask.flatten(1).numpy(), axis=1), theirs)


def test_cutmix_small_is_that_of_unimatch(golden, replay):
    """unimatch_cutmix_box.npz: obtain_cutmix_box at 81 pixels, recorded draws and tries; exact."""
    g = golden("unimatch_cutmix_box.npz")
    gate, area, ratio, x, y, tries = g["draws"].nan_to_num(0.5).T
    ratio = (ratio - 0.3) / (1 / 0.3 - 0.3)
    last = torch.stack([ratio, chosen(y, 0, 81), chosen(x, 0, 81)], 1)
    u = torch.full((len(gate), 128, 3), 0.999)  # a box in the corner never fits ...
    for image, number in enumerate(tries.int().clamp(min=1)):
        u[image, number - 1 :] = last[image]  # ... before the recorded one
    replay(torch, "rand", u, torch.stack([gate, (area - 0.02) / 0.38], 1))
    mix = cutmix_small(torch.zeros(len(gate), 81, 81))
    assert torch.equal(mix.mask, g["masks"] > 0)
    assert (tries > 1).any() and (tries == 0).any()
