"""Parity with arrays measured by running the authors' own code (../shared/reference/golden)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from s4lib.losses import ce, mse, pseudo_label
from s4lib.method import Clock, ema
from s4lib.metrics import confusion, iou, miou
from s4lib.schedules import poly, ramp_up, warm_decay

LOSS = {"rtol": 1e-5, "atol": 1e-6}  # tolerances of the arrays' README
GRADIENT = {"rtol": 1e-4, "atol": 1e-7}


@pytest.fixture
def golden(shared):
    """The arrays of a file: floats and labels as tensors where they are not float64."""

    def load(name: str) -> dict:
        with np.load(shared("reference", "golden", name)) as arrays:
            return {
                key: torch.from_numpy(np.asarray(arrays[key]))
                for key in arrays.files
                if arrays[key].dtype.kind in "iufb"
            }

    return load


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
        torch.testing.assert_close(target[0].detach()[moved], after[moved], rtol=1e-5, atol=1e-6)


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


def test_poly_is_that_of_ps_mt(golden):
    """poly_lr_psmt.npz; atol 1e-12."""
    g = golden("poly_lr_psmt.npz")
    ours = [0.01 * poly(i / 28) for i in range(28)]
    np.testing.assert_allclose(ours, g["lr_used_at_iter_f64"].numpy(), rtol=0, atol=1e-12)
    assert 0.01 * poly(1.0) == float(g["lr_after_last_f64"])


def test_ramp_up_is_the_gaussian_of_ps_mt(golden):
    """psmt_rampup.npz: sigmoid_rampup, 12 of 15 epochs; atol 1e-7. (Their code uses the cosine.)"""
    g = golden("psmt_rampup.npz")
    per_epoch, rise = int(g["iters_per_epoch"]), int(g["rampup_epochs"])
    epochs = len(g["iteration"]) // per_epoch
    ours = [ramp_up(Clock(int(i), per_epoch, epochs), rise / epochs) for i in g["iteration"]]
    scaled = float(g["final_w"]) * np.array(ours)
    np.testing.assert_allclose(scaled, g["sigmoid_rampup_f64"].numpy(), rtol=0, atol=1e-7)
    assert np.abs(scaled - g["cosine_rampup_f64"].numpy()).max() > 0.1
