"""Splits by rule, and published lists: known by hash, imported from clones, refused if altered."""

from __future__ import annotations

import csv
import functools
import hashlib
import http.server
import io
import re
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from trees import VOC_SBD, VOC_TRAIN, write_voc

from s4lib.build import open_data
from s4lib.cli import main
from s4lib.data import importing, lists, open_dataset
from s4lib.data.lists import Published
from s4lib.data.splits import RULES, _rarest_first, split
from s4lib.trainer import fit

ALL = {
    "voc": VOC_TRAIN + VOC_SBD,
    "cityscapes": [f"{c}_{i:06d}_000019" for c in ("aachen", "ulm") for i in range(9)],
}
LABELS = {
    "voc": {"cps-3": ALL["voc"][2:5], "u2pl-3": ALL["voc"][:3], "u2pl-2": ALL["voc"][6:]},
    "cityscapes": {"cps-4": ALL["cityscapes"][3:7], "u2pl-4": ALL["cityscapes"][:4]},
}
SHIPPED = {"cps-3": "pascal/1_16", "u2pl-3": "pascal/3", "u2pl-2": "pascal/2"}


def row(dataset: str, name: str, role: str, ids: list[str]) -> Published:
    shipped = (f"X:{SHIPPED.get(name, f'cityscapes/{name}')}",)
    return Published(dataset, name, role, len(ids), lists.sha256(ids), f"X/{name}.txt", shipped)


TABLE = {
    dataset: (
        *(row(dataset, name, "labeled", ids) for name, ids in LABELS[dataset].items()),
        row(dataset, "all", "whole", ALL[dataset]),
    )
    for dataset in ALL
}


@pytest.fixture
def small(monkeypatch):
    """Published lists of a few images in place of the real ones, and a cache in a folder."""
    monkeypatch.setattr(lists, "published", lambda dataset: TABLE.get(dataset, ()))


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "s4book" / "splits"


def rest(dataset: str, ids: list[str]) -> list[str]:
    return [one for one in ALL[dataset] if one not in ids]


# ---------------------------------------------------------------- drawn by rule


@pytest.fixture
def mosaic():
    return open_dataset("mosaic", "train", size=(32, 32))


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_partitions_and_follows_its_draw(mosaic, rule):
    drawn = [split(mosaic, "mosaic", 12, draw, name=rule) for draw in (0, 1)]
    for s in drawn:
        assert len(s.labeled) == 12 and sorted(s.labeled + s.unlabeled) == list(range(512))
    assert drawn[0] == split(mosaic, "mosaic", 12, 0, name=rule) != drawn[1]
    assert len(split(mosaic, "mosaic", 12, 0, 40, rule).unlabeled) == 40


@pytest.mark.parametrize("rule", ["nested-plain", "nested-balanced"])
@pytest.mark.parametrize("draw", [0, 1])
def test_smaller_nested_sets_are_part_of_the_larger(mosaic, rule, draw):
    sets = [set(split(mosaic, "mosaic", n, draw, name=rule).labeled) for n in (4, 9, 30, 100, 512)]
    assert all(a < b for a, b in zip(sets, sets[1:], strict=False))


def test_plain_draws_of_different_sizes_are_independent(mosaic):
    small, large = (set(split(mosaic, "mosaic", n, 0, name="plain").labeled) for n in (20, 40))
    assert not small <= large


@pytest.mark.parametrize("rule", ["balanced", "nested-balanced"])
def test_balanced_draws_show_the_rarest_class_more_often_than_plain_ones(mosaic, rule):
    def rarest(name: str, draw: int) -> int:
        s = split(mosaic, "mosaic", 10, draw, name=name)
        shown = [mosaic.label(i).unique().tolist() for i in s.labeled]
        return min(sum(k in some for some in shown) for k in range(len(mosaic.classes)))

    balanced, plain = (np.mean([rarest(n, d) for d in range(6)]) for n in (rule, "plain"))
    assert balanced > plain + 0.5


def test_the_next_image_shows_the_class_labeled_least():
    class Order:
        def permutation(self, n):
            return np.arange(n)

    present = np.array([[1, 0, 0], [1, 0, 0], [1, 1, 0], [1, 0, 0], [0, 1, 0]])
    # 0 is the first with class 0; then class 1 is at zero: 2; then at one against two: 4. Now class
    # 1 has no image left: 1, 3. Class 2 is in no image and asks for none.
    assert _rarest_first(present, 5, Order()) == [0, 2, 4, 1, 3]
    assert _rarest_first(np.zeros((3, 2), dtype=int), 2, Order()) == [0, 1]


def test_mosaic_and_camvid_keep_the_rules_they_had(mosaic, camvid):
    frames = open_dataset("camvid", "train", root=str(camvid))
    assert split(mosaic, "mosaic", 8, 0) == split(mosaic, "mosaic", 8, 0, name="balanced")
    assert split(frames, "camvid", 2, 1) == split(frames, "camvid", 2, 1, name="spread")


def test_a_rule_names_the_run(tiny, tmp_path):
    config = tiny(split="nested-plain", epochs=1)
    assert config.run_id != tiny(epochs=1).run_id
    record = fit(config, out=tmp_path)
    assert record["config"]["split"] == "nested-plain"
    assert record["split_sha256"] == open_data(config)[1].sha256
    assert record["split_sha256"] != open_data(tiny())[1].sha256


# ---------------------------------------------------------------- the table


def test_the_table_says_what_the_audit_found(shared):
    text = shared("reference", "splits.md").read_text()
    found: dict[tuple, set] = {}
    dataset = ""
    for line in text.splitlines():
        if line.startswith("### "):
            dataset = {"PASCAL": "voc", "Cityscapes": "cityscapes"}.get(
                re.split("[ :]", line)[1], ""
            )
        match = re.match(r"\| (\d+) \| `([0-9a-f]{64})` \| (.+) \|$", line)
        if match and dataset:
            key = dataset, int(match[1]), match[2]
            found[key] = found.get(key, set()) | set(match[3].split(", "))
    ours = {
        (d, p.images, p.sha256): set(p.shipped_by)
        for d in ("voc", "cityscapes")
        for p in lists.published(d)
    }
    assert len(found) == 48 and ours == found


@pytest.mark.parametrize("dataset", ["voc", "cityscapes"])
def test_the_table_is_consistent(dataset):
    table = lists.published(dataset)
    for field in ("name", "sha256", "download"):
        assert len({getattr(p, field) for p in table}) == len(table)
    for p in table:
        assert p.role == "whole" or p.name.split("-")[1] == str(p.images)
        assert re.fullmatch(r"[\w-]+/[\w-]+/[0-9a-f]{8}/.+\.txt", p.download)
        assert not set(RULES) & {p.name}
    assert sum(p.name == "all" for p in table) == 1
    with open(Path(lists.__file__).with_name("published.csv")) as file:
        assert {row["dataset"] for row in csv.DictReader(file)} == {"voc", "cityscapes"}


def test_the_hash_is_that_of_sorted_lines():
    wanted = hashlib.sha256(b"2007_000032\n2007_000039\n").hexdigest()
    assert lists.sha256(["2007_000039", "2007_000032"]) == wanted


# ---------------------------------------------------------------- lines and layouts


@pytest.mark.parametrize(
    ("dataset", "line", "wanted"),
    [
        ("voc", "2007_000032", "2007_000032"),
        ("voc", "JPEGImages/2007_000032.jpg SegmentationClass/2007_000032.png", "2007_000032"),
        ("voc", "/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png", "2007_000032"),
        (
            "cityscapes",
            "leftImg8bit/train/ulm/ulm_000001_000019_leftImg8bit.png "
            "gtFine/train/ulm/ulm_000001_000019_gtFine_labelTrainIds.png",
            "ulm_000001_000019",
        ),
        (
            "cityscapes",
            "/images/train/ulm_000001_000019.png\t/segmentation/train/ulm_000001_000019_gtFine.png",
            "ulm_000001_000019",
        ),
        ("folder", "a/photo 01", "a/photo 01"),
    ],
)
def test_lines_are_reduced_to_ids(dataset, line, wanted):
    assert lists.image_ids(f"\n{line}\r\n", dataset) == [wanted]


@pytest.mark.parametrize(
    ("dataset", "line"),
    [("voc", "ulm_000001_000019"), ("voc", "12007_000032"), ("cityscapes", "2007_000032")],
)
def test_lines_of_another_dataset_are_refused(dataset, line):
    with pytest.raises(ValueError, match=f"{line!r} holds no {dataset} image id"):
        lists.image_ids(line, dataset)


def pair(one: str) -> str:
    return f"JPEGImages/{one}.jpg SegmentationClass/{one}.png"


def left(one: str) -> str:
    return f"leftImg8bit/train/{one.split('_')[0]}/{one}_leftImg8bit.png"


def tabs(one: str) -> str:
    return f"/images/train/{one}.png\t/segmentation/train/{one}_gtFine.png"


# repository: dataset, list, path of its labeled and of its unlabeled file, line of an id, line end
LAYOUTS: dict[str, tuple[str, str, str, str, Callable[[str], str], str]] = {
    "UniMatch": ("voc", "u2pl-3", "splits/pascal/3/{}.txt", "", pair, "\n"),
    "UniMatch city": ("cityscapes", "cps-4", "splits/cityscapes/1_4/{}.txt", "", left, "\n"),
    "U2PL": ("voc", "u2pl-3", "data/splits/pascal/3/{}.txt", "", str, "\n"),
    "U2PL city": ("cityscapes", "u2pl-4", "data/splits/cityscapes/4/{}.txt", "", left, "\n"),
    "ST++": ("voc", "cps-3", "dataset/splits/pascal/1_16/split_0/{}.txt", "", pair, "\n"),
    "CPS": (
        *("voc", "cps-3", "DATA/pascal_voc/subset_train_aug/train_aug_{}_1-16.txt", ""),
        *(str, "\r\n"),
    ),
    "CPS city": (
        *("cityscapes", "cps-4", "DATA/city/config_new/subset_train/train_aug_{}_1-4.txt", ""),
        *(tabs, "\n"),
    ),
    "PS-MT": (
        "cityscapes",
        "cps-4",
        "CityCode/DataLoader/city_splits/4_train_{}.txt",
        "sup",
        left,
        "\n",
    ),
    "AugSeg": ("voc", "u2pl-3", "data/splitsall.tar.gz/pascal_u2pl/3/{}.txt", "", str, "\n"),
    "PseudoSeg": ("voc", "cps-3", "data_splits/pascal_voc_seg/16_clean_3.txt", "alone", str, "\n"),
}


def write_clone(root: Path, files: dict[str, str]) -> Path:
    """Files of a clone; those below a .tar.gz are put into it."""
    for path, text in files.items():
        if ".tar.gz/" in path:
            archive, member = path.split(".tar.gz/")
            place = root / f"{archive}.tar.gz"
            place.parent.mkdir(parents=True, exist_ok=True)
            inside = {p.split(".tar.gz/")[1]: t for p, t in files.items() if ".tar.gz/" in p}
            with tarfile.open(place, "w:gz") as file:
                for member, text in inside.items():
                    info = tarfile.TarInfo(member)
                    info.size = len(text.encode())
                    file.addfile(info, io.BytesIO(text.encode()))
            continue
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(text.encode())
    return root


def clone(layout: str, labeled: list[str] | None = None, unlabeled: list[str] | None = None):
    """{path: text} of one list and its partner in a repository's layout."""
    dataset, name, path, kind, line, end = LAYOUTS[layout]
    labeled = LABELS[dataset][name] if labeled is None else labeled
    unlabeled = rest(dataset, LABELS[dataset][name]) if unlabeled is None else unlabeled
    text = lambda ids: end.join(line(one) for one in ids[::-1])  # noqa: E731
    if kind == "alone":
        return {path: text(labeled)}
    words = ("supervised", "unsupervised") if kind else ("labeled", "unlabeled")
    return {path.format(w): text(ids) for w, ids in zip(words, (labeled, unlabeled), strict=True)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_list_is_recognised_in_every_repositorys_layout(tmp_path, small, layout):
    dataset, name = LAYOUTS[layout][:2]
    others = {"requirements.txt": "torch==1.7\n", "README.md": "2007_000032\n"}
    source = write_clone(tmp_path / "clone", {**others, **clone(layout)})
    taken, refused = importing.collect(source, dataset, tmp_path / "into")
    assert list(taken.values()) == [name] and refused == {}
    stored = (tmp_path / "into" / dataset / f"{name}.txt").read_bytes()
    assert stored.decode().split() == sorted(LABELS[dataset][name])
    assert hashlib.sha256(stored).hexdigest() == next(
        p.sha256 for p in TABLE[dataset] if p.name == name
    )


def test_a_clone_gives_all_its_lists_of_one_dataset(tmp_path, small):
    files = {
        **clone("UniMatch"),
        **clone("UniMatch city"),
        "splits/pascal/train_aug.txt": "\n".join(map(pair, ALL["voc"])),
        "splits/pascal/notes.txt": "of 2007_000032 and others\n",
    }
    source = write_clone(tmp_path / "clone", files)
    taken, refused = importing.collect(source, "voc", tmp_path / "into")
    assert sorted(taken.values()) == ["all", "u2pl-3"] and refused == {}
    assert list(importing.collect(source, "cityscapes", tmp_path / "into")[0].values()) == ["cps-4"]


ONE, TWO, THREE = LABELS["voc"]["u2pl-3"]
OTHERS = rest("voc", LABELS["voc"]["u2pl-3"])

# What is wrong with the list u2pl-3 (labeled, unlabeled), and words of the line that refuses it.
ALTERED = {
    "empty": ([], OTHERS, ["empty"]),
    "changed": ([ONE, TWO, OTHERS[0]], OTHERS, ["unlabeled", OTHERS[0]]),
    "exchanged": (
        *([ONE, TWO, OTHERS[0]], [THREE, *OTHERS[1:]]),
        ["unknown", "u2pl-3", f"lacks {THREE}", f"adds {OTHERS[0]}"],
    ),
    "removed": ([ONE, TWO], OTHERS, ["unknown", "u2pl-3", f"lacks {THREE}"]),
    "doubled": ([ONE, TWO, THREE, ONE], OTHERS, [f"{ONE} is listed twice"]),
    "moved": ([ONE, TWO], [THREE, *OTHERS], ["unknown", f"lacks {THREE}"]),
    "overlapping": ([ONE, TWO, THREE], [ONE, *OTHERS], ["1 image is both", ONE]),
    "unlabeled lacks one": ([ONE, TWO, THREE], OTHERS[1:], ["7 images together", "the 8 of voc"]),
    "unlabeled empty": ([ONE, TWO, THREE], [], ["unlabeled.txt: empty"]),
    "unlabeled doubled": ([ONE, TWO, THREE], [*OTHERS, OTHERS[0]], ["listed twice"]),
}


@pytest.mark.parametrize("what", ALTERED)
def test_an_altered_list_is_refused_in_one_line(tmp_path, small, what, capsys):
    labeled, unlabeled, words = ALTERED[what]
    into = tmp_path / "into"
    (into / "voc").mkdir(parents=True)
    (into / "voc" / "u2pl-3.txt").write_text("".join(f"{one}\n" for one in (ONE, TWO, THREE)))
    source = write_clone(tmp_path / "clone", clone("UniMatch", labeled, unlabeled))
    command = ["data", "splits", "--dataset", "voc", "--from", str(source), "--into", str(into)]
    assert main(command) == 1
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("refused")]
    assert "splits/pascal/3/labeled.txt" in line
    assert all(word in line for word in words), line
    assert [p.name for p in (into / "voc").iterdir()] == ["u2pl-3.txt"]


@pytest.mark.parametrize(
    ("path", "ids", "words"),
    [
        ("splits/pascal/3/labeled.txt", ALL["voc"][5:], ["expected", "(u2pl-3)"]),
        ("lists/mine/labeled.txt", ALL["voc"][5:], ["(u2pl-3)", "(cps-3)"]),
        ("lists/mine/labeled.txt", ALL["voc"][1:], ["no published list has 7 images"]),
    ],
)
def test_an_unknown_list_is_told_what_was_expected(tmp_path, small, monkeypatch, path, ids, words):
    monkeypatch.setattr(importing, "NEAR", 0)
    source = write_clone(tmp_path / "clone", {path: "\n".join(ids)})
    _, refused = importing.collect(source, "voc", tmp_path / "into")
    assert all(word in refused[path] for word in words), refused
    if "expected" in words:
        assert lists.sha256(ids)[:12] in refused[path] and "cps-3" not in refused[path]
    assert not (tmp_path / "into").exists()


def test_a_clone_without_lists_is_refused(tmp_path, small, refused):
    command = ["data", "splits", "--dataset", "voc", "--from"]
    assert "no such file" in refused(*command, tmp_path / "none")
    source = write_clone(tmp_path / "clone", {"requirements.txt": "torch\n"})
    assert "no list of voc images" in refused(*command, source)
    (source / "lists.tar.gz").write_bytes(b"\x1f\x8bnonsense")
    assert "lists.tar.gz: not a readable archive" in refused(*command, source)


# ---------------------------------------------------------------- used in a run


@pytest.fixture
def voc_config(tmp_path, tiny):
    write_voc(tmp_path / "data")
    given = {"dataset": "voc", "data_root": str(tmp_path / "data"), "size": [], "crop": [32, 32]}
    return functools.partial(tiny, **given, batch=2, unlabeled_batch=2, unlabeled=0, epochs=1)


def test_a_run_on_a_published_list(tmp_path, small, voc_config):
    config = voc_config(split="u2pl-3", labeled=3, method="mean_teacher")
    with pytest.raises(ValueError, match="u2pl-3.*not imported.*s4 data splits --dataset voc"):
        open_data(config)
    source = write_clone(tmp_path / "clone", clone("UniMatch"))
    command = ["data", "splits", "--dataset", "voc", "--from", str(source)]
    assert main([*command, "--data_root", config.data_root]) == 0
    assert (tmp_path / "data" / "splits" / "voc" / "u2pl-3.txt").is_file()
    images, chosen, _, _ = open_data(config)
    assert [images.ids[i] for i in chosen.labeled] == VOC_TRAIN
    assert [images.ids[i] for i in chosen.unlabeled] == VOC_SBD
    record = fit(config, out=tmp_path / "runs")
    assert record["steps"] == 3 and record["labeled"] == 3
    assert record["split_sha256"] == chosen.sha256 and record["config"]["split"] == "u2pl-3"
    assert open_data(voc_config(split="u2pl-3", labeled=0))[1] == chosen


def test_without_a_data_root_lists_lie_in_the_users_cache(tmp_path, small, voc_config, cache):
    source = write_clone(tmp_path / "clone", clone("CPS"))
    assert main(["data", "splits", "--dataset", "voc", "--from", str(source)]) == 0
    assert (cache / "voc" / "cps-3.txt").is_file()
    assert len(open_data(voc_config(split="cps-3", labeled=3))[1].labeled) == 3


def test_an_unknown_list_is_used_if_allowed(tmp_path, small, voc_config, cache):
    source = write_clone(tmp_path / "clone", clone("UniMatch", ALL["voc"][1:3], ALL["voc"][5:7]))
    command = ["data", "splits", "--dataset", "voc", "--from", str(source)]
    assert main(command) == 1 and not cache.exists()
    assert main([*command, "--allow-unknown"]) == 0
    images, chosen, _, _ = open_data(voc_config(split="splits-pascal-3-labeled", labeled=2))
    assert [images.ids[i] for i in chosen.labeled] == ALL["voc"][1:3]
    assert [images.ids[i] for i in chosen.unlabeled] == ALL["voc"][5:7]


def store(cache: Path, name: str, ids: list[str]) -> None:
    (cache / "voc").mkdir(parents=True, exist_ok=True)
    (cache / "voc" / f"{name}.txt").write_text("\n".join(ids))


def test_a_list_that_does_not_fit_is_refused(small, voc_config, cache):
    store(cache, "u2pl-3", VOC_TRAIN)
    for changes, words in (
        ({"labeled": 2}, "labeled=2: split='u2pl-3' labels 3"),
        ({"labeled": 3, "draw": 1}, "draw=1: split='u2pl-3' is one draw"),
        ({"labeled": 3, "split": "u2pl-9"}, "'u2pl-9'.*plain.*nested-balanced.*cps-3, u2pl-3"),
    ):
        with pytest.raises(ValueError, match=words):
            open_data(voc_config(**{"split": "u2pl-3", **changes}))
    store(cache, "u2pl-3", [*VOC_TRAIN[:2], VOC_SBD[0]])
    with pytest.raises(ValueError, match="u2pl-3.txt: altered, SHA-256"):
        open_data(voc_config(split="u2pl-3", labeled=3))
    store(cache, "mine", ["2007_000032", "2011_000001"])
    with pytest.raises(ValueError, match="2011_000001.*8 images of SegmentationClassAug"):
        open_data(voc_config(split="mine", labeled=2))


# ---------------------------------------------------------------- download


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server on this machine in place of the repositories'; gives its folder."""
    folder = tmp_path / "served"
    (folder / "X").mkdir(parents=True)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        monkeypatch.setattr(importing, "URL", f"http://127.0.0.1:{running.server_port}")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield folder
        running.shutdown()
        thread.join()


def test_lists_are_downloaded_and_checked(small, server, cache, capsys, refused):
    command = ["data", "splits", "--dataset", "voc", "--download"]
    (server / "X" / "u2pl-3.txt").write_text("\r\n".join(map(pair, VOC_TRAIN[::-1])))
    assert main([*command, "u2pl-3"]) == 0
    assert (cache / "voc" / "u2pl-3.txt").read_text().split() == sorted(VOC_TRAIN)
    assert main(["data", "splits", "--dataset", "voc"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "imported" in line] == ["u2pl-3"]

    (server / "X" / "cps-3.txt").write_text("\n".join(map(pair, VOC_TRAIN)))
    line = refused(*command, "cps-3")
    assert "X/cps-3.txt: another list" in line and lists.sha256(VOC_TRAIN)[:12] in line
    assert "X/u2pl-2.txt" in (line := refused(*command, "u2pl-2")) and "404" in line
    assert "choose one of cps-3, u2pl-3" in refused(*command, "u2pl-9")
    assert [p.name for p in (cache / "voc").iterdir()] == ["u2pl-3.txt"]


def test_without_a_connection_the_address_is_named(small, monkeypatch, refused):
    monkeypatch.setattr(importing, "URL", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    line = refused("data", "splits", "--dataset", "voc", "--download", "u2pl-3")
    assert "http://127.0.0.1:9/X/u2pl-3.txt" in line
