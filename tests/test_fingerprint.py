"""A fingerprint changes with the code that a run reaches, and with no other."""

from __future__ import annotations

import pytest

from s4lib import fingerprint as module
from s4lib.build import method_source
from s4lib.fingerprint import fingerprint
from s4lib.methods import METHODS

FILES = {
    "run.py": """
from . import steps
from .data import reader
from .records import write

LIMIT = 3

def fit():
    write(steps.once(LIMIT) + reader.read())

def other():
    return "nowhere"
""",
    "steps.py": """
HALF = 0.5

def once(x):
    return twice(x) * HALF

def twice(x):
    return 2 * x

def unused():
    return 0
""",
    "records.py": "def write(x):\n    print(x)\n",
    "data/reader.py": "from ..steps import twice\n\ndef read():\n    return Reader().value\n\n"
    "class Reader:\n    value = twice(1)\n",
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes the files above, with replacements in one of them, and returns their fingerprint."""
    monkeypatch.setattr(module, "HERE", tmp_path)

    def changed(file: str = "", old: str = "", new: str = "", root: str = "fit") -> str:
        module._definitions.cache_clear()
        for name, text in FILES.items():
            assert name != file or old in text
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text.replace(old, new) if name == file else text)
        return fingerprint(("run", root))

    yield changed
    module._definitions.cache_clear()


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("run.py", "LIMIT = 3", "LIMIT = 4"),
        ("run.py", "steps.once(LIMIT)", "steps.once(1)"),
        ("run.py", "def fit():", "@print\ndef fit():"),
        ("steps.py", "2 * x", "3 * x"),  # reached through another function, and from two modules
        ("steps.py", "HALF = 0.5", "HALF = 0.5\nHALF = 0.4"),
        ("data/reader.py", "value = twice(1)", "value = twice(2)"),
    ],
)
def test_a_change_of_what_is_reached_changes_it(package, file, old, new):
    assert package(file, old, new) != package()


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("run.py", '"nowhere"', '"elsewhere"'),
        ("steps.py", "return 0", "return 1"),
        ("steps.py", "def unused", "def added():\n    return 5\n\ndef unused"),
        ("steps.py", "return 2 * x", '"""Says\n    twice."""\n    return 2  *  x  # twice'),
        ("records.py", "print(x)", "print(x, x)"),  # a module that stands apart
    ],
)
def test_other_changes_do_not(package, file, old, new):
    assert package(file, old, new) == package()


def test_a_root_that_is_not_there_is_refused(package):
    with pytest.raises(ValueError, match=r"s4lib\.run does not define 'nothing'"):
        package(root="nothing")


def test_methods_differ_and_share_the_core():
    found = {name: method_source(name, "mosaic") for name in METHODS}
    assert len(set(found.values())) == len(METHODS)
    assert method_source("supervised", "camvid") != found["supervised"]


def test_it_follows_a_method_into_the_losses_it_uses_and_no_further(monkeypatch):
    """Real code: of losses.py, GPS reaches cross-entropy and does not reach GTA-Seg's weights."""
    before = {name: method_source(name, "mosaic") for name in ("gps", "gta_seg")}
    losses = module._definitions("losses")
    changed = losses["confidence_weight"]._replace(code="changed")
    real = module._definitions
    monkeypatch.setattr(
        module,
        "_definitions",
        lambda m: {**losses, "confidence_weight": changed} if m == "losses" else real(m),
    )
    assert method_source("gps", "mosaic") == before["gps"]
    assert method_source("gta_seg", "mosaic") != before["gta_seg"]
