"""Supervised-only: cross-entropy on the labeled images, the floor every method must beat.

It comes twice in our tables: with the batch of labeled images that the others see, and as a
*control* with as many images per step as a semi-supervised method sees in all (`batch` doubled),
for a fair comparison of compute.
"""

from __future__ import annotations

from ..method import Method


class Supervised(Method):
    """Supervised-only: cross-entropy on labeled images."""

    uses_unlabeled = False

    def setup(self, build):
        self.student = build()

    def step(self, batch, clock, minimize):
        sup = self.criterion(self.student(batch.image), batch.label)
        minimize(sup, self.student)
        return {"sup": sup.detach()}
