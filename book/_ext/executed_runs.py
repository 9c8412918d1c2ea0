"""Show a notebook's executed copy in place of its source, polished for reading.

`s4 book` leaves executed copies in `runs/book/<profile>/notebooks/`. Sphinx reads the sources in
`notebooks/`; at `source-read` this extension hands it the copy instead. So addresses, download
and launch buttons keep pointing at the clean source, nothing executes while compiling, and a
notebook that was not run still has its page, with a box that says so.
"""

import json
import os
import re
import socket
from datetime import datetime
from pathlib import Path

from s4lib.progress import duration

WIDGETS = "application/vnd.jupyter.widget-view+json"
PLOTLY = "application/vnd.plotly.v1+json"
ABSOLUTE = re.compile(r"(?<![\w.…])[~/][\w.+-]*(?:/[\w.+-]+)+/?")


def polish(text: str, root: str = "", home: str = "", host: str = "") -> str:
    """The executed notebook `text` as a reader should see it.

    Parameter cells are put out of the way, progress lines keep their last state, widgets and other
    outputs that need a server go, and so does what belongs to one machine only: the folders `root`
    and `home` and the name `host`. A box under the title says how the notebook was run.
    """
    notebook = json.loads(text)
    cells = notebook["cells"]
    injected = any("injected-parameters" in tags(cell) for cell in cells)
    for cell in cells:
        if "injected-parameters" in tags(cell):
            add_tag(cell, "hide-input")
            cell["source"] = ABSOLUTE.sub(shorten, "".join(cell["source"]))
            prompts = {"code_prompt_show": "Parameters of this run", "code_prompt_hide": "Hide"}
            cell["metadata"]["mystnb"] = prompts
        elif "parameters" in tags(cell):  # its defaults are not what ran
            add_tag(cell, "remove-cell" if injected else "hide-input")
        if cell["cell_type"] == "code":
            outputs = merge_streams(cell["outputs"])
            cell["outputs"] = [scrub(o, root, home, host) for o in outputs if readable(o)]
    cells[:] = [part for cell in cells for part in figure_apart(cell)]
    notebook["metadata"].pop("widgets", None)
    insert_under_title(cells, "s4-run-record", record_box(notebook))
    return json.dumps(notebook)


def not_executed(text: str, name: str, profile: str) -> str:
    """The source notebook `text` with a box that says it was not run."""
    notebook = json.loads(text)
    box = (
        "::::{admonition} Not executed\n:class: warning s4-not-executed\n"
        f"This chapter has not been run with the profile `{profile}`, so its figures and tables "
        f"are missing. `s4 book {name} --profile {profile}` runs it.\n::::"
    )
    insert_under_title(notebook["cells"], "s4-not-executed", box)
    return json.dumps(notebook)


def tags(cell: dict) -> list[str]:
    """The tags of a cell."""
    return cell["metadata"].get("tags", [])


def add_tag(cell: dict, tag: str) -> None:
    """Tag a cell, once."""
    cell["metadata"]["tags"] = sorted({*tags(cell), tag})


def insert_under_title(cells: list[dict], name: str, text: str) -> None:
    """Put a Markdown cell right under the chapter's title, above the rest of the first cell."""
    box = {"cell_type": "markdown", "id": name, "metadata": {}, "source": text}
    if not cells or cells[0]["cell_type"] != "markdown":
        cells.insert(0, box)
        return
    lines = "".join(cells[0]["source"]).splitlines(keepends=True)
    at = next((n for n, line in enumerate(lines, 1) if line.startswith("# ")), len(lines))
    rest = "".join(lines[at:]).strip("\n")
    cells[0]["source"] = "".join(lines[:at]).rstrip("\n")
    tail = [{**box, "id": f"{name}-rest", "source": rest}] if rest else []
    cells[1:1] = [box, *tail]


def figure_apart(cell: dict) -> list[dict]:
    """A cell that also prints, in two: its caption and number belong to the picture alone.

    A slider (s4lib.book.interactive) is a picture too.
    """
    outputs = cell.get("outputs", [])
    pictures = [o for o in outputs if is_picture(o.get("data", {}))]
    if "figure" not in cell["metadata"].get("mystnb", {}) or len(outputs) == len(pictures):
        return [cell]
    # The source is hidden, but must not be empty: a cell without source is left out of the page.
    shown = {**cell, "id": f"{cell['id']}-figure", "source": "# see above", "outputs": pictures}
    shown["metadata"] = {**cell["metadata"], "tags": ["remove-input"]}
    rest = {k: v for k, v in cell["metadata"].items() if k != "mystnb"}
    said = [output for output in outputs if output not in pictures]
    return [{**cell, "metadata": rest, "outputs": said}, *([shown] if pictures else [])]


def is_picture(data: dict) -> bool:
    """Whether a MIME bundle is an image or a slider."""
    page = "".join(data.get("text/html", ""))
    return any(k.startswith("image/") for k in data) or page.startswith('<div class="s4-slider"')


def readable(output: dict) -> bool:
    """Whether an output says anything on a page; drops MIME types that need a server."""
    data = output.get("data")
    if data is None:
        return True
    if "text/html" in data or "image/png" in data or "image/svg+xml" in data:
        data.pop(PLOTLY, None)
        data.pop(WIDGETS, None)
    return WIDGETS not in data


def merge_streams(outputs: list[dict]) -> list[dict]:
    """Join pieces of one stream and keep only the last state of lines rewritten with `\\r`."""
    merged = []
    for output in outputs:
        if output["output_type"] != "stream":
            merged.append(output)
            continue
        text = "".join(output["text"])
        if merged and merged[-1].get("name") == output["name"]:
            merged[-1]["text"] += text
        else:
            merged.append({**output, "text": text})
    for output in merged:
        if output["output_type"] == "stream":
            output["text"] = collapse(output["text"])
    return merged


def collapse(text: str) -> str:
    """What a terminal would show in the end of lines that a carriage return rewrote."""
    lines = text.replace("\r\n", "\n").split("\n")
    return "\n".join(next((p for p in reversed(line.split("\r")) if p), "") for line in lines)


def scrub(output: dict, root: str, home: str, host: str) -> dict:
    """Replace what belongs to one machine in the textual parts of an output."""
    folders = r"/(?:[^\s\"'<>:/]+/)*"
    swaps = [
        (folders + r"ipykernel_\d+/\d+\.py", "cell"),
        (folders + r"site-packages/", "site-packages/"),
        (folders + r"lib/(?=python3\.\d+/)", ""),
    ]
    swaps += [(re.escape(root.rstrip("/") + "/"), "")] if root else []
    swaps += [(re.escape(root.rstrip("/")) + r"(?![\w.-])", ".")] if root else []
    swaps += [(re.escape(home.rstrip("/")) + r"(?![\w.-])", "~")] if home.strip("/") else []
    if re.search(r"[\d.-]", host) and not host.startswith("localhost"):  # never a plain word
        swaps.append((rf"(?<![\w.-]){re.escape(host)}(?![\w-])", "host"))

    def clean(value):
        text = "".join(value) if isinstance(value, list) else value
        for pattern, by in swaps:
            text = re.sub(pattern, by, text)
        return text

    if output["output_type"] == "stream":
        return {**output, "text": clean(output["text"])}
    if output["output_type"] == "error":
        trace = [clean(line) for line in output["traceback"]]
        return {**output, "evalue": clean(output["evalue"]), "traceback": trace}
    data = {kind: clean(v) if kind.startswith("text/") else v for kind, v in output["data"].items()}
    return {**output, "data": data}


def record_box(notebook: dict) -> str:
    """The box that says how the notebook was run: what, when, where, with which versions."""
    run = notebook["metadata"].get("papermill", {})
    facts = notebook["metadata"].get("s4", {})
    trained = trainings(notebook)
    profile = facts.get("profile") or run.get("parameters", {}).get("profile", "unknown")
    rows = [("Profile", f"`{profile}`")]
    if run.get("duration"):
        rows.append(("Duration", duration(run["duration"])))
    if run.get("start_time"):
        start = datetime.fromisoformat(run["start_time"])
        rows.append(("Date", f"{start.day} {start:%B %Y}"))
    if facts:
        note = " with local changes" if facts.get("changed") else ""
        rows.append(("Commit", f"`{facts['commit']}`{note}" if facts.get("commit") else "none"))
    if devices := sorted({str(t["device"]) for t in trained if t.get("device")}):
        rows.append(("Device", ", ".join(devices)))
    if trained:
        seconds = sum(float(t.get("seconds") or 0) for t in trained)
        rows.append(("Runs", f"{len(trained)}, {duration(seconds)} of training"))
    for title, key in (("Seeds", "seed"), ("Label draws", "draw")):
        if values := sorted({t[key] for t in trained if t.get(key) is not None}):
            rows.append((title, ", ".join(map(str, values))))
    versions = [f"{name} {number}" for name, number in facts.get("versions", {}).items()]
    if versions:
        rows.append(("Versions", ", ".join(versions)))
    given = {k: v for k, v in run.get("parameters", {}).items() if k != "profile"}
    if given:
        changed = ", ".join(f"`{key} = {value}`" for key, value in sorted(given.items()))
        rows.append(("Parameters", ABSOLUTE.sub(shorten, changed)))
    lines = "\n".join(f"- **{title}** {value}" for title, value in rows)
    return f"::::{{admonition}} Run record\n:class: note s4-run-record\n{lines}\n::::"


def shorten(path: re.Match) -> str:
    """A folder of one machine, by its last name only."""
    return f"…/{path[0].rstrip('/').rsplit('/', 1)[-1]}"


def trainings(notebook: dict) -> list[dict]:
    """The runs that a notebook's outputs name in their metadata, each once."""
    found = {}
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            for run in output.get("metadata", {}).get("s4", {}).get("runs", []):
                found[run.get("run_id", len(found))] = run
    return list(found.values())


def executed_copy(app, docname: str) -> Path | None:
    """Where the executed copy of a page would be; None for pages that are no notebooks."""
    source = Path(app.env.doc2path(docname))
    if source.suffix != ".ipynb":
        return None
    runs = Path(app.srcdir, app.config.s4_runs_dir, app.config.s4_profile)
    return runs / f"{docname}.ipynb"


def swap(app, docname, source):
    """Sphinx event `source-read`: the executed copy, or the source with the box."""
    copy = executed_copy(app, docname)
    if copy is None:
        return
    app.env.note_dependency(str(copy))
    if copy.exists():
        host = socket.gethostname()
        source[0] = polish(copy.read_text("utf8"), str(app.srcdir), str(Path.home()), host)
    else:
        source[0] = not_executed(source[0], copy.stem, app.config.s4_profile)


def outdated(app, env, added, changed, removed):
    """Sphinx event `env-get-outdated`: pages whose executed copy is newer than the page."""
    pages = []
    for docname in env.found_docs & set(env.all_docs):
        copy = executed_copy(app, docname)
        if copy and copy.exists() and copy.stat().st_mtime > env.all_docs[docname] / 1e6:
            pages.append(docname)
    return pages


def configure(app, config):
    """Sphinx event `config-inited`: the profile asked for, and the forge's own address."""
    config.s4_profile = os.environ.get("S4_PROFILE", config.s4_profile)
    if forked := os.environ.get("GITHUB_REPOSITORY"):
        config.html_theme_options["repository_url"] = f"https://github.com/{forked}"


def setup(app):
    app.add_config_value("s4_runs_dir", "runs/book", "env")
    app.add_config_value("s4_profile", "quick", "env")
    app.connect("config-inited", configure)
    app.connect("source-read", swap)
    app.connect("env-get-outdated", outdated)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
