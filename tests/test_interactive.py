"""The slider: what its HTML says, and that a browser and a keyboard can move it."""

import importlib.util
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from s4lib.book.interactive import slider


def figure(height: float = 1.0):
    drawn, axis = plt.subplots(figsize=(9, 2))
    axis.plot([0, height], label="rise")
    axis.legend()
    return drawn


def two(**options):
    frames = {"early <1>": figure(1), "late & last": figure(2)}
    return slider(frames, title="Epoch", alt="A rising line.", **options)


class Tags(HTMLParser):
    """Every start tag with its attributes, and every end tag."""

    def __init__(self, text: str):
        super().__init__()
        self.opened, self.closed = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.opened.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        self.closed.append(tag)

    def of(self, tag: str) -> list[dict]:
        return [attrs for name, attrs in self.opened if name == tag]


def test_a_labelled_range_over_frames_of_which_one_is_seen():
    tags = Tags(two()._repr_html_())
    (control,) = tags.of("input")
    found = [control[key] for key in ("type", "min", "max", "value")]
    assert found == ["range", "0", "1", "0"]
    assert control["aria-valuetext"] == "early <1>"
    card, first, second = tags.of("div")
    assert "hidden" not in first and "hidden" in second
    assert [first["data-frame"], second["data-frame"]] == ["early <1>", "late & last"]
    assert [tags.closed.count(tag) for tag in ("div", "label", "b")] == [3, 1, 1]


def test_starts_where_it_is_told():
    tags = Tags(two(start="late & last")._repr_html_())
    assert tags.of("input")[0]["value"] == "1"
    assert tags.of("input")[0]["aria-valuetext"] == "late & last"
    assert ["hidden" in frame for frame in tags.of("div")[1:]] == [True, False]


def test_pictures_have_a_text_and_name_no_other_host():
    images = Tags(two()._repr_html_()).of("img")
    assert [i["alt"] for i in images] == ["A rising line. early <1>", "A rising line. late & last"]
    assert all(i["src"].startswith("data:image/svg+xml,") for i in images)
    assert not Tags(two()._repr_html_()).of("script")
    assert not re.search(r'\bid="', two()._repr_html_())


def test_the_same_figures_give_the_same_page():
    assert two()._repr_html_() == two()._repr_html_()


def test_figures_are_closed_so_that_a_notebook_draws_them_once():
    before = plt.get_fignums()
    two()
    assert plt.get_fignums() == before


def test_html_frames_are_shown_as_they_are():
    shown = slider({"a": "<p>one</p>", "b": "<p>two</p>"}, title="T", alt="Two words.")
    assert "<p>one</p></div>" in shown._repr_html_() and "<img" not in shown._repr_html_()


def test_a_terminal_is_told_what_it_misses():
    assert repr(two()) == ("Epoch: early <1>, late & last (a slider; a browser shows its pictures)")


@pytest.mark.parametrize(
    ("frames", "options", "message"),
    [
        ({}, {"alt": "Nothing."}, "0 frames, alt='Nothing.': give at least one frame"),
        ({"a": "x"}, {"alt": " "}, "1 frames, alt=' ': give at least one frame and an alt"),
        ({"a": "x"}, {"alt": "A.", "start": "b"}, "start='b': choose one of a"),
    ],
)
def test_bad_requests_are_refused_by_name(frames, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        slider(frames, title="T", **options)


@pytest.mark.browser
@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium: apt-get install chromium")
@pytest.mark.skipif(not shutil.which("chromedriver"), reason="no chromedriver: chromium-driver")
def test_two_on_a_phone_move_by_keys_apart_from_each_other(tmp_path):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.common.keys import Keys

    page = tmp_path / "page.html"
    head = '<!doctype html><meta name="viewport" content="width=device-width">'
    page.write_text(
        f"{head}<link rel='icon' href='data:,'><body>{two()._repr_html_()}{two()._repr_html_()}"
    )
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("headless", "no-sandbox", "disable-gpu", f"user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        phone = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
        driver.get(page.as_uri())
        one, other = driver.find_elements("css selector", "input")

        def seen() -> list[bool]:
            return [f.is_displayed() for f in driver.find_elements("css selector", "img")]

        assert seen() == [True, False, True, False]
        one.send_keys(Keys.ARROW_RIGHT)
        assert seen() == [False, True, True, False]
        assert one.get_attribute("aria-valuetext") == "late & last"
        assert other.get_attribute("aria-valuetext") == "early <1>"
        names = [b.text for b in driver.find_elements("css selector", "b")]
        assert names == ["late & last", "early <1>"]
        one.send_keys(Keys.HOME)
        assert seen() == [True, False, True, False]
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 390
        loaded = "return [...document.images].every(i => i.naturalWidth > 0)"
        assert driver.execute_script(loaded) and driver.get_log("browser") == []
    finally:
        driver.quit()


def test_a_page_gives_it_its_number_and_caption():
    path = Path(__file__).parents[1] / "book" / "_ext" / "executed_runs.py"
    spec = importlib.util.spec_from_file_location("executed_runs", path)
    pages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pages)
    html = two()._repr_html_()
    shown = {"output_type": "display_data", "metadata": {}, "data": {"text/html": html}}
    said = {"output_type": "stream", "name": "stdout", "text": "also printed"}
    figure = {"mystnb": {"figure": {"caption": "A slider.", "name": "fig-x"}}}
    cell = {"id": "ramp", "source": "", "metadata": figure, "outputs": [shown]}
    assert pages.figure_apart(cell) == [cell]
    first, second = pages.figure_apart({**cell, "outputs": [said, shown]})
    assert first["outputs"] == [said] and not first["metadata"]
    assert second["outputs"] == [shown] and second["metadata"]["mystnb"] == figure["mystnb"]
    assert pages.scrub(shown, "/home/reader/s4book", "/home/reader", "box-17") == shown
