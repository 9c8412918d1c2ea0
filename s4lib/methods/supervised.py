"""Supervised-only: cross-entropy on the labeled images, the floor every method must beat.

It comes twice in our tables: with the batch of labeled images that the others see, and as a
*control* with as many images per step as a semi-supervised method sees in all (`batch` doubled),
for a fair comparison of compute.
"""

from __future__ import annotations

from typing import Literal

from ..method import Method


class Supervised(Method):
    """Supervised-only: cross-entropy on labeled images."""

    view: Literal["weak", "strong"] = "weak"  # what it sees of labeled images: strong as PS-MT does

    uses_unlabeled = False
    presets = {"paper": {}, "strong": {"view": "strong"}}

    def setup(self, build):
        self.student = build()
        self.labeled_strong = self.view == "strong"

    def step(self, batch, clock, minimize):
        image = batch.image_strong if self.labeled_strong else batch.image
        sup = self.criterion(self.student(image), batch.label)
        minimize(sup, self.student)
        return {"sup": sup.detach()}
