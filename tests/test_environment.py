"""The conda environment asks for what the package asks for, word by word."""

import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))["project"]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text("utf8"))["dependencies"]


def test_conda_asks_for_the_same_packages():
    extras = PROJECT["optional-dependencies"]
    wanted = PROJECT["dependencies"] + extras["book"] + extras["test"]
    (pip,) = [entry["pip"] for entry in CONDA if isinstance(entry, dict)]
    assert [line for line in pip if line != "-e ."] == wanted
    assert pip[-1] == "-e ."


def test_conda_asks_for_the_same_python():
    (python,) = [e for e in CONDA if isinstance(e, str) and e.startswith("python")]
    assert python == "python" + PROJECT["requires-python"]


def test_training_does_not_depend_on_the_book():
    names = " ".join(PROJECT["dependencies"])
    assert not any(word in names for word in ("jupyter", "papermill", "sphinx", "=="))
