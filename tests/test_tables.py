"""What tables and claims say of records."""

from __future__ import annotations

from dataclasses import replace

from test_records import BASE, OURS, record

from s4lib.book import tables
from s4lib.protocols import protocol


def test_claims_name_only_what_the_interval_allows():
    clear = [record(v + 10 + 0.1 * d, d) for d, v in enumerate([40.0, 42.0, 42.5, 43.0, 41.5])]
    text = tables.claims({"base": BASE, "clear": clear, "ours": OURS}, ["base", "clear"])
    assert "**clear is better than base**: +10.2" in text and "5 draw(s)" in text
    turned = tables.claims({"base": BASE, "clear": clear}, ["clear", "base"])
    assert "base is worse than clear" in turned
    mixed = [record(v + (-1) ** d, d) for d, v in enumerate([40.0, 42.0, 42.5, 43.0])]
    assert "not distinguishable" in tables.claims({"a": BASE, "b": mixed}, ["a", "b"])


def test_beside_finds_the_committed_record_of_the_same_run():
    about = {"device": "CPU", "versions": {"torch": "2.11"}}
    here, there, missing = record(41.0), {**record(40.5), **about}, record(39.0, draw=7)
    known, unknown = tables.beside({"here": here, "new": missing}, [there]).rows
    assert known == ["here", "41.0", "40.5", "+0.5", "CPU, torch 2.11"]
    assert unknown == ["new", "39.0", "none", "", ""]
    stale = {**there, "method_source": "older"}
    assert tables.beside({"here": here}, [stale]).rows[0][2] == "40.5*"


def test_classes_are_averaged_over_the_runs_that_have_them():
    def run(*iou):
        last = {"iou": iou, "miou": sum(v or 0 for v in iou) / 2}
        return {"classes": ["sky", "pole"], "deployed": "n", "networks": {"n": {"last": last}}}

    table = tables.class_iou({"one": [run(90.0, 2.0)], "two": [run(80.0, None), run(84.0, None)]})
    rows = [[str(cell) for cell in row] for row in table.rows]
    assert rows[:2] == [["sky", "90.0", "82.0 ± 2.8"], ["pole", "2.0", "–"]]
    assert rows[2] == ["mIoU", "46.0", "41.0 ± 1.4"]


def test_a_listing_is_the_source_at_the_left_margin():
    assert tables.listing(tables.Table.__repr__).startswith("```python\ndef __repr__(self)")


def test_rounded_shortens_floats_and_nothing_else():
    table = tables.rounded(["", "n", "x"], [["a", 12345, 30.3799], ["b", 1, 1.0534e-5]], "Two.")
    assert table.rows == [["a", 12345, "30.4"], ["b", 1, "1.05e-05"]] and table.caption == "Two."
    assert tables.rounded([""], [[0.125]], digits=1).rows == [["0.1"]]


def test_changes_says_which_settings_have_no_record():
    one = protocol("mosaic-32")
    configs = {"run": replace(one, epochs=2), "other": replace(one, epochs=3)}
    known = [
        record(45.0 + d, d) | {"config": replace(configs["run"], draw=d, seed=d).to_dict()}
        for d in range(3)
    ]
    base = [record(40.0, d, d) for d in range(3)]
    table = tables.changes({"base": base}, known, configs, "One at a time.")
    assert [row[0] for row in table.rows] == ["base", "run", "other"]
    assert str(table.rows[1][4]) == "+6.0 [+3.5, +8.5]" and table.rows[2][5] == "not run"


def test_words_may_break_over_lines_and_numbers_may_not():
    text = tables.Table(["", "x"], [["a", "no match"], ["b", "1.0 [2]"]], "What.")._repr_html_()
    assert 'class="s4-words" style="text-align:right">no match' in text
    assert '<td style="text-align:right">1.0 [2]' in text and "<span>What.</span>" in text
