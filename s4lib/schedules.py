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
    """`gaussian` over the first `share` of the training, as in Mean Teacher; 0 switches it off."""
    return gaussian(clock.progress / share) if share > 0 else 1.0


def gaussian(x: float, k: float = 5.0) -> float:
    """Weight factor exp(-k (1 - x)^2), which reaches 1 at x = 1 and stays there.

    `x` is the part of the rise that lies behind, in steps or in epochs; below 0 it counts as 0.
    Laine and Aila (2017), k = 5; released codes call it a sigmoid. PS-MT's supplementary shows it,
    and GPS's exp(-1 - x)^2, which falls, is most likely a misprint of it with k = 1.
    """
    return math.exp(-k * (1 - min(max(x, 0.0), 1.0)) ** 2)


def cosine(x: float) -> float:
    """Weight factor (1 - cos(pi x)) / 2, from 0 to 1; `x` as in `gaussian`.

    What PS-MT's code runs (PS-MT@058cdc3, ConsistencyWeight) where its supplementary shows the
    Gaussian.
    """
    return (1 - math.cos(math.pi * min(max(x, 0.0), 1.0))) / 2


def logarithmic(x: float, k: float = 5.0) -> float:
    """Weight factor 1 - exp(-k x), from 0 to 0.993; `x` as in `gaussian`.

    CCT's code (ramps.py, log_rampup) lets the threshold of its supervised loss rise by it.
    """
    return 1 - math.exp(-k * min(max(x, 0.0), 1.0))


def gps_printed(x: float) -> float:
    """Weight factor exp(-1 - x)^2, GPS's Algorithm 1, line 4, to the letter: it falls."""
    return math.exp(-1 - x) ** 2


def warm_decay(decay: float, step: int) -> float:
    """EMA decay min(1 - 1 / (step + 1), decay): at first a plain mean of the students.

    `step` counts from where averaging began. Passing a counter that restarts copies the student
    over the teacher again (step 0 gives decay 0); Dual Teacher's released code does so every epoch.
    """
    return min(1 - 1 / (step + 1), decay)
