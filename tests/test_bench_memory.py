"""Bytes kept for the backward pass, against sums made by hand."""

from __future__ import annotations

import pytest

from s4lib.bench.memory import kept_for_backward


def test_the_loss_keeps_what_its_formula_needs():
    """Of cross-entropy: log-probabilities in float32, labels in int64, a mask or two."""
    kept = kept_for_backward("tiny", 8, 2, (32, 48))
    pixels = 2 * 32 * 48
    assert pixels * (8 * 4 + 8) <= kept["loss"] <= pixels * (8 * 4 + 8 + 2 + 4)
    assert min(kept.values()) > 0


def test_it_grows_with_the_batch_and_with_the_crop():
    small, batch, crop = (
        kept_for_backward("tiny", 8, *size)
        for size in ((2, (32, 32)), (4, (32, 32)), (2, (64, 64)))
    )
    for part in small:
        assert batch[part] == pytest.approx(2 * small[part], rel=0.05), part
        assert crop[part] == pytest.approx(4 * small[part], rel=0.15), part
