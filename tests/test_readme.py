"""Every snippet of README.md runs as it stands there; every number of its table is in a committed record."""

import re
import shlex
import statistics
import sys
from pathlib import Path

import pytest
import torch

from gd_plugin import cli
from gd_plugin.record import read_record

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
PYTHON = [text for language, text in BLOCKS if language == "python"]
SETUP = {name: text.strip() for name, text in re.findall(r"<!-- command: (\w+) -->\n```bash\n(.*?)```", README, re.S)}
SHELL = [text.strip() for language, text in BLOCKS if language == "bash" and text.strip() not in SETUP.values()]


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the snippets take for granted: a model and two data sets, tiny, in an empty folder."""
    from transformers import ViTConfig, ViTForImageClassification

    monkeypatch.chdir(tmp_path)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4,
        num_labels=3,
    )  # fmt: skip
    samples = [{"pixel_values": torch.randn(3, 8, 8), "labels": i % 3} for i in range(16)]
    return {"model": ViTForImageClassification(config), "train_dataset": samples, "eval_dataset": samples}


def test_the_readme_has_snippets():
    assert len(PYTHON) == 4 and len(SHELL) == 1 and set(SETUP) == {"demo", "test"}
    assert {language for language, _ in BLOCKS} == {"diff", "python", "bash", "bibtex"}


@pytest.mark.parametrize("snippet", PYTHON, ids=range(len(PYTHON)))
def test_python_snippet(snippet, names):
    exec(compile(snippet, "README.md", "exec"), names)


def test_the_changed_line(names):
    (diff,) = (text for language, text in BLOCKS if language == "diff")
    before, after = ("\n".join(line[1:] for line in diff.splitlines() if line.startswith(sign)) for sign in ("-", "+"))
    for text in (before, after):
        exec(text, names)
        names["trainer"].train()
    assert names["trainer"].gd_config.beta_start == 0.01


@pytest.mark.parametrize("command", SHELL)
def test_shell_snippet(command, tmp_path, monkeypatch):
    """The command, on built-in data in place of the Hub's and shortened."""
    monkeypatch.chdir(tmp_path)
    program, *words = shlex.split(command)
    assert program == "gd-plugin"
    small = "--dataset digits --max_train_samples 64 --max_eval_samples 32 --num_train_epochs 1"
    assert cli.main([*words, *small.split()]) == 0
    assert read_record(next(tmp_path.glob("runs/*/record.json")))["gd"]["beta_start"] == 0.01


def test_setup_commands_are_the_ones_that_ci_runs():
    ci = (ROOT / ".ci/run").read_text()
    assert "for name in test demo" in ci
    assert SETUP["demo"].endswith(".venv/bin/gd-plugin train digits")
    assert SETUP["test"].endswith(".venv/bin/pytest")


COLUMNS = {  # title: (key in the record, scale, digits)
    "accuracy %": ("accuracy", 100, 2),
    "NLL": ("nll", 1, 4),
    "ECE %": ("ece", 100, 2),
    "gap %": ("confidence_gap", 100, 2),
}


def table(recipe):
    """The markdown table of a recipe's committed records: mean ± standard deviation over the seeds."""
    records = {}
    for path in sorted((ROOT / "recipes/results" / recipe).glob("seed-*/*.json")):
        record = read_record(path)
        records.setdefault(record["name"], []).append(record)
    lines = [f"| {recipe}, test split | n | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name in ("cross-entropy", *sorted(records.keys() - {"cross-entropy"})):
        cells = []
        for key, scale, digits in COLUMNS.values():
            values = [record["final"][key] * scale for record in records[name]]
            sign = "+" if key == "confidence_gap" else ""
            cells.append(f"{statistics.mean(values):{sign}.{digits}f} ± {statistics.stdev(values):.{digits}f}")
        lines.append(f"| {name} | {len(records[name])} | {' | '.join(cells)} |")
    return "\n".join(lines)


@pytest.mark.parametrize("recipe", re.findall(r"<!-- table: (\w+) -->", README))
def test_table_is_that_of_the_committed_records(recipe):
    assert table(recipe) in README


def test_committed_records_say_where_they_come_from():
    paths = sorted((ROOT / "recipes/results").glob("*/seed-*/*.json"))
    assert paths
    for path in paths:
        record = read_record(path)
        assert record["commit"] and not record["commit"].endswith("+dirty"), path
        assert record["hardware"]["cpu"] and record["versions"]["torch"] and len(record["epochs"]) > 1
        assert record["seed"] == int(path.parent.name.removeprefix("seed-"))


if __name__ == "__main__":  # python tests/test_readme.py digits: the table to paste
    print(table(sys.argv[1]))
