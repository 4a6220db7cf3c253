"""`gd-plugin report STUDY`: tables, pictures and the page, from the records of a small study."""

from __future__ import annotations

import base64
import csv
import itertools
import math
import os
import re
import shutil
import statistics
import subprocess
import warnings
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogLocator
from PIL import Image
from test_plots import overlaps
from test_report import colours, error
from test_stats import METHODS, curve, diverged, knobs, record, run_path, runs, with_final, write_study

from gd_plugin import plots, study_plots
from gd_plugin.stats import COLUMNS, read_study
from gd_plugin.study_plots import plot_accuracy_ece, plot_loss, plot_study_reliability, plot_warmup
from gd_plugin.study_report import markdown_tables

PLOTS = [plot_loss, plot_accuracy_ece, plot_study_reliability, plot_warmup]
PICTURES = ["loss", "accuracy_ece", "reliability", "warmup"]
TITLES = ["Training loss", "Accuracy against calibration error", "Reliability, seeds pooled"]
TITLES += ["Start and length of the warm-up"]
PAIRS = "Difference of a warm-up to its final beta alone"
TABLES = ["Results", "Difference to cross-entropy", PAIRS, "After calibration on the validation split", "Epochs"]


def warmup(start: float, end: float, ratio: float, **changes) -> dict:
    return {"gd": knobs(beta=end, beta_start=start, warmup_ratio=ratio, **changes)}


GRID = {
    **METHODS,
    "0.1 to 5": warmup(0.1, 5.0, 0.5),
    "0.1 to 5, longer": warmup(0.1, 5.0, 1.0),
    "0.01 to 5, cosine": warmup(0.01, 5.0, 0.5, schedule="cosine"),
}
# Names are other people's text.
HOSTILE = [
    "<script>alert(1)</script>",
    "a|b",
    "[x](http://example.com)",
    "![x](http://example.com/x.png)",
    r"$\frac$",
    "$x_1$",
    "[red]x[/red]",
    "[/]",
    "`code`",
    "**bold** a_b_ ~~gone~~",
    "_hidden",
    "&lt;b&gt;",
    "back\\slash\\",
    "c\\|d",
    ":smile: {braces}",
    "http://example.com www.example.com",
]


@pytest.fixture
def report(command):
    """A report that must succeed: what it printed. What anything warns of is an error."""

    def run(*argv) -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            outcome = command("report", *argv)
        assert (outcome.code, outcome.err) == (0, "")
        return outcome.out

    return run


@pytest.fixture(scope="module")
def grid(tmp_path_factory, command):
    """A study of eight methods and three seeds with its report, for tests that only read it."""
    folder = write_study(tmp_path_factory.mktemp("grid") / "study", runs(GRID, 3))
    outcome = command("report", folder)
    assert (outcome.code, outcome.err) == (0, "")
    return folder, outcome.out


@pytest.fixture
def undrawn(monkeypatch):
    """A report without pictures, which take long."""
    monkeypatch.setattr("gd_plugin.study_report._PICTURES", {})


@pytest.fixture
def draw(monkeypatch, tmp_path):
    """Call a plot function on the study of some records; the figure, neither laid out nor written."""

    def draw(function, records) -> Figure:
        figures = []
        for module in (plots, study_plots):
            monkeypatch.setattr(module, "save", lambda figure, path: figures.append(figure))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            function(read_study(write_study(tmp_path / "drawn", records)), "unused.png")
        return figures[0]

    return draw


# Reading what was written ---------------------------------------------------------------------------------------------


VOID = {"img", "meta", "br", "hr"}


class Page(HTMLParser):
    """The elements of a page, what they refer to, and the tables below each heading."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.texts: dict[str, list[str]] = {}  # by their element
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]
        if tag in VOID:
            return
        self._open.append(tag)
        self.texts.setdefault(tag, []).append("")
        if tag == "table":
            self.tables[self.texts.get("h2", [""])[-1]] = []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_endtag(self, tag):
        assert tag in VOID or self._open.pop() == tag

    def handle_data(self, data):
        for tag in self._open:
            self.texts[tag][-1] += data
            if tag in ("td", "th"):
                self._rows[-1][-1] += data

    @property
    def _rows(self) -> list[list[str]]:
        return list(self.tables.values())[-1]


def rendered(markdown: str) -> Page:
    """As a viewer shows it: CommonMark with GitHub's tables and strikethrough."""
    return Page(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(markdown))


def page(folder: Path) -> Page:
    return Page((folder / "index.html").read_text(encoding="utf-8"))


def raw(folder: Path) -> dict[tuple[str, str], dict[str, str]]:
    """The CSV's rows by method and metric; of a warm-up beside its final beta by both, ``"0.01 to 5 / beta 5"``."""
    with open(folder / "table.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    first = rows[0]["method"]
    return {
        (row["method"] if row["versus"] == first else f"{row['method']} / {row['versus']}", row["metric"]): row
        for row in rows
    }


def printed(out: str) -> dict[str, list[str]]:
    """The table on the console: name -> cells."""
    rows = [[cell.strip() for cell in line[1:-1].split("│")] for line in out.split("\n") if line.startswith("│")]
    return {name: cells for name, *cells in rows}


def numbers(cell: str) -> list[float]:
    return [float(text) for text in re.findall(r"[-+]?\d+(?:\.\d+)?", cell)]


# Files ----------------------------------------------------------------------------------------------------------------


def test_what_is_written_and_printed(grid):
    folder, out = grid
    pictures = {f"{name}.png" for name in PICTURES}
    assert set(os.listdir(folder)) == {"study.json", "seed-0", "seed-1", "seed-2", *pictures} | {
        "table.md",
        "table.csv",
        "index.html",
    }
    assert all(colours(folder / name) > 10 for name in pictures)
    assert list(printed(out)) == list(GRID)
    assert "digits, split: test" in out and out.endswith(f"{folder}/index.html\n")
    head, *rows = page(folder).tables["Results"]
    places = [head.index(title) for title in ("n", "accuracy %", "NLL", "ECE %", "gap %")]
    assert printed(out) == {row[0]: [row[i] for i in places] for row in rows}


def test_the_records_are_left_alone(grid, tmp_path):
    folder, _ = grid
    fresh = write_study(tmp_path / "study", runs(GRID, 3))
    files = ["study.json", *(path.relative_to(fresh) for path in fresh.glob("seed-*/*"))]
    assert len(files) == 1 + 3 * len(GRID)
    assert all((folder / file).read_bytes() == (fresh / file).read_bytes() for file in files)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_same_records_give_the_same_bytes(report, tmp_path, suffix):
    written = []
    for name in ("one", "two"):
        folder = write_study(tmp_path / name, runs(dict(list(GRID.items())[3:7]), 2))
        report(folder, "--format", suffix)
        written.append({path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})
    assert set(written[0]) == {"study.json", "table.md", "table.csv", "index.html"} | {
        f"{name}.{suffix}" for name in PICTURES
    }
    assert written[0] == written[1]
    if suffix == "svg":
        assert all(ET.fromstring(written[0][f"{name}.svg"]).tag.endswith("svg") for name in PICTURES)


def test_a_second_report_takes_the_place_of_the_first(report, tmp_path, undrawn):
    folder = write_study(tmp_path / "study", runs(METHODS, 1))
    report(folder)
    assert page(folder).tables["Results"][1][1] == "1"
    write_study(folder, [record(name, 1, **changes) for name, changes in METHODS.items()], seeds=[0, 1])
    report(folder)
    assert page(folder).tables["Results"][1][1] == "2"
    assert not list(folder.glob(".*"))


def test_several_studies(report, tmp_path, undrawn):
    folders = [write_study(tmp_path / name, runs({"cross-entropy": {}, name: {}}, 2)) for name in "ab"]
    out = report(*folders)
    assert out.count("digits, split: test") == 2
    for folder in folders:
        assert f"{folder}/index.html" in out
        assert [row[0] for row in page(folder).tables["Results"][1:]] == ["cross-entropy", folder.name]


# What is refused ------------------------------------------------------------------------------------------------------


def test_a_study_and_a_run(command, tmp_path):
    study, run = write_study(tmp_path / "study", runs(METHODS, 1)), tmp_path / "run"
    run.mkdir()
    shutil.copy(run_path(study, "beta 5", 0), run / "record.json")
    for words in ((study, run), (run, study)):
        message = error(command("report", *words))
        assert message == "gd-plugin: error: studies and single runs cannot be compared; give one kind at a time\n"
    assert os.listdir(run) == ["record.json"] and not (study / "index.html").exists()


def test_a_damaged_study(command, tmp_path):
    folder = write_study(tmp_path / "study", runs(METHODS, 1))
    (folder / "study.json").write_text("[")
    assert f"{folder / 'study.json'} is damaged (JSONDecodeError: " in error(command("report", folder))


def test_a_study_that_has_not_begun(command, tmp_path):
    folder = write_study(tmp_path / "study", [], methods=["cross-entropy"], seeds=[0])
    assert f"{folder} has no run of 'cross-entropy' yet" in error(command("report", folder))
    assert os.listdir(folder) == ["study.json"]


@pytest.mark.parametrize("name", ["table.md", "index.html"])
def test_a_file_that_cannot_be_written(command, tmp_path, undrawn, name):
    folder = write_study(tmp_path / "study", runs(METHODS, 1))
    (folder / name).mkdir()
    assert name in error(command("report", folder))


# Tables ---------------------------------------------------------------------------------------------------------------


def test_markdown_and_page_have_the_same_tables(grid):
    folder, _ = grid
    markdown, html = rendered((folder / "table.md").read_text()), page(folder)
    assert list(markdown.tables) == TABLES and markdown.tables == html.tables
    for head, *rows in html.tables.values():
        assert all(len(row) == len(head) for row in rows)
    assert html.texts["h2"] == TABLES + TITLES
    assert [" ".join(text.split()) for text in html.texts["p"]] == markdown.texts["p"]


def test_every_row_has_as_many_cells_as_its_head(grid):
    """In the file itself: a viewer drops what is too much."""
    assert [widths(table) for table in raw_tables(grid[0])] == [{9}, {7}, {7}, {7}, {3}]


def raw_tables(folder: Path) -> list[list[str]]:
    blocks = [block.split("\n") for block in (folder / "table.md").read_text().rstrip().split("\n\n")]
    return [block for block in blocks if block[0].startswith("|")]


def widths(lines: list[str]) -> set[int]:
    """Cells per row in Markdown: a bar behind a backslash is text."""
    assert all(line.startswith("|") and line.endswith("|") for line in lines)
    return {len(re.findall(r"(?:\\.|[^|\\])+", line)) for line in lines}


def test_the_csv_holds_the_records_values(grid):
    rows = raw(grid[0])
    pairs = [f"{name} / beta 5" for name in GRID if " to 5" in name]
    assert len(pairs) == 4 and list(rows) == [
        (name, key) for name in [*GRID, *pairs] for key in COLUMNS if name in GRID or not key.startswith("epochs")
    ]
    for (name, key), row in rows.items():
        name, *_ = name.split(" / ")
        if key.startswith(("epochs", "early", "train")):
            continue
        calibration, _, metric = key.rpartition("/")
        for seed in range(3):
            run = record(name, seed, **GRID[name])
            expected = (run["calibrated"][calibration] if calibration else run["final"])[metric]
            assert float(row[f"seed {seed}"]) == expected


def test_the_csv_holds_every_number(grid):
    study = read_study(grid[0])
    groups = {method.name: method.summaries for method in study.methods}
    groups |= {f"{pair.warmup.name} / {pair.fixed.name}": pair.summaries for pair in study.pairs}
    for group, summaries in groups.items():
        for key, summary in summaries.items():
            row = raw(grid[0])[group, key]
            for name in ("n", "mean", "sd", "difference", "low", "high", "p", "q"):
                number = getattr(summary, name)
                assert row[name] == "" if math.isnan(number) else float(row[name]) == number


@pytest.mark.parametrize(
    ("table", "titles"),
    [
        (
            "Results",
            "accuracy % | NLL | Brier | ECE % | adaptive ECE % | MCE % | gap %".split(" | "),
        ),
        (
            "After calibration on the validation split",
            "NLL | NLL, temperature | NLL, vector scaling | ECE % | ECE %, temperature | ECE %, vector scaling".split(
                " | "
            ),
        ),
    ],
)
def test_cells_are_the_csvs_means_and_deviations(grid, table, titles):
    keys = {column.title: key for key, column in COLUMNS.items()}
    head, *rows = rendered((grid[0] / "table.md").read_text()).tables[table]
    assert head == ["method", *(["n"] if table == "Results" else []), *titles]
    assert [row[0] for row in rows] == list(GRID)
    for row in rows:
        for title, cell in zip(titles, row[-len(titles) :], strict=True):
            number, scale = raw(grid[0])[row[0], keys[title]], 100 if "%" in title else 1
            half = 0.5 * 10.0 ** -len(cell.split(" ")[0].split(".")[1])  # of the last digit
            mean, deviation = numbers(cell)
            assert mean == pytest.approx(scale * float(number["mean"]), abs=half * 1.001)
            assert deviation == pytest.approx(scale * float(number["sd"]), abs=half * 1.001)
            assert cell.startswith(("+", "-")) is (title == "gap %")


@pytest.mark.parametrize("title", ["Difference to cross-entropy", PAIRS])
def test_cells_of_differences(grid, title):
    head, *rows = rendered((grid[0] / "table.md").read_text()).tables[title]
    assert head == [
        "methods" if title == PAIRS else "method",
        "accuracy %",
        "NLL",
        "ECE %",
        "gap %",
        "validation accuracy %, first epoch at or past a quarter of training",
        "training cross-entropy, last epoch",
    ]
    keys = (("accuracy", 100, 2), ("nll", 1, 4), ("ece", 100, 2), ("confidence_gap", 100, 2))
    keys += (("early_accuracy", 100, 2), ("train_cross_entropy", 1, 4))
    warmups = [f"{name} / beta 5" for name in GRID if " to 5" in name]
    assert [row[0] for row in rows] == (warmups if title == PAIRS else list(GRID)[1:])
    for row in rows:
        for (key, scale, digits), cell in zip(keys, row[1:], strict=True):
            number = raw(grid[0])[row[0], key]
            expected = [scale * float(number[name]) for name in ("difference", "low", "high")]
            *found, q = numbers(cell)
            assert found == pytest.approx(expected, abs=0.51 * 10**-digits)
            assert q == pytest.approx(float(number["q"]), abs=0.00051)
            assert cell[0] in "+-"


def test_numbers_in_a_cell(tmp_path):
    """By hand: rounding, signs, and a q-value too small for three digits."""
    records = runs({"base": {}, "own": {}}, 4)
    for seed, (base, own) in enumerate(zip(records[::2], records[1::2], strict=True)):
        base["final"] |= {"accuracy": 0.5, "nll": 0.25, "ece": 0.1, "confidence_gap": -1e-9}
        own["final"] |= {"accuracy": 0.7125 + seed / 40, "nll": 0.25, "ece": 0.1 - 0.01 * seed, "confidence_gap": 0.02}
    markdown = rendered(markdown_tables(read_study(write_study(tmp_path / "study", records))))
    base, own = (dict(zip(markdown.tables["Results"][0], row, strict=True)) for row in markdown.tables["Results"][1:])
    assert (base["accuracy %"], base["NLL"], base["gap %"]) == ("50.00 ± 0.00", "0.2500 ± 0.0000", "+0.00 ± 0.00")
    assert (own["ECE %"], own["gap %"], own["n"]) == ("8.50 ± 1.29", "+2.00 ± 0.00", "4")
    _, accuracy, nll, ece, gap, *_ = markdown.tables["Difference to base"][1]
    # 25 plus or minus 3.182 * 3.227 / 2, and a t of 15.5 with 3 degrees of freedom: 0.0006
    assert accuracy == "+25.00 (+19.86 to +30.14), q < 0.001"
    assert nll == "+0.0000, q 1.000"  # equal runs
    assert gap == "+2.00"  # equal differences
    # -1.5 plus or minus 3.182 * 1.29 / 2, and a t of 2.32 with 3 degrees of freedom
    assert ece == "-1.50 (-3.55 to +0.55), q 0.103"


def test_epochs(tmp_path):
    """Where some never get there it is said how many did; where there is nothing to reach, nothing is said."""
    base = [record("base", seed, epochs=curve(3.0, 2.0, 1.0)) for seed in range(3)]
    curves = {"all": [(3, 1, 1)] * 4, "some": [(1, 1, 1), (3, 0.5, 1), (3, 2, 2)], "none": [(3, 2, 2)] * 3}
    own = [
        record(name, seed, epochs=curve(*losses)) for name, group in curves.items() for seed, losses in enumerate(group)
    ]
    alone = [record("no baseline", 3, epochs=curve(0.1, 0.1, 0.1))]
    study = read_study(write_study(tmp_path / "study", [*base, *own, *alone]))
    head, *rows = rendered(markdown_tables(study)).tables["Epochs"]
    assert head == [
        "method",
        "epochs to base's final training cross-entropy",
        "epochs to base's final validation accuracy",
    ]
    assert {row[0]: row[1] for row in rows} == {
        "base": "3.0 ± 0.0",
        "all": "2.0 ± 0.0",  # its fourth seed is not compared with anything
        "some": "1.5 ± 0.7 (2 of 3)",
        "none": "never",
        "no baseline": "-",
    }


def test_no_epochs_at_all(tmp_path):
    study = read_study(write_study(tmp_path / "study", runs({"base": {"epochs": []}, "own": {"epochs": []}}, 2)))
    markdown = markdown_tables(study)
    assert ", 0 epochs, " in markdown
    assert [row[1:] for row in rendered(markdown).tables["Epochs"][1:]] == [["-", "-"]] * 2


# Studies of other kinds -----------------------------------------------------------------------------------------------


def test_the_note_about_the_run(grid):
    described = page(grid[0]).texts["p"][0]
    assert described == (
        "timm:test_efficientnet, 101,766 weights, 1,293 training samples, 3 epochs, evaluated after the last one on "
        "360 samples. torch 2.15.0+cu132, transformers 5.24.0, timm 1.0.31; AMD EPYC. gd-plugin study digits --seeds 3"
    )
    markdown = rendered((grid[0] / "table.md").read_text())
    assert markdown.texts["code"] == ["timm:test_efficientnet", "gd-plugin study digits --seeds 3"]


def test_an_older_record_has_less_to_note(report, tmp_path, undrawn):
    records = runs({"base": {}}, 2)
    for run in records:
        for part in ("model", "versions", "hardware", "loss"):
            del run[part]
    folder = write_study(tmp_path / "study", records, command="")
    report(folder)
    assert "1,293 training samples" in page(folder).texts["p"][0]
    assert "``" not in (folder / "table.md").read_text()


def test_gpus_are_named(report, tmp_path, undrawn):
    hardware = {"cpu": "AMD EPYC", "gpu": ["NVIDIA A100"], "gpu_count": 1}
    folder = write_study(tmp_path / "study", runs({"base": {"hardware": hardware}}, 1))
    report(folder)
    assert "NVIDIA A100" in page(folder).texts["p"][0] and "EPYC" not in page(folder).texts["p"][0]


def said(folder: Path, out: str, text: str) -> bool:
    """Whether a note is on the page, in the Markdown and on the console; in all or none."""
    found = {
        any(text in note for note in page(folder).texts["p"]),
        any(text in note for note in rendered((folder / "table.md").read_text()).texts["p"]),
        text in out,
    }
    assert len(found) == 1
    return found.pop()


def test_one_seed(report, grid, tmp_path, undrawn):
    folder = write_study(tmp_path / "study", runs(GRID, 1))
    out = report(folder)
    said_of_one = "One seed: no deviations, intervals or p-values can be given, and differences may be chance."
    assert said(folder, out, said_of_one) and not said(*grid, said_of_one)
    assert said(*grid, "are paired by seed") and not said(folder, out, "are paired by seed")
    for head, *rows in page(folder).tables.values():
        for row in rows:
            assert not any("±" in cell or "q " in cell for cell in row)
            assert all(len(numbers(cell)) == 1 for cell in row[1:]) or head[1].startswith("epochs")


def test_runs_of_several_commits_are_said_to_be(report, tmp_path, undrawn):
    note = "The runs are not all of one commit, one set of versions and one kind of hardware."
    for name, changed, expected in (("same", {}, False), ("other", {"commit": "0" * 40}, True)):
        records = runs(METHODS, 2)
        records[-1] |= changed
        folder = write_study(tmp_path / name, records)
        assert bool(said(folder, report(folder), note)) == expected


def test_missing_runs(report, grid, tmp_path, undrawn):
    folder = write_study(tmp_path / "study", runs(METHODS, 2)[:-1], seeds=[0, 1, 2])
    out = report(folder)
    assert said(folder, out, "6 runs are missing: the study was stopped, or some of its runs failed.")
    assert not said(*grid, "missing")
    assert [row[1] for row in page(folder).tables["Results"][1:]] == ["2", "2", "2", "2", "1"]
    assert raw(folder)["cross-entropy", "nll"]["seed 2"] == ""


@pytest.mark.parametrize("name", ["beta 5", "beta_5 [high]"])
def test_diverged_runs(report, grid, tmp_path, undrawn, name):
    records = [*runs({"cross-entropy": {}}, 3), record(name, 0), diverged(name, 1), diverged(name, 2)]
    folder = write_study(tmp_path / "study", records)
    out = report(folder)
    assert said(folder, out, f"Diverged, and left out of the means: {name} (2).")
    assert not said(*grid, "Diverged")
    _, base, own = page(folder).tables["Results"]
    assert own[:2] == [name, "3"] and "±" not in own[2] and "±" in base[2]


def test_only_diverged_runs(report, tmp_path):
    """Nothing to draw but empty diagrams, and nothing to compare."""
    names = {"cross-entropy": {}, "0.01 to 5": warmup(0.01, 5.0, 0.5), "0.1 to 5": warmup(0.1, 5.0, 0.5)}
    records = [diverged(name, seed, **changes) for name, changes in names.items() for seed in (0, 1)]
    folder = write_study(tmp_path / "study", records)
    out = report(folder)
    assert "Diverged, and left out of the means: cross-entropy (2), 0.01 to 5 (2), 0.1 to 5 (2)." in out
    assert printed(out) == {name: ["2", "-", "-", "-", "-"] for name in names}
    assert f"{folder}/loss.png: nothing to draw" in out and f"{folder}/accuracy_ece.png: nothing to draw" in out
    assert all(set(row[1:]) <= {"2", "-"} for _, *rows in page(folder).tables.values() for row in rows)


def test_a_single_method(report, tmp_path):
    folder = write_study(tmp_path / "study", runs({"cross-entropy": {}}, 2))
    out = report(folder)
    assert list(printed(out)) == ["cross-entropy"]
    assert list(page(folder).tables) == [TABLES[0], *TABLES[3:]] and not said(folder, out, "Differences to")
    assert page(folder).texts["h2"][-3:] == TITLES[:3]
    assert all(colours(folder / f"{name}.png") > 10 for name in PICTURES[:3])


@pytest.mark.parametrize(
    "others",
    [
        {"beta 5": {"gd": knobs(beta=5.0)}, "focal loss": {"loss": "focal"}},
        {"0.01 to 5": warmup(0.01, 5.0, 0.5)},  # one is no map
        {"0.01 to 5": warmup(0.01, 5.0, 0.5), "0.01 to 1": warmup(0.01, 1.0, 0.5)},
        {"0.01 to 5": warmup(0.01, 5.0, 0.5), "cosine": warmup(0.01, 5.0, 1.0, schedule="cosine")},
    ],
)
def test_without_a_map_of_warmups(report, tmp_path, monkeypatch, others):
    monkeypatch.setattr("gd_plugin.study_report._PICTURES", {"warmup": ("A map", plot_warmup)})
    folder = write_study(tmp_path / "study", runs({"cross-entropy": {}, **others}, 2))
    out = report(folder)
    assert "warmup.png is left out: the study has no two linear warm-ups to the same beta\n" in out
    assert not (folder / "warmup.png").exists() and page(folder).links == []


# Names ----------------------------------------------------------------------------------------------------------------


def hostile_study(folder: Path, names: list[str], command: str = "gd-plugin study digits") -> Path:
    """All that a name can be in: the methods', the data's, a label's, the model's; one run has diverged."""
    kinds = [{"gd": knobs(beta=5.0)}, warmup(0.01, 5.0, 0.5), warmup(0.1, 5.0, 0.5), {"loss": "focal"}]
    words = " ".join(names)
    others = {
        "dataset": record()["dataset"] | {"name": f"data {words}", "tested_on": f"split {words}", "labels": names},
        "model": {"name": f"model {words}", "parameters": 7},
        "versions": {"torch": names[0]},
        "hardware": {"cpu": names[0]},
    }
    methods = {name: {**(kinds[i % 4] if i else {}), **others} for i, name in enumerate(names)}
    return write_study(folder, [*runs(methods, 2), diverged(names[1], 2, **methods[names[1]])], command=command)


@pytest.mark.parametrize("first", HOSTILE)
def test_names_break_no_table(report, tmp_path, undrawn, first):
    """Each of them as the baseline, whose name is in titles, heads and notes too."""
    names = [first, *(name for name in HOSTILE if name != first)]
    folder = hostile_study(tmp_path / "study", names)
    out = report(folder)
    html, markdown = page(folder), rendered((folder / "table.md").read_text())
    assert set(html.tags) <= set("html head meta title style body h1 h2 p table thead tbody tr th td".split())
    assert set(markdown.tags) <= set("h1 h2 p code strong table thead tbody tr th td".split())
    assert html.tables == markdown.tables
    assert list(html.tables) == [title.replace("cross-entropy", first) for title in TABLES]
    for title, (_, *rows) in html.tables.items():
        if title == PAIRS:
            assert [row[0] for row in rows] == [
                f"{name} / {names[4]}" for i, name in enumerate(names) if i % 4 in (1, 2)
            ]
        else:
            assert [row[0] for row in rows] == (names[1:] if title.startswith("Difference") else names)
    assert [widths(table) for table in raw_tables(folder)] == [{9}, {7}, {7}, {7}, {3}]
    assert html.tables["Epochs"][0][1] == f"epochs to {first}'s final training cross-entropy"
    assert list(printed(out)) == names
    assert list(dict.fromkeys(name for name, _ in raw(folder)))[: len(names)] == names

    words = " ".join(names)
    assert html.texts["h1"] == [f"data {words}: beta of the gradient-decay loss"]
    assert markdown.texts["h1"] == [f"data {words}, split: split {words}"]
    assert "".join(f"data {words}, split: split {words}".split()) in "".join(out.split())
    assert html.texts["p"] == markdown.texts["p"]
    for text in (f"Differences to {first} are paired", f"Diverged, and left out of the means: {names[1]} (1)."):
        assert said(folder, out, text)


@pytest.mark.parametrize("text", [*HOSTILE, "``` x", "` `` `", "a\n\n# b\n<hr>\n\n|a|\n|---|\n|b|"])
def test_the_note_about_the_run_stays_in_its_place(report, tmp_path, undrawn, text):
    """A command and a model are shown as code, which no backtick of theirs ends."""
    records = runs({"base": {"model": {"name": text, "parameters": 7}}}, 1)
    folder = write_study(tmp_path / "study", records, command=f"gd-plugin {text}")
    report(folder)
    shown = " ".join(text.split())
    html, markdown = page(folder), rendered((folder / "table.md").read_text())
    assert markdown.texts["code"] == [shown, f"gd-plugin {shown}"]
    assert html.texts["p"] == markdown.texts["p"] and f" gd-plugin {shown}" in html.texts["p"][0]
    assert not {"script", "a", "img", "hr"} & {*html.tags, *markdown.tags}
    assert len(markdown.tables) == 3 and markdown.texts["h1"] == ["digits, split: test"]


def test_no_address_becomes_a_link(tmp_path):
    """GitHub makes links of bare addresses too, which the viewer of these tests does not."""
    study = read_study(hostile_study(tmp_path / "study", HOSTILE))
    outside_code = re.sub(r"(`+) .*? \1(?!`)|`[^`]+`", "", markdown_tables(study))
    assert "example" in outside_code
    assert not re.search(r"\w+://|www\.", outside_code)


def test_names_that_would_break():
    """That they do, where they are not escaped."""
    broken = rendered("\n".join(["| a |", "|---|", *(f"| {name} |" for name in HOSTILE)]))
    assert {"a", "img", "code", "strong", "s"} <= set(broken.tags)
    assert [row[0] for row in broken.tables.get("", [])] != ["a", *HOSTILE]


# Pictures -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [1, 3])
def test_loss_has_a_panel_per_family(draw, seeds):
    records = runs(GRID, seeds)
    panels = draw(plot_loss, records).axes
    assert [axes.get_title() for axes in panels] == [
        f"Training cross-entropy, {family} (lower is better)" for family in ("fixed beta", "warm-up", "other loss")
    ]
    names = [["beta 0.1", "beta 5"], [name for name in GRID if name.startswith("0.")], ["focal loss"]]
    for axes, own in zip(panels, names, strict=True):
        own = ["cross-entropy", *own]
        assert labels(axes) == own
        assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == len(own)
        assert [line.get_color() == "black" for line in axes.lines] == [name == "cross-entropy" for name in own]
        for line, band, name in zip(axes.lines, axes.collections, own, strict=True):
            losses = [[e["cross_entropy"] for e in run["epochs"]] for run in records if run["name"] == name]
            assert list(line.get_xdata()) == [1, 2, 3]
            means = [statistics.mean(column) for column in zip(*losses, strict=True)]
            assert list(line.get_ydata()) == pytest.approx(means)
            assert band.get_datalim(axes.transData).get_points()[:, 1] == pytest.approx(
                [min(map(min, losses)), max(map(max, losses))]
            )


def test_a_method_has_one_colour_in_all_pictures(tmp_path, monkeypatch):
    figures, study = [], read_study(write_study(tmp_path, runs(GRID, 2)))
    monkeypatch.setattr(study_plots, "save", lambda figure, path: figures.append(figure))
    plot_accuracy_ece(study, "unused.png")
    plot_loss(study, "unused.png")
    points = dict(zip(GRID, [point.get_color() for point, *_ in figures[0].axes[0].containers], strict=True))
    for axes in figures[1].axes:
        for name, line in zip(labels(axes), axes.lines, strict=True):
            assert line.get_color() == points[name]


def labels(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.mark.parametrize(("last", "scale"), [(0.0, "linear"), (0.21, "linear"), (0.19, "log"), (1e-9, "log")])
def test_the_scale_of_the_loss(draw, last, scale):
    """A loss of 0 has no place on a log scale, and one decade or less has odd labels there."""
    figure = draw(plot_loss, runs({"base": {"epochs": curve(2.0, 1.0)}, "own": {"epochs": curve(1.0, last)}}, 1))
    assert figure.axes[0].get_yscale() == scale and not untidy(figure)


def test_loss_of_runs_that_ended_before(draw):
    """A mean is over all seeds, or not drawn."""
    curves = {"base": [(3, 2, 1), (3, 2)], "own": [(3, None, 1), (3, 2, 0)], "none": [(None,), ()]}
    axes = draw(
        plot_loss,
        [record(name, i, epochs=curve(*losses)) for name, group in curves.items() for i, losses in enumerate(group)],
    ).axes[0]
    assert labels(axes) == ["base", "own"] and axes.get_yscale() == "linear"
    assert [list(line.get_xdata()) for line in axes.lines] == [[1, 2], [1, 3]]


def test_accuracy_against_ece(draw):
    records = runs(GRID, 3)
    figure = draw(plot_accuracy_ece, records)
    (axes,) = figure.axes
    assert (axes.get_xscale(), axes.get_xlabel()) == ("log", "ECE (log scale)")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(GRID)
    looks = []
    for (point, _, bars), handle, name in zip(axes.containers, figure.legends[0].legend_handles, GRID, strict=True):
        finals = [run["final"] for run in records if run["name"] == name]
        assert point.get_xydata().ravel() == pytest.approx(
            [statistics.mean(final[key] for final in finals) for key in ("ece", "accuracy")]
        )
        for i, key in enumerate(("ece", "accuracy")):
            (low, high) = bars[i].get_segments()[0][:, i]
            assert (high - low) / 2 == pytest.approx(statistics.stdev(final[key] for final in finals))
        looks.append((point.get_color(), point.get_marker(), point.get_markerfacecolor()))
        assert looks[-1] == (handle.get_color(), handle.get_marker(), handle.get_markerfacecolor())
    assert len(set(looks)) == len(GRID) and looks[0][0] == "black"


@pytest.mark.parametrize(("zero", "scale"), [(0.0, "linear"), (1e-12, "log"), (0.3, "log")])
def test_an_ece_of_nothing(draw, zero, scale):
    """What is best of all must not be what a log scale leaves out."""
    figure = draw(plot_accuracy_ece, with_final("ece", base=(0.1, 0.2), own=(zero, zero), other=(0.0, 0.01)))
    assert not untidy(figure)
    (axes,) = figure.axes
    assert axes.get_xscale() == scale and ("log" in axes.get_xlabel()) is (scale == "log")
    low, high = axes.get_xlim()
    assert all(low < container[0].get_xdata()[0] < high for container in axes.containers)


def test_only_eces_of_nothing(draw):
    figure = draw(plot_accuracy_ece, with_final("ece", base=(0.0, 0.0), own=(0.0, 0.0)))
    assert figure.axes[0].get_xscale() == "linear" and not untidy(figure)


def test_reliability_is_pooled(draw):
    """Per bin the mean over all samples of all seeds; what is in the title is the mean over the seeds."""

    def bins(*entries):
        return [
            {"lower": i / 2, "upper": (i + 1) / 2, "count": n, "confidence": c, "accuracy": a}
            for i, (n, c, a) in enumerate(entries)
        ]

    one, two = record("base", 0), record("base", 1)
    one["reliability"], two["reliability"] = bins((0, None, None), (10, 0.9, 0.8)), bins((30, 0.4, 0.2), (30, 0.7, 0.6))
    one["final"] |= {"accuracy": 0.8, "ece": 0.1, "confidence_gap": 0.1}
    two["final"] |= {"accuracy": 0.4, "ece": 0.2, "confidence_gap": -0.04}
    diagram, histogram = draw(plot_study_reliability, [one, two, record("base", 2, reliability=None)]).axes
    assert [bar.get_height() for bar in diagram.patches[::2]] == pytest.approx([0.2, (10 * 0.8 + 30 * 0.6) / 40])
    tops = [bar.get_y() + bar.get_height() for bar in diagram.patches[1::2]]
    assert tops == pytest.approx([0.4, (10 * 0.9 + 30 * 0.7) / 40])
    assert [bar.get_height() for bar in histogram.patches] == pytest.approx([30 / 70, 40 / 70])
    third = record("base", 2)["final"]
    assert f"ECE {(0.1 + 0.2 + third['ece']) / 3:.1%}" in diagram.get_title()


def test_the_map_of_warmups(draw):
    """The end that most warm-ups have; what is not linear, or another loss, is not in it."""
    methods = {
        "cross-entropy": {},
        "beta 5": {"gd": knobs(beta=5.0)},
        "smoothed": {"gd": knobs(beta=5.0), "config": {"label_smoothing_factor": 0.1}},
        "a": warmup(0.1, 1.0, 0.5),
        "b": warmup(0.1, 5.0, 0.5),
        "c": warmup(0.01, 5.0, 0.5),
        "d": warmup(0.01, 5.0, 1.0),
        "e": warmup(0.01, 5.0, 0.25, schedule="cosine"),
    }
    records = runs(methods, 2)
    figure = draw(plot_warmup, records)
    places = [["beta 5", "c", "d"], ["beta 5", "b", None]]
    for axes, key, title in zip(figure.axes, ("ece", "accuracy"), ("ECE", "accuracy"), strict=True):
        assert axes.get_title() == f"{title}, warm-up to 5"
        assert [text.get_text() for text in axes.get_xticklabels()] == ["0%", "50%", "100%"]
        assert [text.get_text() for text in axes.get_yticklabels()] == ["0.01", "0.1"]
        shown = {text.get_position(): text.get_text() for text in axes.texts}
        expected = {
            (column, row): statistics.mean(run["final"][key] for run in records if run["name"] == name)
            for row, names in enumerate(places)
            for column, name in enumerate(names)
            if name
        }
        assert shown == {place: f"{100 * mean:.2f}%" for place, mean in expected.items()}
        for (column, row), mean in expected.items():
            assert axes.images[0].get_array()[row, column] == pytest.approx(mean)


def test_a_map_without_the_fixed_beta(draw):
    methods = {"cross-entropy": {}, "a": warmup(0.01, 5.0, 0.5), "b": warmup(0.1, 5.0, 0.5)}
    figure = draw(plot_warmup, runs(methods, 1))
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["50%"] and not untidy(figure)


@pytest.mark.parametrize("plot", PLOTS)
def test_no_other_format(plot, tmp_path):
    study = read_study(write_study(tmp_path / "study", runs(GRID, 1)))
    with pytest.raises(ValueError, match=r"\.png or \.svg"):
        plot(study, tmp_path / "a.pdf")
    assert os.listdir(tmp_path) == ["study"]


@pytest.mark.parametrize(
    ("plot", "changes"), [(plot_loss, {"epochs": []}), (plot_study_reliability, {"reliability": None})]
)
def test_nothing_to_draw(plot, changes, tmp_path):
    study = read_study(write_study(tmp_path / "study", runs({"base": changes, "own": changes}, 1)))
    with pytest.raises(ValueError, match="nothing to draw, no record has"):
        plot(study, tmp_path / "a.png")


# Layout and text of the pictures --------------------------------------------------------------------------------------

LONG = "a_rather_long_name_of_a_method_with_many_settings, "
STUDIES = {
    "grid": lambda: runs(GRID, 3),
    "one seed": lambda: runs(GRID, 1),
    "long names": lambda: runs({LONG + name: changes for name, changes in GRID.items()}, 2),
    "hostile": lambda: runs(
        {name: list(GRID.values())[i % 8] | dataset(" ".join(HOSTILE)) for i, name in enumerate(HOSTILE)}, 2
    ),
    "many": lambda: runs({"base": {}, **{f"beta {i}": {"gd": knobs(beta=float(i))} for i in range(2, 32)}}, 1),
    "map": lambda: runs(
        {"base": {}} | {f"{s} {r}": warmup(s, 5.0, r) for s in (0.01, 0.03, 0.1, 0.3) for r in (0.1, 0.25, 0.5, 1)}, 1
    ),
}


def dataset(name: str) -> dict:
    return {"dataset": record()["dataset"] | {"name": name}}


def crowded(figure: Figure) -> list[tuple[str, str]]:
    """Labels of an axis, and texts in a panel, that overlap."""
    figure.draw_without_rendering()
    found = []
    for axes in figure.axes:
        groups = [axes.texts]
        for i, axis in enumerate((axes.xaxis, axes.yaxis)):
            low, high = sorted(axis.get_view_interval())
            groups.append([t for t in axis.get_ticklabels(which="both") if low <= t.get_position()[i] <= high])
        for group in groups:
            boxes = [(text.get_text(), text.get_window_extent()) for text in group if text.get_text()]
            found += [(a, b) for (a, one), (b, other) in itertools.combinations(boxes, 2) if one.overlaps(other)]
    return found


def untidy(figure: Figure) -> list[tuple]:
    """What overlaps, and what leaves the picture. A layout that finds no room is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return overlaps(figure) + crowded(figure)


@pytest.mark.parametrize(
    ("plot", "study"),
    [
        *[(plot, study) for plot in (plot_loss, plot_accuracy_ece) for study in list(STUDIES)[:5]],
        *[(plot_study_reliability, study) for study in ("grid", "long names", "hostile")],
        *[(plot_warmup, study) for study in ("grid", "map")],
    ],
)
def test_nothing_overlaps(draw, plot, study):
    assert not untidy(draw(plot, STUDIES[study]()))


def test_overlaps_are_seen(draw):
    figure = draw(plot_accuracy_ece, with_final("ece", base=(0.005, 0.005), own=(0.3, 0.3)))
    (axes,) = figure.axes
    assert not untidy(figure)
    axes.xaxis.set_minor_locator(LogLocator(subs=range(2, 10)))
    axes.xaxis.set_minor_formatter(plots.percent)
    assert ("0.8%", "0.9%") in untidy(figure)
    axes.set_title(LONG * 3)
    assert (0,) in untidy(figure)  # the panel leaves the picture


@pytest.mark.parametrize("plot", PLOTS[:3])
def test_names_are_shown_as_they_are(draw, plot):
    methods = {name: list(METHODS.values())[i % 4] for i, name in enumerate(HOSTILE)}
    figure = draw(plot, runs(methods, 1))
    shown = {text.get_text(): text for text in figure.findobj(Text)}
    names = {text.split("\n")[0] for text in shown} if plot is plot_study_reliability else set(shown)
    assert set(HOSTILE) <= names
    assert not any(text.get_parse_math() for name, text in shown.items() if name.split("\n")[0] in HOSTILE)


# The page -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_page_holds_the_pictures(report, tmp_path, suffix):
    """And nothing outside itself; whatever the names are."""
    folder = hostile_study(tmp_path / "study", HOSTILE[:5])
    report(folder, "--format", suffix)
    html = page(folder)
    assert html.tags.count("img") == len(html.links) == 4 and html.texts["h2"][-4:] == TITLES
    for link, name in zip(html.links, PICTURES, strict=True):
        head, _, data = link.partition(",")
        assert head == f"data:image/{'svg+xml' if suffix == 'svg' else 'png'};base64"
        picture = base64.b64decode(data, validate=True)
        assert picture == (folder / f"{name}.{suffix}").read_bytes()
        if suffix == "svg":
            assert not {"script", "a"} & {element.tag.split("}")[1] for element in ET.fromstring(picture).iter()}
    assert not {"script", "link", "iframe", "object", "base"} & set(html.tags)
    assert not re.search(r"url\(|@import", html.texts["style"][0])


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
# Says of every picture how wide it is, and how far the page is wider than the window.
PROBE = """<script>
addEventListener("load", () => {
  document.body.dataset.widths = [...document.images].map(image => image.naturalWidth).join(" ");
  document.body.dataset.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
});
</script>"""


@pytest.fixture
def browse(tmp_path):
    """Open a page: what it then consists of, and the colours to be seen."""

    def browse(path: Path) -> tuple[str, set]:
        screenshot = tmp_path / "screenshot.png"
        words = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1000,6000", "--disable-dev-shm-usage"]
        words += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--hide-scrollbars"]
        words += ["--dump-dom", f"--screenshot={screenshot}", path.as_uri()]
        done = subprocess.run([CHROMIUM, *words], capture_output=True, text=True, timeout=120, check=True)
        with Image.open(screenshot) as image:
            return done.stdout, {colour for _, colour in image.convert("RGB").getcolors(2**24)}

    return browse


@pytest.mark.skipif(not CHROMIUM, reason="neither chromium nor google-chrome is installed")
def test_the_page_in_a_browser(browse, grid, tmp_path):
    folder, _ = grid
    blue = tuple(bytes.fromhex(plots.COLOURS[0][1:]))  # which is in the pictures alone
    dom, seen = browse(folder / "index.html")
    shown = Page(dom)
    assert shown.tables == page(folder).tables and [row[0] for row in shown.tables["Results"][1:]] == list(GRID)
    assert blue in seen

    text = (folder / "index.html").read_text()
    broken = re.sub(r"(base64,.{100})", r"\1!", text, count=1)
    for html, loads in ((text, True), (broken, False)):
        path = tmp_path / "probed.html"
        path.write_text(html.replace("</body>", PROBE + "</body>"))
        dom, _ = browse(path)
        widths = [int(width) for width in re.search(r'data-widths="(.*?)"', dom)[1].split()]
        assert len(widths) == 4 and [width > 500 for width in widths] == [loads, True, True, True]
        assert re.search(r'data-overflow="(.*?)"', dom)[1] == "0"
