"""The built pages as a reader meets them: headless Chromium, from the disk, no other host asked.

They read `_build/html`, which `make book` makes; where it or a Chromium is missing they skip.
"""

import json
import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HTML = Path(os.environ.get("S4_HTML", ROOT / "_build" / "html"))
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
PAGES = sorted(
    path.relative_to(HTML).as_posix()
    for pattern in ("index.html", "book/*.html", "notebooks/*.html")
    for path in HTML.glob(pattern)
)
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not PAGES, reason="no built book: run `make book` first"),
    pytest.mark.skipif(not CHROMIUM, reason="no chromium: sudo apt-get install chromium"),
    pytest.mark.skipif(not DRIVER, reason="no chromedriver: apt-get install chromium-driver"),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A Chromium that logs its requests and its console, with the network cut."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "disable-dev-shm-usage",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        f"user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    cut = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    driver.execute_cdp_cmd("Network.enable", {})
    driver.execute_cdp_cmd("Network.emulateNetworkConditions", cut)
    yield driver
    driver.quit()


def show(browser, address: str) -> None:
    """Open a page and wait until its mathematics is set."""
    browser.set_script_timeout(30)
    browser.get(f"{HTML.as_uri()}/{address}")
    browser.execute_async_script(
        "const done = arguments[0];"
        "const set = window.MathJax?.startup?.promise ?? Promise.resolve();"
        "set.then(() => document.fonts.ready).then(() => done());"
    )


def look(browser, size: str, theme: str) -> None:
    """Take the screen of a desktop or of a phone, and a system that is light or dark."""
    width, height = SIZES[size]
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "phone"}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    scheme = {"name": "prefers-color-scheme", "value": theme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


@pytest.fixture(scope="module", params=PAGES)
def page(browser, request):
    """What a page did and was, from one visit: requests, console, images, formulas, widths."""
    browser.get_log("performance"), browser.get_log("browser")
    look(browser, "desktop", "light")
    show(browser, request.param)
    facts = browser.execute_script(
        "const count = what => document.querySelectorAll(what).length;"
        "const images = [...document.images].map("
        "    i => [i.getAttribute('src'), i.getAttribute('alt') ?? '', i.naturalWidth]);"
        "return {images, formulas: count('.math'), set: count('mjx-container'),"
        " wrong: count('mjx-merror'), titles: count('article h1'),"
        " downloads: count('.dropdown-download-buttons')}"
    )
    facts["screens"] = {}
    for size in SIZES:
        for theme in ("light", "dark"):
            look(browser, size, theme)
            facts["screens"][size, theme] = browser.execute_async_script(
                "const [theme, done] = arguments, page = document.documentElement; let left = 50;"
                "const look = () => page.dataset.theme == theme || !left--"
                " ? done([page.scrollWidth, page.dataset.theme]) : setTimeout(look, 20); look()",
                theme,
            )
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [e["params"]["request"]["url"] for e in events if e["method"].endswith("WillBeSent")]
    facts["asked"] = sent
    facts["errors"] = [e["message"] for e in browser.get_log("browser") if e["level"] == "SEVERE"]
    return facts


def test_page_asks_no_other_host(page):
    assert page["asked"], "the browser logged no request at all"
    assert [url for url in page["asked"] if not url.startswith(("file:", "data:"))] == []


def test_console_is_silent(page):
    assert page["errors"] == []


def test_images_load_and_have_a_text(page):
    for source, alt, width in page["images"]:
        assert width > 0, f"{source} does not load"
        assert len(alt.split()) > 1 and "/" not in alt, f"{source}: a file name is no text: {alt}"


def test_mathematics_is_set(page):
    assert page["set"] >= page["formulas"] and page["wrong"] == 0


def test_nothing_is_wider_than_the_screen(page):
    for (size, theme), (width, shown) in page["screens"].items():
        assert width <= SIZES[size][0], f"{size}, {theme}"
        assert shown == theme


def test_page_has_one_title_and_a_download(page):
    assert page["titles"] == 1 and page["downloads"] == 1


def test_search_finds_pages_without_a_server(browser):
    show(browser, "search.html?q=teacher")
    found = browser.execute_async_script(
        "const done = arguments[0]; let left = 100;"
        "const look = () => { const n = document.querySelectorAll('#search-results li').length;"
        " n || !left-- ? done(n) : setTimeout(look, 50) }; look()"
    )
    assert found >= 2


def test_some_page_has_mathematics(browser):
    show(browser, "book/notation.html")
    assert browser.find_elements("css selector", "mjx-container")


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("notebooks/")])
def test_every_figure_of_a_chapter_that_was_run_is_there(page):
    text = (HTML / page).read_text("utf8")
    if "s4-not-executed" in text:
        pytest.skip("not executed")
    cells = json.loads((ROOT / page).with_suffix(".ipynb").read_text("utf8"))["cells"]
    figures = [
        c["metadata"]["mystnb"]["figure"]["name"] for c in cells if "mystnb" in c["metadata"]
    ]
    assert figures and [name for name in figures if f'id="{name}"' not in text] == []
