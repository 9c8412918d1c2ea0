"""Passes are counted by running a step: known methods have the numbers that their papers imply."""

from __future__ import annotations

import re

import pytest
import torch

from s4lib.methods import METHODS
from s4lib.passes import citation, passes


@pytest.mark.parametrize(
    ("name", "preset", "expected"),
    [
        ("supervised", "paper", (1, 0, 1)),
        ("mean_teacher", "paper", (2, 1, 2)),  # labeled and unlabeled; the teacher's targets
        ("gta_seg", "paper", (2, 1, 2)),  # teacher; assistant; student
        ("ps_mt", "paper", (2, 2, 2)),  # two teachers
        ("dual_teacher", "paper", (3, 1, 3)),  # a sub-model more; the teacher whose turn it is
        ("gps", "paper", (6, 3, 6)),  # three networks twice; teacher for students, they for it
        ("unimatch", "paper", (4, 0, 4)),  # labeled, weak, two strong; one network labels itself
        ("cps", "no_cutmix", (4, 0, 4)),  # two networks, each labeled and unlabeled
    ],
)
def test_counts_are_those_of_the_algorithm(name, preset, expected):
    assert passes(name, preset) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_methods_passes_can_be_counted(name):
    forward, _, backward = passes(name)
    assert forward >= backward >= 1


def test_they_read_as_a_sentence_and_leave_the_generator_alone():
    before = torch.get_rng_state()
    passes.cache_clear()
    assert str(passes("supervised")) == "1 forward + 1 backward"
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", METHODS)
def test_every_method_but_supervised_only_says_where_it_comes_from(name):
    if name == "supervised":
        assert citation(name) == ""
    else:
        assert re.fullmatch(r"[A-ZÀ-Ý].+, [A-Za-z ]+ (19|20)\d\d", citation(name))
