"""Fingerprint of the code that decides a run's numbers, so that a record of other code is known.

It covers the definitions of this package that a training can reach by name from where it starts: a
function that is added, or changed where a run never comes, leaves records valid, as do comments,
docstrings and white space.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import re
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
# What these hold decides no number, or a record holds what they decided: where things are kept,
# what is shown, which values are valid, lists of files (a record has the split's hash).
APART = {"config", "records", "run_folder", "interrupts", "progress", "fingerprint", "data.lists"}


def fingerprint(*roots: tuple[str, str]) -> str:
    """12 hexadecimal digits of the code of `roots` and of every definition that they reach.

    Args:
        roots: (module, name) of functions and classes, as ("methods.gps", "GPS"). A class is one
            definition, with all its methods.

    Raises:
        ValueError: a root that is not there.
    """
    found: dict[tuple[str, str], str] = {}
    for module, name in roots:
        if name not in _definitions(module):
            raise ValueError(f"s4lib.{module} does not define {name!r}")
    waiting = list(roots)
    while waiting:
        module, name = key = waiting.pop()
        if key not in found and name in _definitions(module):
            definition = _definitions(module)[name]
            found[key] = definition.code
            waiting += definition.reaches
    return hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()[:12]


class Definition(NamedTuple):
    code: str  # without comments, docstrings and white space
    reaches: frozenset[tuple[str, str]]  # (module, name), some of which may define nothing


@functools.cache
def _definitions(module: str) -> dict[str, Definition]:
    """Of a module's top level, by name."""
    source = HERE.joinpath(*module.split(".")).with_suffix(".py").read_text("utf8")
    tree = ast.parse(source)
    lines = source.splitlines()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):  # a docstring
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    lines = ["".join(re.sub(r"(^|\s)#.*", "", line).split()) for line in lines]
    imported = _imported(tree, module)
    found: dict[str, Definition] = {}
    for node in tree.body:
        first = min(n.lineno for n in [node, *getattr(node, "decorator_list", [])])
        code = "".join(lines[first - 1 : node.end_lineno])
        reaches = _reaches(node, module, imported)
        for name in _bound(node):  # bound twice, it is both
            before = found.get(name, Definition("", frozenset()))
            found[name] = Definition(before.code + code, before.reaches | reaches)
    return found


def _imported(tree: ast.Module, module: str) -> dict[str, tuple[str, str]]:
    """(module, name) of what a module imports from this package, by its name there."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            package = module.split(".")[: -node.level]
            where = ".".join([*package, *([node.module] if node.module else [])])
            found |= {alias.asname or alias.name: (where, alias.name) for alias in node.names}
    return found


def _bound(node: ast.stmt) -> set[str]:
    """Names that a statement of the top level defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    return {
        n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
    }


def _reaches(node: ast.stmt, module: str, imported: dict) -> frozenset[tuple[str, str]]:
    """(module, name) of what a statement names in this package."""
    found = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            found.add(imported.get(part.id, (module, part.id)))
        elif isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
            package, name = imported.get(part.value.id, ("", ""))  # perhaps an imported module
            found.add((f"{package}.{name}".strip("."), part.attr))
    files = {m for m, _ in found if HERE.joinpath(*m.split(".")).with_suffix(".py").is_file()}
    return frozenset((m, name) for m, name in found if m in files - APART)
