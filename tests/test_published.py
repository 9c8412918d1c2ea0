"""The published numbers say what the papers print, and malformed ones are refused."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, fields

import pytest
from conftest import ROOT

from s4lib.book import published
from s4lib.book.published import Cell, above, beside, columns, load, pivot, remarks, spread
from s4lib.methods import METHODS

COUNTS = {  # cells of each table, as many as the paper prints
    "jin2022": {"1": 8 * 5, "2": 7 * 4, "3": 4, "text on 3": 4, "4": 4, "5": 4, "6": 3, "7": 3}
    | {"8": 6, "9": 3},
    "cho2024": {"1a": 13, "1b": 8},
    "liu2022": {
        "supplementary 1": 2 * 4,
        "README, VOC augmented": 2 * 4,
        "README, VOC high quality": 5,
        "README, VOC blender": 4,
        "README, Cityscapes, crop 720, CE": 3 * 3,
        "README, Cityscapes, crop 800, OHEM": 3,
    },
    "na2023": {"slides 1": 6 * 5, "slides 1, #Params": 6},
    "wang2022": {
        "README, VOC classic": 2 * 5,
        "README, VOC augmented": 2 * 4,
        "README, Cityscapes": 3 * 4,
    },
    "ke2020": {"PixelSSL README, PSPNet": 5 * 4},
}

# source, table | method | labels | digits as the paper's text prints them | flag
PRINTED = """
jin2022, 1 | SupOnly | 92 183 366 732 1464 | 45.77 54.92 65.88 71.69 72.50 | copied
jin2022, 1 | MT | 92 183 366 732 1464 | 51.72 58.93 63.86 69.51 70.96 | copied
jin2022, 1 | ST++ | 92 183 366 732 1464 | 65.23 71.01 74.59 77.33 79.12 | copied
jin2022, 1 | U2PL | 92 183 366 732 1464 | 67.98 69.15 73.66 76.16 79.49 | copied
jin2022, 1 | GTA-Seg | 92 183 366 732 1464 | 70.02 73.16 75.57 78.37 80.47 |
jin2022, 2 | MT | 662 1323 2645 5291 | 70.51 71.53 73.02 76.58 |
jin2022, 2 | CutMix | 662 1323 2645 5291 | 71.66 75.51 77.33 78.21 | reconstructed
jin2022, 2 | CCT | 662 1323 2645 5291 | 71.86 73.68 76.51 77.40 | reconstructed
jin2022, 2 | GTA-Seg | 662 1323 2645 5291 | 77.82 80.47 80.57 81.01 |
jin2022, 3 | GTA-Seg | 100 186 372 744 | - - - - | lost
jin2022, text on 3 | GTA-Seg | 100 186 372 744 | 1.80 1.64 1.57 2.19 |
jin2022, 4 | no teacher, no assistant, no re-weighting | 183 | 54.92 | copied
jin2022, 4 | teacher-student | 183 | 58.93 | copied
jin2022, 4 | teacher-student, assistant | 183 | 72.10 | reconstructed
jin2022, 4 | teacher-student, assistant, re-weighting | 183 | 73.16 | reconstructed
jin2022, 5 | SupOnly | 183 | 54.92 | copied
jin2022, 5 | Unbiased ST | 183 | 65.92 |
jin2022, 5 | EMA (Encoder) (Ours) | 183 | 72.10 |
jin2022, 6 | Gentle Teaching Assistant | 183 | 70.10 | suspicious
jin2022, 6 | Teacher Model | 183 | 73.16 |
jin2022, 7 | assistant on labels, student on pseudo-labels | 183 | 66.71 |
jin2022, 7 | assistant on pseudo-labels, student on labels | 183 | 73.16 |
jin2022, 8 | EMA 0.99 (Reported) | 183 | 73.16 | reconstructed
jin2022, 8 | EMA 0.999 | 183 | 73.44 | reconstructed
jin2022, 8 | EMA 0.9999 | 183 | 73.57 | reconstructed
jin2022, 8 | warmup 2 | 183 | 73.58 |
jin2022, 8 | warmup 3 | 183 | 73.39 |
jin2022, 9 | no re-weighting | 183 | 72.10 | reconstructed
jin2022, 9 | confidence | 183 | 70.67 | reconstructed
jin2022, 9 | confidence and Laplace smoothing | 183 | 73.16 | reconstructed
cho2024, 1a | GPS alpha 0.5, beta 1.0, gamma 0.5 | 1/8 | 73.72 |
cho2024, 1a | GPS alpha 0.5, beta 1.5, gamma 0.5 | 1/8 | 73.95 |
cho2024, 1a | GPS alpha 1.5, beta 1.0, gamma 0.5 | 1/8 | 73.16 |
cho2024, 1b | GPS alpha 1, beta 3, gamma 1 | 1/8 | 73.77 |
cho2024, 1b | GPS alpha 1, beta 5, gamma 1 | 1/8 | 74.62 |
cho2024, 1b | GPS alpha 4, beta 4, gamma 4 | 1/8 | 73.53 |
liu2022, supplementary 1 | PS-MT, ensemble | 662 1323 2646 5291 | 72.83 75.70 76.43 77.88 |
liu2022, supplementary 1 | PS-MT, single teacher | 662 1323 2646 5291 | 72.79 75.59 76.26 77.71 |
liu2022, README, VOC blender | PS-MT | 662 1323 2646 5291 | 78.79 80.29 80.66 80.87 |
liu2022, README, Cityscapes, crop 800, OHEM | PS-MT, sliding window | 372 744 1488 | \
77.12 78.38 79.22 | suspicious
na2023, slides 1 | Supervised-only | 92 183 366 732 1464 | 44.03 52.26 61.65 66.72 72.94 |
na2023, slides 1 | PseudoSeg | 92 183 366 732 1464 | 54.89 61.88 64.85 70.42 71.00 | copied
na2023, slides 1 | PC2Seg | 92 183 366 732 1464 | 56.90 64.63 67.62 70.90 72.26 | copied
na2023, slides 1 | UniMatch | 92 183 366 732 1464 | 71.9 72.5 76.0 77.4 78.7 | copied
na2023, slides 1 | Dual Teacher | 92 183 366 732 1464 | 70.76 74.53 76.43 77.68 78.15 |
na2023, slides 1, #Params | Supervised-only | all | 43.6 | suspicious
na2023, slides 1, #Params | PseudoSeg | all | 43.6 | suspicious
na2023, slides 1, #Params | PC2Seg | all | 43.6 | suspicious
na2023, slides 1, #Params | AugSeg | all | 43.6 | suspicious
na2023, slides 1, #Params | UniMatch | all | 43.6 | suspicious
na2023, slides 1, #Params | Dual Teacher | all | 43.6 | suspicious
ke2020, PixelSSL README, PSPNet | SupOnly | 1/16 1/8 1/4 1/2 | 61.90 67.06 69.78 72.89 |
ke2020, PixelSSL README, PSPNet | CutMix | 1/16 1/8 1/4 1/2 | 69.21 70.82 71.69 73.86 |
zhao2023, logs, VOC fine | AugSeg | 92 | 71.09 65.05 |
yang2023, logs, VOC augmented, crop 321 | UniMatch, run 1 | 662 | 76.91 76.02 |
chen2021, issue 14 | CPS with CutMix, paper | 1323 | 73.67 | copied
"""


@pytest.mark.parametrize("line", PRINTED.strip().splitlines())
def test_the_digits_of_the_papers(line):
    place, method, labels, digits, flag = (part.strip() for part in line.split("|"))
    source, table = place.split(", ", 1)
    cells = [c for c in load(source, table, method=method) if c.labels in labels.split()]
    assert [c.value or "-" for c in cells] == digits.split()
    assert {c.flag for c in cells} == {flag}


def test_every_flagged_cell_of_the_four_papers_is_among_them():
    asked = [[part.strip() for part in line.split("|")] for line in PRINTED.strip().splitlines()]
    asked = {(a[0], a[1], label) for a in asked for label in a[2].split()}
    four = [c for s in ("jin2022", "cho2024", "liu2022", "na2023") for c in load(s) if c.flag]
    assert {(f"{c.source}, {c.table}", c.method, c.labels) for c in four} <= asked


def test_standard_deviations_stand_with_their_means():
    given = {(c.table, c.value): c.std for c in load("jin2022") if c.std}
    ours = ["0.53", "0.45", "0.48", "0.33", "0.35", "0.31", "0.28", "0.33", "0.24"]
    assert list(given.values()) == ours
    assert given["1", "70.02"] == "0.53" and given["2", "81.01"] == "0.24"


@pytest.mark.parametrize("source", COUNTS)
def test_as_many_cells_as_each_table_has(source):
    assert Counter(c.table for c in load(source)) == COUNTS[source]


AT_A_PLACE = ("value", "std", "flag", "note")


def test_every_cell_has_a_place_and_stands_once():
    cells = load()
    assert len(cells) == len(set(cells))
    places = Counter(tuple(v for k, v in asdict(c).items() if k not in AT_A_PLACE) for c in cells)
    assert max(places.values()) == 1
    bib = (ROOT / "book/references.bib").read_text("utf8")
    assert {c.source for c in cells} <= set(re.findall(r"^@\w+\{([^,]+),", bib, re.M))
    for file in published.PUBLISHED.glob("*.csv"):
        assert {c.source for c in load(file.stem)} == {file.stem}
        assert file.read_text("utf8").count("\n") == len(load(file.stem)) + 1


@pytest.mark.parametrize(
    ("source", "tables", "paper"),
    [
        ("jin2022", None, "gta_seg.txt"),
        ("cho2024", None, "gps_supplementary.txt"),
        ("liu2022", "supplementary 1", "psmt_supplementary.txt"),
        ("na2023", None, "dual_teacher_slides.txt"),
    ],
)
def test_every_digit_stands_in_the_text_of_the_paper(shared, source, tables, paper):
    text = set(re.findall(r"\d+\.\d+", shared("papers", paper).read_text("utf8")))
    cells = load(source, tables)
    assert {c.value for c in cells if c.value} | {c.std for c in cells if c.std} <= text


# Not cells: a rounding of RankMatch's in the reference's column of checks, and the like.
DERIVED = {"| Supervised-only |": {"64.2", "72.1", "76.1", "78.8"}}


@pytest.mark.parametrize(
    ("file", "begin", "end", "sources"),
    [
        ("gta_u2pl.md", "**Table 1. VOC", "Reading aids", ("jin2022", "wang2022")),
        ("psmt_gps_cps.md", "**GPS Table 1**", "**CPS** R50", ("cho2024", "liu2022")),
        ("psmt_gps_cps.md", "**PixelSSL README**", "## 11", ("ke2020",)),
        ("dual_unimatch.md", "| Supervised-only |", "Garbled/", ("na2023", "yang2023", "shin2024")),
        ("dual_unimatch.md", "| DAW, NeurIPS", "| Beyond Pixels", ()),
        ("dual_unimatch.md", "Official logs [V]", "Cityscapes R50", ("yang2023",)),
        ("dual_unimatch.md", "(d) logs [V]", "Params (nclass", ("yang2025",)),
        ("dual_unimatch.md", "Logs R101 fine", "Reported figures", ("zhao2023",)),
    ],
)
def test_nothing_the_reference_transcribes_is_missing(shared, file, begin, end, sources):
    text = shared("reference", file).read_text("utf8")
    part = text[text.index(begin) : text.index(end)]
    asked = set(re.findall(r"(?<![\d.~])[4-9]\d\.\d{1,2}(?![\d.]|M)", part)) - DERIVED.get(
        begin, set()
    )
    known = {c.value for s in sources for c in load(s)} or {c.value for c in load()}
    assert len(asked) > 3 and asked <= known


GOOD = asdict(Cell(*(f.name for f in fields(Cell)[:8]), "70.5", "0.3", "best", "", ""))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"flag": "typo"}, "flag 'typo'"),
        ({"value": "7O.5"}, "value '7O.5'"),
        ({"value": "-70.5"}, "value '-70.5'"),
        ({"std": "±0.3"}, "std '±0.3'"),
        ({"epoch": "80"}, "epoch '80'"),
        ({"source": ""}, "source ''"),
        ({"table": ""}, "table ''"),
        ({"flag": "lost", "note": "why"}, "flag 'lost'"),
        ({"value": "", "std": ""}, "value ''"),
        ({"value": "", "flag": "lost", "note": "why"}, "value ''"),
        ({"flag": "copied"}, "without a note"),
    ],
)
def test_a_malformed_row_is_refused_with_its_line(tmp_path, monkeypatch, change, word):
    monkeypatch.setattr(published, "PUBLISHED", tmp_path)
    rows = [GOOD, GOOD | {"method": "other"} | change]
    lines = [",".join(GOOD), *(",".join(row.values()) for row in rows)]
    (tmp_path / "source.csv").write_text("\n".join(lines), "utf8")
    with pytest.raises(ValueError, match=f"source.csv, line 3: .*{re.escape(word)}"):
        load()
    (tmp_path / "source.csv").write_text("\n".join(lines[:2]), "utf8")
    assert [asdict(c) for c in load()] == [GOOD]


def test_a_row_too_short_or_a_strange_header_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(published, "PUBLISHED", tmp_path)
    (tmp_path / "a.csv").write_text(",".join(GOOD) + "\nonly,three,fields\n", "utf8")
    with pytest.raises(ValueError, match="a.csv, line 2"):
        load()
    (tmp_path / "a.csv").write_text("source,value\na,70.5\n", "utf8")
    with pytest.raises(ValueError, match="a.csv: the first line is not source,table,"):
        load()


def test_what_nobody_published_is_refused_and_what_is_there_is_named():
    with pytest.raises(ValueError, match="'table': '10'.* 9"):
        load("jin2022", "10")


def test_a_table_shows_lost_cells_and_lists_its_notes():
    table = pivot(load("jin2022", "3"), "Cityscapes")
    assert table.header == ["method", "100", "186", "372", "744"]
    assert table.rows == [["GTA-Seg", *["lost [1]"] * 4]]
    assert repr(table).splitlines()[-1].startswith("[1] lost: ")
    assert table._repr_html_().index("</table>") < table._repr_html_().index("[1] lost: ")


def test_a_table_has_columns_for_what_differs_and_blanks_for_what_is_not_printed():
    table = pivot(load("zhao2023", "logs, VOC augmented"))
    assert table.header == ["method", "lists", "662"]
    assert [row[1] for row in table.rows] == ["cps", "u2pl"]
    table = pivot(load("yang2025", "README, VOC") + load("than2025"))
    assert table.header[:2] == ["method", "network"]
    assert table.rows[-1][-5:] == ["", "", "87.1 [2]", "89.2 [2]", "89.8 [2]"]
    ours = pivot(load("jin2022", "1", method="GTA-Seg")).rows
    assert ours == [["GTA-Seg", "70.02 ± 0.53", "73.16 ± 0.45", "75.57 ± 0.48", *ours[0][4:]]]


def test_two_cells_never_share_a_place():
    with pytest.raises(ValueError, match="two cells for GTA-Seg with 92 labels"):
        pivot(2 * load("jin2022", "1", method="GTA-Seg"))


def test_our_numbers_stand_beside_with_differences_on_either_side():
    names = {"no re-weighting": {0: 30.0, 1: 31.0}}
    full = "confidence and Laplace smoothing"
    ours = names | {full: {0: 31.0, 1: 33.0, 2: 80.0}}  # draw 2 has no partner
    table = beside(load("jin2022", "9"), ours, full, "Table 9.")
    assert table.header[-4:] == ["difference", "ours", "runs", "our difference"]
    first, confidence, last = ([str(v) for v in row[-4:]] for row in table.rows)
    assert first[:3] == ["-1.06", "30.5 ± 0.7", "2"] and first[3].startswith("-1.5 [")
    assert confidence == ["-2.49", "", "", ""]  # not run
    assert last == ["", "48.0 ± 27.7", "3", ""]
    assert table.caption == f"Table 9. Differences are to: {full}."
    assert table.notes == pivot(load("jin2022", "9")).notes


def test_a_lost_number_has_no_difference():
    lost = load("jin2022", "3")[0]
    named = Cell(**{**asdict(lost), "method": "base", "value": "50.0", "flag": "", "note": ""})
    table = beside([lost, named], {}, "base")
    assert [row[-4] for row in table.rows] == ["", ""]


@pytest.mark.parametrize(
    ("table", "ours", "base", "said"),
    [
        ("9", {}, "ours", "method='ours': choose no re-weighting or confidence or"),
        ("9", {"GTA": {0: 1.0}}, "confidence", "method='GTA': choose"),
        ("1", {}, "SupOnly", "cells of 5 label counts: select one"),
    ],
)
def test_beside_names_what_is_wrong(table, ours, base, said):
    with pytest.raises(ValueError, match=said):
        beside(load("jin2022", table), ours, base)


def record(protocol: str, labeled: int, miou: float) -> dict:
    networks = {"teacher": {"last": {"miou": miou}, "best": {"miou": miou + 1}}}
    config = {"protocol": protocol, "labeled": labeled}
    return {"config": config, "deployed": "teacher", "networks": networks}


def test_our_records_stand_under_the_column_of_their_list():
    found = [
        record("voc-u2pl-662-gta_seg", 662, 50.0),
        record("voc-u2pl-662-gta_seg", 662, 52.0),
        record("voc-u2pl-2646-gta_seg", 2646, 60.0),  # printed as 2645
        record("voc-cps-1323-gta_seg", 1323, 70.0),  # another list
        record("voc-u2pl-5291", 5291, 70.0),  # another recipe
    ]
    table = above(load("jin2022", "2"), {"paper": found, "code": []}, "voc-u2pl-*-gta_seg")
    places = [table.header.index(labels) for labels in ("662", "1323", "2645", "5291")]
    paper, code = table.rows[-2:]
    two, one = "51.0 ± 1.4 (n = 2; best 52.0 ± 1.4)", "60.0 (n = 1; best 61.0)"
    assert [paper[i] for i in places] == [two, "", one, ""]
    assert [str(value) for value in code] == ["code"] + [""] * (len(table.header) - 1)
    assert len({len(row) for row in [table.header, *table.rows]}) == 1


def test_remarks_name_coarser_rows_and_leaders():
    said = remarks(load("na2023", "slides 1"))
    assert said.startswith("Fewer decimals than the other rows: UniMatch.")
    assert "92: UniMatch, 183: Dual Teacher" in said and said.endswith("1464: AugSeg.")
    assert remarks(load("cho2024", "1b")).startswith("The highest number")


def test_a_spread_is_told_beside_what_chance_would_make_of_it():
    two = [Cell(**{**asdict(load("cho2024", "1a")[0]), "value": v}) for v in ("70.00", "71.00")]
    said = spread(two)  # the mean distance of two normal draws is 2 / sqrt(pi) deviations
    assert "of the 2 numbers it is 1.00 points" in said and "deviation of 0.89 points" in said
    thirteen = spread(load("cho2024", "1a"))  # 3.336: Tippett's table
    assert "of the 13 numbers it is 1.12 points" in thirteen
    assert f"deviation of {1.12 / 3.336:.2f} points" in thirteen
    with pytest.raises(ValueError, match=re.escape("1 number(s): a spread needs two")):
        spread(two[:1])


def test_systems_that_printed_names_mean_exist_on_both_sides():
    printed = {c.method for c in load()}
    for name, ours in (published.OURS | published.PIXELSSL).items():
        method, _, preset = ours.partition(", ")
        assert name in printed and (preset or "paper") in METHODS[method].presets, name


def test_columns_have_our_names_and_the_first_number_of_each():
    found = columns(load())
    classic = found["jin2022", "1", "voc", "ResNet-101 DeepLabV3+", "183"]
    assert {"supervised": "54.92", "cutmix_mt": "63.47", "gta_seg": "73.16"}.items() <= {
        name: cell.value for name, cell in classic.items()
    }.items()
    place = "ke2020", "PixelSSL README, PSPNet", "voc", "ResNet-101 PSPNet, COCO", "1/8"
    assert set(found[place]) == {"supervised", "mean_teacher", "cct", "gct", "cutmix_seg"}
    logs = found["yang2025", "logs, VOC", "voc", "DINOv2-Base DPT", "92"]
    assert logs["unimatch_v2"].value == "86.29", "of two epochs, the one that stands first"
    assert not any(table == "slides 1, #Params" for _, table, *_ in found), "parameters, not mIoU"
