"""The claims ledger: quotes are literal, and verdicts are what records and tables give."""

from __future__ import annotations

import ast
import json
import re
import shutil

import pytest
from conftest import ROOT

from s4lib import records
from s4lib.book import claims, published
from s4lib.book.claims import NOT, PARTLY, REPRODUCED, UNTESTED, evaluate, load
from s4lib.build import build_method, method_source
from s4lib.evaluate import evaluated
from s4lib.protocols import protocol

LEDGER = load()
BY_ID = {claim.id: claim for claim in LEDGER}
TEXTS = {
    "jin2022": "gta_seg.txt",
    "cho2024": "gps_supplementary.txt",
    "liu2022": "psmt_supplementary.txt",
    "na2023": "dual_teacher_slides.txt",
}
HEAD = (
    "setting: mosaic-32\nruns:\n  a: {method: supervised}\n  b: {method: supervised, batch: 16}\n"
)


def made(claim, ours: list[float], base: list[float], **changes) -> list[dict]:
    """Records of both sides of a claim, one per draw, with these scores where it looks at them."""
    found: dict[str, dict] = {}
    for run, values in zip(claim.runs, (ours, base), strict=True):
        for draw, value in enumerate(values):
            config = protocol(claim.setting, draw=draw, seed=draw, **run.changes)
            record = found.setdefault(
                config.run_id,
                {
                    "run_id": config.run_id,
                    "config": config.to_dict(),
                    "deployed": "deployed",
                    "networks": {},
                    "method_source": method_source(config.method, config.dataset),
                },
            )
            for network in run.network or ["deployed"]:
                scores = record["networks"].setdefault(network, {})
                scores[run.when] = {"miou": value}
            for other in (r for c in LEDGER for r in c.runs if r.changes == run.changes):
                for network in other.network or ["deployed"]:
                    scores = record["networks"].setdefault(network, {})
                    scores.setdefault(other.when, {"miou": 0.0})
    return [record | changes for record in found.values()]


def verdict(id: str, ours: list[float], base: list[float], **changes) -> claims.Verdict:
    (found,) = evaluate([BY_ID[id]], made(BY_ID[id], ours, base, **changes))
    return found


def ledger(tmp_path, entry: str):
    path = tmp_path / "ledger.yaml"
    path.write_text(f"{HEAD}claims:\n  - {{paper: jin2022, where: w, quote: q, {entry}}}\n")
    return path


# ---- the ledger


@pytest.mark.parametrize("paper", TEXTS)
def test_quotes_and_figures_stand_in_the_text(shared, paper):
    text = " ".join(shared("papers", TEXTS[paper]).read_text("utf8").split())
    for claim in (c for c in LEDGER if c.paper == paper):
        assert " ".join(claim.quote.split()) in text, claim.id
        for number in re.findall(r"\d+(?:\.\d+)?", claim.figure):
            assert re.search(rf"(?<![\d.]){re.escape(number)}(?![\d.]*\d)", text), claim.id


def test_every_text_has_claims_and_every_statistic_is_used():
    assert {c.paper for c in LEDGER} == set(TEXTS)
    assert {c.statistic for c in LEDGER} == set(claims.STATISTICS)
    ids = re.findall(r"^  - id: (.*)$", claims.CLAIMS.read_text("utf8"), re.M)
    assert ids == list(BY_ID) and all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", i) for i in ids)
    bib = (ROOT / "book/references.bib").read_text("utf8")
    assert set(TEXTS) <= set(re.findall(r"^@\w+\{([^,]+),", bib, re.M))


def test_ids_that_notes_name_exist():
    for claim in LEDGER:
        named = re.findall(r"\b(?:gta|gps|psmt|dual)-[a-z0-9-]+", claim.note)
        assert set(named) <= set(BY_ID), claim.id


RUNS = {str(sorted(run.changes.items())): run.changes for c in LEDGER for run in c.runs}


@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS.keys())
def test_every_run_can_be_made_and_has_the_networks_named(changes):
    networks = evaluated(build_method(protocol("mosaic-smoke", **changes), 8))
    for run in (run for c in LEDGER for run in c.runs if run.changes == changes):
        assert set(run.network) <= set(networks)


def test_every_run_is_named_once_and_used():
    import yaml

    runs = yaml.safe_load(claims.CLAIMS.read_text("utf8"))["runs"]
    assert len({json.dumps(r, sort_keys=True) for r in runs.values()}) == len(runs)
    assert set(runs) == {run.name for c in LEDGER for run in c.runs}


# ---- verdicts from records


@pytest.mark.parametrize(
    ("ours", "word"),
    [
        ([42.0, 43.0, 42.5], REPRODUCED),
        ([42.0, 43.0, 39.0], PARTLY),
        ([42.0], PARTLY),
        ([38.0, 40.5, 39.0], NOT),
        ([38.0, 38.1, 38.2], NOT),
        ([40.0, 40.0], NOT),
        ([], UNTESTED),
    ],
)
def test_higher_takes_the_interval_for_a_reproduction(ours, word):
    found = verdict("gta-predictor", ours, [40.0] * 3)
    assert found.word == word
    if ours:
        difference = found.difference
        assert difference.values == pytest.approx([v - 40 for v in ours])
        assert f"{difference}" in found.found and f"n = {len(ours)}" in found.found


@pytest.mark.parametrize(
    ("ours", "word"),
    [
        ([40.1, 39.9, 40.2], REPRODUCED),
        ([40.1, 39.0, 41.5], PARTLY),
        ([40.1], PARTLY),
        ([41.5, 41.6, 41.4], NOT),
        ([38.5, 38.4, 38.6], NOT),
    ],
)
def test_similar_takes_the_interval_within_the_margin(ours, word):
    assert BY_ID["gta-code"].within == 1
    assert verdict("gta-code", ours, [40.0] * 3).word == word


def test_runs_are_paired_within_label_draws():
    spread = verdict("gta-predictor", [31.0, 41.2, 51.1], [30.0, 40.0, 50.0])
    assert spread.word == REPRODUCED and spread.difference.mean == pytest.approx(1.1)


def test_a_verdict_says_where_it_holds():
    found = verdict("gta-predictor", [41.0, 42.0], [40.0] * 2)
    assert found.holds == "on mosaic-32, a tiny network and synthetic images, not for VOC"
    assert found.found.startswith("GTA-Seg minus GTA-Seg with EMA of everything: +1.5 [")


def test_editing_a_record_changes_the_verdict(tmp_path):
    claim, path = BY_ID["gps-feedback"], tmp_path / "records.jsonl"

    def word(lines: list[dict]) -> str:
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return evaluate([claim], records.load(path))[0].word

    found = made(claim, [42.0, 43.0, 42.5], [40.0] * 3)
    assert word(found) == REPRODUCED
    found[0]["networks"]["deployed"]["last"]["miou"] = 39.5
    assert word(found) == PARTLY
    found[0]["networks"]["deployed"]["last"]["miou"] = 30.0
    assert word(found) == NOT
    assert word(found[:3]) == UNTESTED


def test_stale_records_never_count():
    found = verdict("gta-predictor", [42.0, 43.0], [40.0] * 2, method_source="older")
    assert found.word == UNTESTED and found.difference is None
    assert "by the present code: GTA-Seg; GTA-Seg with EMA of everything" in found.found
    claim = BY_ID["gta-predictor"]
    lines = made(claim, [42.0, 43.0, 42.5], [40.0] * 3)
    lines[0]["method_source"] = "older"
    assert len(evaluate([claim], lines)[0].difference.values) == 2


def test_records_of_other_settings_and_draws_do_not_count():
    claim = BY_ID["gta-predictor"]
    lines = made(claim, [42.0, 43.0], [40.0] * 2)
    assert evaluate([claim], lines, "mosaic-16")[0].word == UNTESTED
    other = [r for r in lines if "all" in str(r["config"]["method_args"])]
    first = [r for r in lines if r not in other]
    assert evaluate([claim], [first[0], other[1]])[0].word == UNTESTED
    assert evaluate([claim], [first[0], other[0]])[0].word == PARTLY


def test_another_setting_can_be_asked_for():
    claim = BY_ID["gta-predictor"]
    for record in (lines := made(claim, [42.0, 43.0], [40.0] * 2)):
        config = {k: record["config"][k] for k in ("method", "method_args", "draw", "seed")}
        record["config"] = protocol("voc-classic-183-gta_seg", **config).to_dict()
        record["method_source"] = method_source(config["method"], "voc")
    found = evaluate([claim], lines, "voc-classic-183-gta_seg")[0]
    assert found.word == PARTLY and found.holds == "on voc-classic-183-gta_seg"
    with pytest.raises(ValueError, match="protocol='nowhere'"):
        evaluate([claim], lines, "nowhere")


def test_networks_of_one_run_are_compared_and_several_averaged():
    claim = BY_ID["gps-students-better"]
    lines = made(claim, [42.0, 43.0], [40.0] * 2)
    for record in lines:
        record["networks"]["students.1"]["last"]["miou"] -= 1
    assert evaluate([claim], lines)[0].difference.values == pytest.approx([1.5, 2.5])


def test_last_is_compared_with_best_where_a_claim_says_so():
    found = verdict("gps-teacher-kept", [39.5, 39.8, 39.6], [40.0] * 3)
    assert found.word == REPRODUCED
    assert found.found.startswith("teacher of GPS minus teacher of GPS at its best: -0.4 [")


# ---- verdicts from printed tables

ARITHMETIC = {  # computed by hand from the tables as the papers print them
    "gta-large-margin": (REPRODUCED, "+2.04, +2.15, +0.98, +1.04, +0.98"),
    "gta-over-suponly-figures": (REPRODUCED, "+24.25, +18.24, +9.69, +6.68, +7.97"),
    "gta-over-pc2seg-figures": (REPRODUCED, "+13.02, +6.88, +5.79, +5.32, +6.32"),
    "gta-over-strongest-figures": (NOT, "+2.04, +2.15, +0.98, +1.04, +0.98"),
    "gta-augmented": (REPRODUCED, "+0.62, +2.90, +2.51, +0.72"),
    "gta-assistant-figure": (REPRODUCED, "+13.17"),
    "gta-reweighting-figure": (REPRODUCED, "+1.06"),
    "gta-over-teacher-student-figure": (REPRODUCED, "+14.23"),
    "gta-over-suponly-figure": (REPRODUCED, "+18.24"),
    "gta-boost-printed": (REPRODUCED, "+9.15"),
    "gta-superior-printed": (REPRODUCED, "+6.18"),
    "gta-inferior-printed": (REPRODUCED, "+2.61"),
    "gta-teacher-best-printed": (REPRODUCED, "+0.45"),
    "gta-student-on-pseudo-printed": (REPRODUCED, "+6.45"),
    "gta-assistant-on-labels-printed": (REPRODUCED, "+0.88"),
    "gta-steady-printed": (REPRODUCED, "+0.42"),
    "gta-tuned-alpha": (REPRODUCED, "+0.41"),
    "gta-tuned-warm-up": (REPRODUCED, "+0.42"),
    "gps-high-beta-voc": (REPRODUCED, "+0.17"),
    "gps-high-beta-cityscapes": (REPRODUCED, "+0.52"),
    "gps-insensitive-voc": (NOT, "+1.12"),
    "gps-insensitive-cityscapes": (NOT, "+1.33"),
    "psmt-single-printed": (REPRODUCED, "+0.04, +0.11, +0.17, +0.17"),
    "psmt-ensemble-over-single-printed": (REPRODUCED, "+0.04, +0.11, +0.17, +0.17"),
    "dual-best-printed": (PARTLY, "-1.14, +2.03, +0.26, +0.28, -0.67"),
    "dual-over-supervised-printed": (REPRODUCED, "+26.73, +22.27, +14.78, +10.96, +5.21"),
}


def test_arithmetic_over_the_printed_tables():
    found = {v.claim.id: v for v in evaluate([c for c in LEDGER if c.table], [])}
    assert found.keys() == ARITHMETIC.keys()
    for id, (word, gaps) in ARITHMETIC.items():
        assert found[id].word == word and f": {gaps} points at" in found[id].found, id


def test_editing_a_printed_cell_changes_the_verdict(tmp_path, monkeypatch):
    shutil.copytree(published.PUBLISHED, tmp_path / "published")
    monkeypatch.setattr(published, "PUBLISHED", tmp_path / "published")
    table = tmp_path / "published/jin2022.csv"
    table.write_text(table.read_text("utf8").replace("75.57,0.48", "75.60,0.48"), "utf8")
    (found,) = evaluate([BY_ID["gta-over-suponly-figures"]], [])
    assert found.word == PARTLY and "+9.72" in found.found


def test_a_table_that_has_a_method_twice_is_refused():
    with pytest.raises(ValueError, match="two cells for PS-MT with 662 labels in liu2022"):
        published.gaps(published.load("liu2022", "README, VOC augmented"))


def test_claims_without_a_test_say_why():
    for found in evaluate([c for c in LEDGER if c.statistic == "none"], []):
        assert found.word == UNTESTED and found.found == found.claim.note != ""


# ---- a ledger that is wrong


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("id: x-y, statistic: best", "statistic='best': choose higher or similar or"),
        ("id: x-y", "missing 1 required positional argument: 'statistic'"),
        ("id: x-y, statistic: none", "'none' needs a note"),
        ("id: x-y, statistic: none, note: n, setings: s", "unexpected keyword argument 'setings'"),
        ("id: x-y, statistic: none, note: n, figure: 1.5", "figure=1.5: expected str, got float"),
        ("id: x-y, statistic: higher, runs: [{name: a}]", "not enough values to unpack"),
        ("id: x-y, statistic: higher, runs: [{name: a}, {name: c}]", "name='c': choose a or b"),
        (
            "id: x-y, statistic: higher, runs: [{name: a}, {name: b, network: t}]",
            "network='t': expected a list",
        ),
        (
            "id: x-y, statistic: higher, runs: [{name: a}, {name: b, when: first}]",
            "when='first': choose one of last, best",
        ),
        (
            "id: x-y, statistic: higher, setting: m, runs: [{name: a}, {name: b}]",
            "protocol='m': choose one of mosaic-smoke",
        ),
        ("id: x-y, statistic: printed higher, table: T", "nothing published has"),
        (
            "id: x-y, statistic: printed higher, table: '6', rows: [Teacher]",
            "method='Teacher': choose Gentle Teaching Assistant or",
        ),
        (
            "id: x-y, statistic: printed margin, table: '6', rows: [Teacher Model]",
            "figure='': give one for each of 183",
        ),
        (
            "id: x-y, statistic: printed higher, table: '3', rows: [GTA-Seg]",
            "none of these cells has a value",
        ),
    ],
)
def test_a_malformed_claim_is_named_in_one_line(tmp_path, entry, message):
    path = ledger(tmp_path, entry)
    with pytest.raises(ValueError) as error:
        load(path)
    text = str(error.value)
    assert text.startswith(f"{path}, x-y: ") and message in text and "\n" not in text


def test_an_id_stands_once(tmp_path):
    path = ledger(tmp_path, "id: x-y, statistic: none, note: n")
    path.write_text(path.read_text() + path.read_text().splitlines()[-1] + "\n")
    with pytest.raises(ValueError, match=r"ledger\.yaml, x-y: two claims have this id"):
        load(path)


# ---- the page


def page(**parameters) -> str:
    """What the notebook's cells show, as text."""
    notebook = json.loads((ROOT / "notebooks/claims.ipynb").read_text("utf8"))
    names: dict = {}
    shown = []
    for cell in (c for c in notebook["cells"] if c["cell_type"] == "code"):
        *body, last = ast.parse("".join(cell["source"])).body
        final = isinstance(last, ast.Expr)
        exec(compile(ast.Module(body if final else [*body, last], []), cell["id"], "exec"), names)
        if final:
            result = eval(compile(ast.Expression(last.value), cell["id"], "eval"), names)
            shown.append(getattr(result, "data", None) or repr(result))
        if "parameters" in cell["metadata"].get("tags", []):
            names |= parameters
    return "\n".join(shown)


@pytest.fixture
def agg():
    pytest.importorskip("IPython")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    yield pyplot
    pyplot.close("all")


def test_the_page_shows_all_claims(agg, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "COMMITTED", tmp_path)
    text = page()
    for claim in LEDGER:
        assert f"`{claim.id}`" in text and claim.quote in text
    assert f"**{len(LEDGER)} claims**, 0 records" in text


def test_the_page_computes_its_verdicts(agg, tmp_path, monkeypatch):
    lines = made(BY_ID["gta-predictor"], [42.0, 43.0, 42.5], [40.0] * 3)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(records, "COMMITTED", tmp_path)
    text = page()
    (entry,) = re.findall(r"- \*\*(.*)\*\*: .*`gta-predictor`", text)
    assert entry == REPRODUCED and "1 reproduced" in text and "3 to 3 label draws" in text
    assert len(agg.get_fignums()) == 1


def test_the_page_takes_another_setting_and_ledger(agg, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "COMMITTED", tmp_path)
    path = ledger(tmp_path, "id: x-y, statistic: higher, runs: [{name: a}, {name: b}]")
    text = page(ledger=str(path), setting="voc-classic-183-gta_seg")
    assert "**1 claims**" in text and "`x-y`" in text
    assert "by the present code: a; b, on voc-classic-183-gta_seg" in text
