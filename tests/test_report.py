"""`gd-plugin report` from the words of the command line to the pictures and the table."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from PIL import Image

import gd_plugin
from gd_plugin.metrics import METRICS

PICTURES = {"curves.png", "reliability.png"}


def record(name="beta 5", beta=5.0, **changes) -> dict:
    """What a run of two epochs leaves behind, as far as a report reads it."""
    return {
        "format": 1,
        "name": name,
        "config": {},
        "seed": 0,
        "wall_time_s": 61.7,
        "dataset": {"name": "flowers", "train": 100, "tested_on": "validation"},
        "epochs": [
            {
                "epoch": float(e),
                "step": 10 * e,
                "cross_entropy": 1.0 / e,
                "loss": beta / e,
                "gd_beta": beta,
                "eval_accuracy": 0.4 * e,
                "eval_nll": 1.2 / e,
                "eval_ece": 0.1 / e,
            }
            for e in (1, 2)
        ],
        "log": [{"epoch": step / 10, "step": step, "gd_beta": beta} for step in range(1, 21)],
        "final": {"accuracy": 0.8125, "nll": 0.51234, "brier": 0.25, "ece": 0.0375, "confidence_gap": 0.0125},
        "reliability": [
            {"lower": 0.0, "upper": 0.5, "count": 40, "confidence": 0.4, "accuracy": 0.5},
            {"lower": 0.5, "upper": 1.0, "count": 60, "confidence": 0.9, "accuracy": 0.8},
        ],
        **changes,
    }


ROW = ["81.25", "0.5123", "0.2500", "3.75", "+1.25", "62"]
NO_VALIDATION = {
    "final": {},
    "reliability": None,
    "epochs": [{k: v for k, v in entry.items() if "eval" not in k} for entry in record()["epochs"]],
}
DIVERGED = {
    "final": dict.fromkeys(METRICS),
    "reliability": [entry | {"count": 0, "confidence": None, "accuracy": None} for entry in record()["reliability"]],
    "epochs": [
        dict.fromkeys(entry) | {"epoch": entry["epoch"], "step": entry["step"], "gd_beta": 5.0}
        for entry in record()["epochs"]
    ],
}


@pytest.fixture
def run(tmp_path):
    """Make the folder of a run: its name, and what is different in its record."""

    def run(folder, *args, **changes) -> Path:
        folder = tmp_path / folder
        folder.mkdir(parents=True)
        (folder / "record.json").write_text(json.dumps(record(*args, **changes)))
        return folder

    return run


@pytest.fixture
def report(command):
    """A report that must succeed: what it printed."""

    def run(*argv) -> str:
        outcome = command("report", *argv)
        assert (outcome.code, outcome.err) == (0, "")
        return outcome.out

    return run


@pytest.fixture
def drawn(monkeypatch):
    """No pictures, which take long, but a list of what would be drawn: names of the runs, folder, suffix."""
    calls = []
    monkeypatch.setattr(
        "gd_plugin.report.draw",
        lambda records, folder, _, suffix: calls.append(([r["name"] for r in records], folder, suffix)),
    )
    return calls


def names(folder) -> set[str]:
    return set(os.listdir(folder))


def rows(out) -> dict[str, list[str]]:
    """The lines of the table: name of the run -> its cells."""
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.split("\n") if line.startswith("│")]
    return {name: values for name, *values in cells}


def colours(path) -> int:
    with Image.open(path) as image:
        return len(image.convert("RGB").getcolors(2**24))


def width(path) -> int:
    with Image.open(path) as image:
        return image.width


def error(outcome) -> str:
    """The one line of bad input."""
    assert outcome.code == 2
    assert outcome.err.startswith("gd-plugin: error: ") and outcome.err.endswith("\n"), outcome.err
    assert outcome.err.count("\n") == 1, outcome.err
    return outcome.err


# What is drawn and printed --------------------------------------------------------------------------------------------


def test_one_run(report, run):
    folder = run("a")
    before = (folder / "record.json").read_bytes()
    out = report(folder)
    assert names(folder) == PICTURES | {"record.json"} and names(folder.parent) == {"a"}
    assert all(colours(folder / name) > 10 for name in PICTURES)
    assert (folder / "record.json").read_bytes() == before
    assert rows(out) == {"beta 5": ROW}
    assert "flowers, split: validation" in out
    assert f"{folder}/" in out


def test_a_blank_picture_would_be_seen(tmp_path):
    Image.new("RGB", (50, 50)).save(tmp_path / "a.png")
    assert colours(tmp_path / "a.png") == 1


def test_a_second_report_takes_the_place_of_the_first(report, run):
    folder = run("a", **NO_VALIDATION)
    report(folder)
    first = (folder / "curves.png").read_bytes()
    (folder / "record.json").write_text(json.dumps(record("beta 0.1", 0.1, **NO_VALIDATION)))
    assert "beta 0.1" in rows(report(folder))
    assert (folder / "curves.png").read_bytes() != first
    assert names(folder) == {"record.json", "curves.png"}


def test_several_runs(report, run, tmp_path):
    final = record()["final"] | {"accuracy": 0.75, "confidence_gap": -0.02}
    five, one = run("out/five"), run("out/one", "cross-entropy", 1.0, final=final)
    both = tmp_path / "out"
    out = report(five, one)
    assert names(five) == names(one) == PICTURES | {"record.json"}
    assert names(both) == PICTURES | {"five", "one"}
    for name in PICTURES:
        assert colours(both / name) > 10
        assert len({(folder / name).read_bytes() for folder in (five, one, both)}) == 3
    assert width(both / "reliability.png") > width(five / "reliability.png") == width(one / "reliability.png")
    assert list(rows(out).items()) == [("beta 5", ROW), ("cross-entropy", ["75.00", *ROW[1:4], "-2.00", "62"])]
    assert f"{both}/" in out


@pytest.mark.parametrize("flag", ["--output_dir", "--output-dir"])
def test_an_output_folder(report, run, tmp_path, drawn, flag):
    a, b, where = run("a", "first"), run("b", "second"), tmp_path / "elsewhere" / "pictures"
    assert f"{where}/" in report(a, b, flag, where)
    assert drawn == [(["first"], a, "png"), (["second"], b, "png"), (["first", "second"], where, "png")]
    assert where.is_dir()


def test_the_order_is_that_of_the_words(report, run, drawn):
    a, b = run("a", "first"), run("b", "second")
    assert list(rows(report(a, b))) == ["first", "second"]
    assert list(rows(report(b, a))) == ["second", "first"]
    assert [names for names, *_ in drawn[2::3]] == [["first", "second"], ["second", "first"]]


def test_a_folder_of_runs(report, run, tmp_path, drawn):
    out = tmp_path / "out"
    b, a = run("out/b", "second"), run("out/a", "first")
    run("out/deeper/c", "not a run of this folder")
    (out / "notes").mkdir()
    (out / "notes.txt").touch()
    assert list(rows(report(out))) == ["first", "second"]
    assert drawn == [(["first"], a, "png"), (["second"], b, "png"), (["first", "second"], out, "png")]


def test_runs_of_several_folders_need_an_output_folder(command, report, run, tmp_path, drawn):
    run("out/a", "first")
    run("out/b", "second")
    runs = run("c", "third"), tmp_path / "out"
    assert "--output_dir" in error(command("report", *runs))
    assert not drawn
    assert list(rows(report(*runs, "--output_dir", tmp_path))) == ["third", "first", "second"]
    assert drawn[-1] == (["third", "first", "second"], tmp_path, "png")


def test_a_run_that_is_named_twice_is_shown_once(report, run, tmp_path, drawn):
    folder = run("out/a", "first")
    assert list(rows(report(folder, tmp_path / "out", tmp_path / "out" / ".." / "out" / "a"))) == ["first"]
    assert drawn == [(["first"], folder, "png")]


def test_an_output_folder_for_one_run(report, run, tmp_path, drawn):
    folder = run("a")
    assert f"{tmp_path / 'b'}/" in report(folder, "--output_dir", tmp_path / "b")
    assert drawn == [(["beta 5"], folder, "png"), (["beta 5"], tmp_path / "b", "png")]


def test_folders_are_relative_to_where_one_is(report, run, tmp_path, drawn, monkeypatch):
    run("out/a", "first")
    run("out/b", "second")
    monkeypatch.chdir(tmp_path / "out")
    report("a", "b")
    monkeypatch.chdir(tmp_path)
    report("out")
    assert [call[1] for call in drawn[2::3]] == [tmp_path / "out"] * 2


def test_a_folder_of_one_run(report, run, tmp_path, drawn):
    folder = run("out/a")
    assert f"{folder}/" in report(tmp_path / "out")
    assert drawn == [(["beta 5"], folder, "png")]


def test_svg(report, run, drawn, monkeypatch):
    a, b = run("a"), run("b")
    report(a, b, "--format", "svg")
    assert [suffix for *_, suffix in drawn] == ["svg"] * 3
    monkeypatch.undo()
    report(a, "--format", "svg")
    assert names(a) == {"record.json", "curves.svg", "reliability.svg"}
    for name in ("curves", "reliability"):
        assert ET.parse(a / f"{name}.svg").getroot().tag.endswith("svg")


def test_without_validation(report, run):
    folder = run("a", **NO_VALIDATION)
    out = report(folder)
    assert rows(out) == {"beta 5": ["-"] * 5 + ["62"]}
    assert names(folder) == {"record.json", "curves.png"} and colours(folder / "curves.png") > 10
    assert f"{folder}/reliability.png: nothing to draw" in out


def test_with_and_without_validation(report, run, tmp_path):
    out = report(run("a", "without", **NO_VALIDATION), run("b", "with"))
    assert rows(out) == {"without": ["-"] * 5 + ["62"], "with": ROW}
    assert names(tmp_path) == PICTURES | {"a", "b"}
    # There is but one diagram to show.
    assert (tmp_path / "reliability.png").read_bytes() == (tmp_path / "b" / "reliability.png").read_bytes()
    assert (tmp_path / "curves.png").read_bytes() != (tmp_path / "b" / "curves.png").read_bytes()


def test_a_run_that_has_not_finished_an_epoch(report, run):
    folder = run("a", **NO_VALIDATION | {"epochs": [], "log": []})
    out = report(folder)
    assert rows(out) == {"beta 5": ["-"] * 5 + ["62"]}
    assert names(folder) == {"record.json"} and out.count("nothing to draw") == 2


def test_a_diverged_run(report, run, tmp_path):
    out = report(run("a", "diverged run", **DIVERGED), run("b", "good"))
    assert rows(out) == {"diverged run": ["diverged"] * 5 + ["62"], "good": ROW}
    for folder in (tmp_path, tmp_path / "a"):
        assert all(colours(folder / name) > 10 for name in PICTURES)


def test_nan_is_a_diverged_run_too(report, run, drawn):
    """A record that something else has written: Python's JSON has NaN."""
    assert rows(report(run("a", final=dict.fromkeys(METRICS, float("nan"))))) == {"beta 5": ["diverged"] * 5 + ["62"]}


def test_names_are_shown_as_they_are(report, run, drawn):
    for i, name in enumerate(["[bold]x[/bold]", "[/]", "a [link=b]", ":smile:", "$x_1$"]):
        out = report(run(f"{i}", name, dataset={"name": "[red]data[/]", "tested_on": "[/]"}))
        assert list(rows(out)) == [name]
        assert "[red]data[/], split: [/]" in out


def test_data_sets_are_named_once(report, run, drawn):
    other = {"name": "leaves", "tested_on": "test"}
    out = report(run("a", "1"), run("b", "2"), run("c", "3", dataset=other))
    assert "flowers, split: validation; leaves, split: test" in out


def test_train_prints_and_draws_the_same():
    import gd_plugin.report
    import gd_plugin.train

    assert gd_plugin.train.print_table is gd_plugin.report.print_table
    assert gd_plugin.train.draw is gd_plugin.report.draw


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["empty", "nowhere", "a_file"])
def test_no_record(command, run, tmp_path, where):
    good = run("good")
    (tmp_path / "empty").mkdir()
    (tmp_path / "a_file").touch()
    message = error(command("report", good, tmp_path / where))
    assert f"{tmp_path / where} {'does not exist' if where == 'nowhere' else 'holds no record.json'}" in message
    assert names(good) == {"record.json"}  # all are read before the first is drawn


NOT_RECORDS = {
    "{": "not JSON",
    "[1]": "not a record but a JSON list",
    "{}": "it has no 'format'",
    '{"format": 2}': "record of format 2",
    '{"format": 1, "name": "x"}': "lacks config, seed, dataset, epochs, final, wall_time_s",
}


@pytest.mark.parametrize("text", NOT_RECORDS)
def test_not_a_record(command, run, text):
    good, bad = run("good"), run("bad")
    (bad / "record.json").write_text(text)
    message = error(command("report", good, bad))
    assert f"{bad / 'record.json'}: " in message and NOT_RECORDS[text] in message
    assert names(good) == names(bad) == {"record.json"}


@pytest.mark.parametrize("part", ["dataset", "wall_time_s"])
def test_a_record_without_a_part_that_is_shown(command, run, drawn, part):
    folder = run("a")
    cut = record()
    del cut[part]
    (folder / "record.json").write_text(json.dumps(cut))
    assert part in error(command("report", folder))


def test_an_output_folder_that_cannot_be(command, run, tmp_path, drawn):
    (tmp_path / "file").write_text("a file")
    a, b = run("a"), run("b")
    for where in (tmp_path / "file", tmp_path / "file" / "below"):
        assert str(tmp_path / "file") in error(command("report", a, b, "--output_dir", where))
    assert (tmp_path / "file").read_text() == "a file"
    assert command("report", a, b, "--output_dir", tmp_path / "folder" / "below").code == 0
    assert (tmp_path / "folder" / "below").is_dir()


def test_a_picture_that_cannot_be_written(command, run):
    folder = run("a")
    (folder / "curves.png").mkdir()
    assert "curves.png" in error(command("report", folder))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "RUN"),
        (["{run}", "--format", "pdf"], "pdf"),
        (["{run}", "--bogus"], "--bogus"),
        (["{run}", "--output_dir"], "--output_dir"),
    ],
)
def test_bad_words(command, run, words, message):
    folder = run("a")
    assert message in error(command("report", *[word.format(run=folder) for word in words]))
    assert names(folder) == {"record.json"}


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(command, flag):
    code, out, err = command("report", flag)
    assert (code, err) == (0, "")
    assert re.match(r"usage: gd-plugin report .*RUN \[RUN \.\.\.\]", " ".join(out.split()))
    assert "--output_dir" in out and "--output-dir" in out and "--format" in out


def test_without_transformers(run):
    """Who has installed only the extra `timm`. `train` shows that it really is not there."""
    folder = run("a")
    code = f"""
import sys
sys.path.insert(0, {str(Path(gd_plugin.__file__).parents[1])!r})
sys.modules["transformers"] = None
from gd_plugin.cli import main
assert main(["report", sys.argv[1]]) == 0
assert main(["train", "--dataset", "digits", "--model", "timm:test_efficientnet"]) == 2
"""
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=False)
    missing = "gd-plugin: error: the package transformers is missing: pip install 'gd_plugin[hf]'\n"
    assert (done.returncode, done.stderr) == (0, missing)
    assert rows(done.stdout) == {"beta 5": ROW}
    assert names(folder) == PICTURES | {"record.json"}


@pytest.mark.parametrize("key", ["num_train_epochs", "epochs"])
def test_a_run_that_was_ended_before_shows_it(report, run, drawn, key):
    out = report(run("a", "whole", config={key: 2}), run("b", "ended", config={key: 200}))
    assert [row[-2] for row in rows(out).values()] == ["2", "2/200"]
    assert "200" not in report(run("c", config={key: 2}))


def test_a_record_of_an_earlier_run_is_pointed_out(report, run, drawn):
    folder = run("a")
    (folder / "args.yaml").touch()
    os.utime(folder / "args.yaml", (0, 0))
    assert "earlier run" not in report(folder)
    os.utime(folder / "record.json", (0, 0))
    os.utime(folder / "args.yaml", (10, 10))
    assert "earlier run" in report(folder)


def test_the_record_itself_will_do(report, run, drawn):
    folder = run("a")
    assert list(rows(report(folder / "record.json"))) == ["beta 5"]
    assert drawn[0][1] == folder
