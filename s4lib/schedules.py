"""Schedules are functions of the clock, so there is nothing to store and nothing to restore."""

from __future__ import annotations

import math

from .method import Clock


def poly(progress: float, power: float = 0.9) -> float:
    """Learning-rate factor (1 - progress) ** power, the field's default (Chen et al., DeepLab)."""
    return (1 - progress) ** power


def linear_warmup(clock: Clock, share: float) -> float:
    """Learning-rate factor that rises to 1 over the first `share` of the steps; 0 switches it off.

    Its first value is above zero, so that no step is lost.
    """
    return min(1.0, (clock.step + 1) / max(1.0, share * clock.steps))


def ramp_up(clock: Clock, share: float) -> float:
    """Weight factor exp(-5 (1 - t)^2), t running from 0 to 1 over the first `share` of the steps.

    The Gaussian ramp-up of Laine and Aila (2017), used by Mean Teacher. `share` 0 switches it off.
    """
    if share <= 0:
        return 1.0
    return math.exp(-5 * (1 - min(1.0, clock.progress / share)) ** 2)


def warm_decay(decay: float, step: int) -> float:
    """EMA decay min(1 - 1 / (step + 1), decay): at first a plain mean of the students.

    `step` counts from where averaging began. Passing a counter that restarts copies the student
    over the teacher again (step 0 gives decay 0); Dual Teacher's released code does so every epoch.
    """
    return min(1 - 1 / (step + 1), decay)
