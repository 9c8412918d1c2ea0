"""The rules that keep notebooks readable, diffable and runnable; nothing is executed here."""

import ast
import importlib
import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PROSE = [ROOT / "index.md", *sorted((ROOT / "book").glob("*.md"))]
CELLS, CODE_LINES, DEF_LINES = 25, 120, 10
REQUIRED = {"profile", "dataset", "data_root"}
WORDS = re.compile(r"[a-z]{2,}(-[a-z0-9]+)*")
DRAWS = re.compile(
    r"\b(pictures|plots|diagrams)\.(?!use_style|as_)\w+\(|\bplt\.\w+\(|\.(plot|imshow|hist)\("
)
RESULT = re.compile(r"\d+\.\d+\s*(%|points?\b|mIoU)|mIoU (of|=|is) \d")


def source(cell: dict) -> str:
    return "".join(cell["source"])


def tags(cell: dict) -> list[str]:
    return cell["metadata"].get("tags", [])


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return json.loads(request.param.read_text("utf8"))


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def tree(notebook: dict) -> ast.Module:
    """All code of a notebook, without IPython's own lines."""
    lines = "\n".join(source(cell) for cell in code_cells(notebook)).splitlines()
    return ast.parse("\n".join(line for line in lines if not re.match(r"\s*[%!]", line)))


def test_is_stripped(notebook):
    assert set(notebook["metadata"]) <= {"kernelspec"}
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    for cell in notebook["cells"]:
        assert set(cell["metadata"]) <= {"tags", "mystnb"}, cell["id"]
    for cell in code_cells(notebook):
        assert cell["outputs"] == [] and cell["execution_count"] is None, cell["id"]


def test_cell_ids_are_words_and_unique(notebook):
    ids = [cell["id"] for cell in notebook["cells"]]
    assert [name for name in ids if not WORDS.fullmatch(name)] == []
    assert len(set(ids)) == len(ids)


def test_opens_with_its_only_title(notebook):
    first, *others = notebook["cells"]
    assert first["cell_type"] == "markdown" and source(first).startswith("# ")
    text = "\n".join(source(c) for c in notebook["cells"] if c["cell_type"] == "markdown")
    assert len(re.findall(r"^# ", re.sub(r"```.*?```", "", text, flags=re.S), re.M)) == 1


def test_has_one_parameters_cell_with_the_common_names(notebook):
    (cell,) = [cell for cell in notebook["cells"] if "parameters" in tags(cell)]
    names = set()
    for node in ast.parse(source(cell)).body:
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets}
        elif isinstance(node, ast.AnnAssign):
            names.add(node.target.id)
    assert REQUIRED <= names


def test_is_short(notebook):
    assert len(notebook["cells"]) <= CELLS
    lines = [line for cell in code_cells(notebook) for line in source(cell).splitlines()]
    assert len([line for line in lines if line.strip()]) <= CODE_LINES


def test_argues_and_leaves_the_work_to_the_library(notebook):
    for node in ast.walk(tree(notebook)):
        assert not isinstance(node, ast.ClassDef), node.name
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < DEF_LINES, f"{node.name} is too long"
        if isinstance(node, ast.Attribute):
            assert node.attr != "backward", "training loops live in the library"


def test_imports_resolve(notebook):
    for node in ast.walk(tree(notebook)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                assert importlib.util.find_spec(alias.name), alias.name
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "s4lib":
            module = importlib.import_module(node.module)
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                assert hasattr(module, alias.name) or importlib.util.find_spec(inside), inside
        elif isinstance(node, ast.ImportFrom):
            assert importlib.util.find_spec(node.module), node.module


def test_figures_have_a_text_and_a_caption(notebook):
    for cell in code_cells(notebook):
        code = re.sub(r"^(from|import) .*$", "", source(cell), flags=re.M)
        if DRAWS.search(code):
            about = cell["metadata"].get("mystnb", {})
            assert len(about.get("image", {}).get("alt", "").split()) >= 4, cell["id"]
            assert about.get("figure", {}).get("caption"), cell["id"]
            assert re.fullmatch(r"fig-[a-z0-9-]+", about["figure"].get("name", "")), cell["id"]


def test_figure_names_are_unique_in_the_book():
    names = [
        cell["metadata"]["mystnb"]["figure"]["name"]
        for path in NOTEBOOKS
        for cell in json.loads(path.read_text("utf8"))["cells"]
        if "figure" in cell["metadata"].get("mystnb", {})
    ]
    assert sorted(set(names)) == sorted(names)


def test_prose_types_no_result(notebook):
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            assert not RESULT.search(source(cell)), f"{cell['id']}: compute it and print it"


# ---- links between pages


def texts() -> dict[Path, str]:
    """The Markdown of every page."""
    pages = {path: path.read_text("utf8") for path in PROSE}
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text("utf8"))["cells"]
        pages[path] = "\n\n".join(source(c) for c in cells if c["cell_type"] == "markdown")
    return pages


def labels() -> set[str]:
    """Everything that a link can lead to by name."""
    found = set()
    for text in texts().values():
        found |= set(re.findall(r"^\(([\w-]+)\)=", text, re.M))
        found |= set(re.findall(r"^\$\$ \(([\w-]+)\)", text, re.M))
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text("utf8"))["cells"]:
            found.add(cell["metadata"].get("mystnb", {}).get("figure", {}).get("name"))
    return found


def test_citations_are_in_the_bibliography():
    known = set(re.findall(r"^@\w+\{([^,]+),", (ROOT / "book/references.bib").read_text(), re.M))
    for path, text in texts().items():
        for group in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", text):
            assert {key.strip() for key in group.split(",")} <= known, f"{path.name}: {group}"


def test_bibliography_keys_are_unique():
    keys = re.findall(r"^@\w+\{([^,]+),", (ROOT / "book/references.bib").read_text(), re.M)
    assert len(set(keys)) == len(keys)


def test_links_lead_somewhere():
    known = labels()
    for path, text in texts().items():
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith("#"):
                assert target[1:] in known, f"{path.name}: {target}"
            elif re.fullmatch(r"[\w./-]+\.(md|ipynb)", target):
                there = (path.parent / target).resolve()
                listed = there.relative_to(ROOT).with_suffix("").as_posix()
                assert f"file: {listed}\n" in (ROOT / "_toc.yml").read_text(), target
        for group in re.findall(r"\{(?:eq|numref)\}`(?:[^`<]*<)?([\w-]+)>?`", text):
            assert group in known, f"{path.name}: {group}"


def test_the_table_of_contents_names_every_notebook():
    listed = re.findall(r"file: notebooks/(\w+)", (ROOT / "_toc.yml").read_text())
    assert {path.stem for path in NOTEBOOKS} <= set(listed)
