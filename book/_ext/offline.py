"""Pages that never ask another host: MathJax from an installed package, and no live-code service.

The package `sphinx-mathjax-offline` carries the whole of MathJax 3; the pages need one script and
its fonts (Apache 2.0, as the script's header says). Jupyter Book always loads thebe, which would
fetch a kernel's front end from a content network; this book has launch buttons instead.
"""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from sphinx.errors import ExtensionError
from sphinx.util.fileutil import copy_asset

SCRIPT = "tex-mml-chtml.js"
FONTS = "output/chtml/fonts/woff-v2"


def source() -> Path:
    """The folder of MathJax inside the installed package."""
    try:
        package = distribution("sphinx-mathjax-offline")
    except PackageNotFoundError as error:
        raise ExtensionError(
            "sphinx-mathjax-offline is missing: pip install -e '.[book]'"
        ) from error
    return Path(package.locate_file("sphinx-mathjax-offline/static/mathjax"))


def point(app, config):
    """Have every page with maths load the local copy."""
    source()
    config.mathjax_path = f"mathjax/{SCRIPT}"


def copy(app, exception):
    """Put the script and its fonts beside the pages' other static files."""
    if exception is None and app.builder.format == "html":
        target = Path(app.outdir, "_static", "mathjax")
        copy_asset(source() / SCRIPT, target)
        copy_asset(source() / FONTS, target / FONTS)


def tidy(app, pagename, templatename, context, doctree):
    """Drop thebe's scripts, and inline scripts that a page would run a second time."""
    kept, seen = [], set()
    for script in context.get("script_files", []):
        body = getattr(script, "attributes", {}).get("body") or ""
        if "thebe" in body or "thebe" in str(getattr(script, "filename", script)):
            continue
        if not body or body not in seen:
            kept.append(script)
        seen.add(body)
    context["script_files"] = kept
    styles = context.get("css_files", [])
    context["css_files"] = [s for s in styles if "thebe" not in str(getattr(s, "filename", s))]


def setup(app):
    app.connect("config-inited", point)
    app.connect("html-page-context", tidy, priority=900)
    app.connect("build-finished", copy)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
