"""Every snippet of README.md runs as it stands there; every number of its table is in a committed record."""

import contextlib
import importlib.util
import io
import os
import re
import shlex
import shutil
import subprocess
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
SHELL = [
    line
    for language, text in BLOCKS
    if language == "bash" and text.strip() not in SETUP.values()
    for line in text.strip().splitlines()
]
DIFFS = [
    ["\n".join(line[1:] for line in text.splitlines() if line.startswith(sign)) for sign in ("-", "+")]
    for language, text in BLOCKS
    if language == "diff"
]
TIMM = [command for command in (*SHELL, DIFFS[1][1]) if "train.py" in command]


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


@pytest.fixture(scope="session")
def timm_folder(tmp_path_factory):
    """Where timm's commands are given: a train.py, a folder of images, and two runs of it."""
    from timm_runs import SCRIPTS, write_digits

    folder = tmp_path_factory.mktemp("timm")
    shutil.copy(SCRIPTS["new"], folder)
    write_digits(folder / "data")
    for name in ("first-run", "second-run"):
        _shell(f"{DIFFS[1][1]} {SHORT} --output output/train --experiment {name}", folder)
    return folder


# A small network in place of ResNet-18, and just more epochs than the warm-up has.
SHORT = (
    "--model test_vit --model-kwargs img_size=32 depth=1 --img-size 32 --epochs 6 --batch-size 32 --workers 0 "
    "--device cpu"
)


def _shell(command, folder):
    """A command of the README as it stands there: what starts gd-plugin in this process, anything else in a shell."""
    from timm_runs import own_logging

    if command.startswith("gd-plugin "):
        before = Path.cwd()
        os.chdir(folder)
        try:
            with own_logging(), contextlib.redirect_stdout(io.StringIO()) as out:
                assert cli.main(shlex.split(command)[1:]) == 0
        finally:
            os.chdir(before)
        return out.getvalue()
    programs = folder / "bin"
    if not programs.exists():  # this Python's, whose environment need not be active
        programs.mkdir()
        starts = {
            "python": "",
            "torchrun": '-c "from torch.distributed.run import main; main()"',
            "accelerate": "-m accelerate.commands.accelerate_cli",
        }
        for name, words in starts.items():
            (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
            (programs / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_readme_has_snippets():
    assert (
        len(PYTHON) == 9 and len(SHELL) == 15 and len(DIFFS) == 2 and len(TIMM) == 4 and set(SETUP) == {"demo", "test"}
    )
    assert {language for language, _ in BLOCKS} == {"diff", "python", "bash", "bibtex"}


@pytest.mark.parametrize("snippet", PYTHON, ids=range(len(PYTHON)))
def test_python_snippet(snippet, names, request):
    if "gd_plugin.timm" in snippet:
        os.chdir(request.getfixturevalue("timm_folder"))
    if "user/name" in snippet and "pipeline" in snippet:
        request.getfixturevalue("hub")
    exec(compile(snippet, "README.md", "exec"), names)


def test_the_changed_line(names):
    for text in DIFFS[0]:
        exec(text, names)
        names["trainer"].train()
    assert names["trainer"].gd_config.beta_start == 0.01


@pytest.mark.parametrize("command", TIMM, ids=range(len(TIMM)))
def test_timm_command(command, timm_folder, tmp_path):
    _shell(f"{command} {SHORT} --output {tmp_path} --experiment run", timm_folder)
    record = read_record(tmp_path / "run/record.json")
    assert record["gd"]["beta"] == 5 and len(record["epochs"]) == 6
    start = 0.01 if "beta-start" in command or "BETA_START" in command else None
    assert record["gd"]["beta_start"] == start and record["gd"]["warmup_epochs"] == (5 if start else 0)


def test_the_flag_is_added_to_a_command_that_runs_without_it(timm_folder, tmp_path):
    before, after = DIFFS[1]
    assert after == before.replace("python train.py", "gd-plugin timm train.py") + " --loss gd --gd-beta 5"
    _shell(f"{before} {SHORT} --output {tmp_path} --experiment run", timm_folder)
    assert (tmp_path / "run/summary.csv").exists() and not (tmp_path / "run/record.json").exists()


def test_report_command(timm_folder):
    (command,) = (command for command in SHELL if command.startswith("gd-plugin report output"))
    assert "first-run" in _shell(command, timm_folder)
    assert (timm_folder / "output/train/curves.png").exists()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub of its own, where the model of a run of `gd-plugin train` has been pushed to user/name."""
    from hub_server import HubServer, connect

    with HubServer(user="user") as server:
        connect(server, monkeypatch, tmp_path / "home")
        small = "--max_train_samples 64 --max_eval_samples 32 --num_train_epochs 1"
        small += """ --runs '{"beta 5": {"gd_beta": 5}}'"""
        _shell(f"gd-plugin train digits {small}", tmp_path)
        for command in (command for command in SHELL if command.startswith("gd-plugin push")):
            out = _shell(command, tmp_path)
            assert ("model.safetensors" in out) == ("--dry_run" in command) != ("user/name" in server.repos)
        yield server


def test_push_commands(hub):
    assert {"README.md", "model.safetensors", "record.json"} <= set(hub.repos["user/name"].files)


def test_train_command(tmp_path, monkeypatch):
    """The command, on built-in data in place of the Hub's and shortened."""
    (command,) = (command for command in SHELL if command.startswith("gd-plugin train --dataset"))
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)[1:]
    small = "--dataset digits --max_train_samples 64 --max_eval_samples 32 --num_train_epochs 1"
    assert cli.main([*words, *small.split()]) == 0
    assert read_record(next(tmp_path.glob("runs/*/record.json")))["gd"]["beta_start"] == 0.01


def test_study_commands(tmp_path):
    """On a few of the digits in place of MNIST, with two methods and few updates."""
    from gd_plugin.data import _digits

    images = _digits()
    for split, rows in images.items():
        (tmp_path / "path/to/mnist").mkdir(parents=True, exist_ok=True)
        rows.select(range(64)).to_parquet(tmp_path / f"path/to/mnist/{split}.parquet")
    studies = [command for command in SHELL if command.startswith("gd-plugin study")]
    (report,) = (command for command in SHELL if command.startswith("gd-plugin report studies"))
    assert len(studies) == 2
    short = "--methods cross-entropy 'beta 5' --num_train_epochs 1 --max_train_samples 64 --max_eval_samples 32"
    for command in studies:
        command = command.replace("--seeds 5 --jobs 2", "--seeds 2 --jobs 1")
        _shell(f"{command} {short}", tmp_path)
    assert "beta 5" in _shell(report, tmp_path)
    assert (tmp_path / "studies/mnist_mlp/index.html").exists()


def test_diagnose_commands(tmp_path):
    """With four runs of a tiny network in place of six."""
    train, diagnose = (command for command in SHELL if "digits_traced" in command)
    runs = '{"reference": {"gd_beta": 1, "seed": 1}, "cross-entropy": {"gd_beta": 1}, "beta 5": {"gd_beta": 5}}'
    _shell(
        f"{train} --runs '{runs}' --num_train_epochs 1 --max_train_samples 64 --max_eval_samples 32 --trace_samples 32",
        tmp_path,
    )
    out = _shell(diagnose, tmp_path)
    assert [line.split(":")[0] for line in out.splitlines()[:3]] == ["curriculum", "features", "smoothness"]
    pictures = {path.name for path in (tmp_path / "runs/digits_traced").glob("*.png")}
    assert {"curriculum.png", "features.png", "smoothness.png"} <= pictures


@pytest.mark.dist
@pytest.mark.parametrize("command", [line for line in SHELL if "accelerate launch" in line], ids=["train", "loop"])
def test_many_processes_command(command, tmp_path):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    if "gd_plugin train" in command:
        runs = """--runs '{"beta 5": {"gd_beta": 5}}'"""
        command = f"{command} --max_train_samples 64 --max_eval_samples 32 --num_train_epochs 1 {runs}"
    _shell(command, tmp_path)
    if "loop.py" in command:
        assert (tmp_path / "runs/accelerate_loop/model.safetensors").exists()
    else:
        assert read_record(tmp_path / "runs/digits/beta-5/record.json")["hardware"]["processes"] == 2


def test_bench_command(tmp_path):
    (command,) = (command for command in SHELL if "gd_plugin.bench" in command)
    assert "gradient-decay" not in _shell(f"{command} --parts classes --largest 400 --rounds 1", tmp_path)
    assert (tmp_path / "bench/bench.json").exists() and (tmp_path / "bench/classes.png").exists()


def test_setup_commands_are_the_ones_that_ci_runs():
    ci = (ROOT / ".ci/run").read_text()
    assert "for name in test demo" in ci
    assert SETUP["demo"].endswith(".venv/bin/gd-plugin train digits")
    assert SETUP["test"].endswith(".venv/bin/pytest -n auto --dist worksteal")


def test_what_is_written_from_records_is_what_they_say():
    """Tables of recipes/results and of this README; a changed digit is found."""
    path = ROOT / "recipes/render.py"
    render = importlib.util.module_from_spec(importlib.util.spec_from_file_location("render", path))
    render.__spec__.loader.exec_module(render)
    files = render.rendered()
    assert ROOT / "README.md" in files and len(files) > 2
    assert [path for path, text in files.items() if path.read_text(encoding="utf-8") != text] == []

    number = re.search(r"<!-- table: \w+ -->\n(?:.*\n){2}.*?(\d\.\d)", README)[1]
    wrong = README.replace(number, number[::-1], 1)
    assert wrong != README and wrong != files[ROOT / "README.md"]


def test_committed_records_say_where_they_come_from():
    paths = sorted((ROOT / "recipes/results").glob("*/seed-*/*.json"))
    assert paths
    for path in paths:
        record = read_record(path)
        assert record["commit"] and not record["commit"].endswith("+dirty"), path
        assert record["hardware"]["cpu"] and record["versions"]["torch"] and len(record["epochs"]) > 1
        assert record["seed"] == int(path.parent.name.removeprefix("seed-"))
