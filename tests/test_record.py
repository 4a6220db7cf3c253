from __future__ import annotations

import getpass
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gd_plugin import record
from gd_plugin.record import environment, epochs_from_log, publishable, read_record, write_atomic, write_json

RECORD = {
    "format": 1,
    "name": "beta5",
    "config": {},
    "seed": 0,
    "dataset": {},
    "epochs": [],
    "final": {},
    "wall_time_s": 1.0,
}


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# write_atomic, write_json ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("data", "expected"), [("β\r\n", "β\r\n".encode()), (b"\x00\xff", b"\x00\xff"), ("", b"")])
def test_write_atomic_writes_and_replaces(tmp_path, data, expected):
    path = tmp_path / "file.txt"
    for _ in range(2):
        write_atomic(str(path), data)
        assert path.read_bytes() == expected
        assert names(tmp_path) == ["file.txt"]
        path.write_bytes(b"old")


def test_written_files_have_the_usual_permissions(tmp_path):
    (tmp_path / "plain").touch()
    write_atomic(tmp_path / "atomic", "x")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("function", ["replace", "fsync"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_failing_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, function, error):
    path = tmp_path / "file.txt"
    path.write_text("old")
    seen = []

    def fail(*_):
        seen.extend(names(tmp_path))
        raise error

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(error):
        write_atomic(path, "new")
    assert len(seen) == 2  # there was a temporary file, in the same folder
    assert names(tmp_path) == ["file.txt"]
    assert path.read_text() == "old"


@pytest.mark.parametrize("data", ["\ud800", 7])
def test_data_that_cannot_be_written(tmp_path, data):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises((UnicodeEncodeError, TypeError)):
        write_atomic(path, data)
    assert names(tmp_path) == ["file.txt"]
    assert path.read_text() == "old"


def test_absent_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "absent" / "file.txt", "new")
    assert names(tmp_path) == []


def test_write_json(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"b": [1.5, math.nan, (math.inf, -math.inf)], "a": {"β": None, "n": True}})
    text = path.read_text(encoding="utf-8")
    assert text.startswith('{\n  "b"') and text.endswith("}\n") and "β" in text
    assert json.loads(text) == {"b": [1.5, None, [None, None]], "a": {"β": None, "n": True}}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert path.read_text(encoding="utf-8") == text


# environment ----------------------------------------------------------------------------------------------------------


def test_environment(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret_token")
    result = environment()
    assert list(result) == ["python", "platform", "versions", "commit", "hardware"]
    assert result["python"] == ".".join(map(str, sys.version_info[:3]))
    assert "torch" in result["versions"] and "pytest" not in result["versions"]
    assert result["hardware"]["cpu"] and result["hardware"]["cpu_count"] == os.cpu_count()
    assert result["hardware"]["gpu_count"] == len(result["hardware"]["gpu"])
    assert result["hardware"]["torch_threads"] >= 1 and result["hardware"]["processes"] == 1
    texts = [str(leaf) for leaf in leaves(result)]
    assert not any(text.startswith(("/", "~", "C:")) or "secret" in text for text in texts)
    words = {word for text in texts for word in text.replace("-", " ").split()}
    assert words.isdisjoint({socket.gethostname(), getpass.getuser()})


def leaves(obj):
    if isinstance(obj, dict):
        return [leaf for value in obj.values() for leaf in leaves(value)]
    return [leaf for value in obj for leaf in leaves(value)] if isinstance(obj, list) else [obj]


def test_absent_packages_have_no_version(monkeypatch):
    monkeypatch.setattr(record, "_PACKAGES", ("torch", "no-such-package"))
    assert list(environment()["versions"]) == ["gd_plugin", "torch"]


@pytest.fixture
def checkout(tmp_path):
    """A git repository that tracks a package, and a function that runs git in it."""
    package = tmp_path / "gd_plugin"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (tmp_path / "README.md").write_text("")
    (tmp_path / ".gitignore").write_text("ignored*\n")

    def git(*arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
        command = ["git", *identity, *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    return package, git


def test_commit_of_a_checkout(checkout):
    package, git = checkout
    assert record.commit(package) is None  # not tracked
    git("add", ".")
    assert record.commit(package) is None  # no commit yet
    git("commit", "-m", "m")
    head = git("rev-parse", "HEAD")
    assert len(head) >= 40 and record.commit(package) == head
    (package / "ignored.pyc").touch()
    (package.parent / "notes.txt").touch()
    assert record.commit(package) == head


@pytest.mark.parametrize("change", ["gd_plugin/__init__.py", "README.md", "gd_plugin/new.py"])
def test_a_changed_checkout_is_dirty(checkout, change):
    package, git = checkout
    git("add", ".")
    git("commit", "-m", "m")
    (package.parent / change).write_text("x = 1\n")
    assert record.commit(package) == git("rev-parse", "HEAD") + "+dirty"


def test_a_package_installed_below_an_unrelated_checkout_has_no_commit(checkout):
    package, git = checkout
    git("add", ".")
    git("commit", "-m", "m")
    installed = package.parent / "ignored-venv" / "gd_plugin"
    shutil.copytree(package, installed)
    assert record.commit(package) is not None
    assert record.commit(installed) is None


def test_without_git(checkout, monkeypatch):
    package, git = checkout
    git("add", ".")
    git("commit", "-m", "m")
    monkeypatch.setenv("PATH", "")
    assert record.commit(package) is None


# epochs_from_log ------------------------------------------------------------------------------------------------------

TRAINING = [
    {
        "loss": 2.0,
        "cross_entropy": 3.0,
        "grad_norm": 1.0,
        "learning_rate": 0.1,
        "gd_beta": 0.1,
        "epoch": 0.5,
        "step": 5,
    },
    {
        "loss": 1.0,
        "cross_entropy": 2.0,
        "grad_norm": 1.0,
        "learning_rate": 0.1,
        "gd_beta": 0.2,
        "epoch": 1.0,
        "step": 10,
    },
    {
        "loss": -1.0,
        "cross_entropy": 1.0,
        "grad_norm": 1.0,
        "learning_rate": 0.1,
        "gd_beta": 0.3,
        "epoch": 1.5,
        "step": 15,
    },
]
SPEED = {"eval_runtime": 1.0, "eval_samples_per_second": 9.0, "eval_steps_per_second": 2.0}
EVALUATIONS = [
    {"eval_loss": 0.9, "eval_accuracy": 0.5, **SPEED, "eval_model_preparation_time": 0.1, "epoch": 1.0, "step": 10},
    {"eval_loss": 0.8, "eval_accuracy": 0.6, **SPEED, "epoch": 2.0, "step": 20},
]
END = {
    "train_runtime": 9.0,
    "train_samples_per_second": 1.0,
    "total_flos": 1.0,
    "train_loss": 1.0,
    "epoch": 2,
    "step": 20,
}


def test_epochs_from_log():
    log = [*TRAINING[:2], EVALUATIONS[0], TRAINING[2], EVALUATIONS[1], END]
    epoch = {"loss": 1.5, "cross_entropy": 2.5, "gd_beta": 0.2, "eval_loss": 0.9, "eval_accuracy": 0.5}
    last = {"loss": -1.0, "cross_entropy": 1.0, "gd_beta": 0.3, "eval_loss": 0.8, "eval_accuracy": 0.6}
    assert epochs_from_log(log) == [{"epoch": 1.0, "step": 10, **epoch}, {"epoch": 2.0, "step": 20, **last}]


def test_an_evaluation_without_training_before_it():
    first, second = epochs_from_log([EVALUATIONS[0], TRAINING[2], EVALUATIONS[1]])
    assert (first["loss"], first["cross_entropy"], first["gd_beta"]) == (None, None, None)
    assert (second["loss"], second["gd_beta"]) == (-1.0, 0.3)
    again = epochs_from_log([TRAINING[0], *EVALUATIONS])[1]
    assert (again["loss"], again["gd_beta"]) == (None, 0.1)


def test_a_run_that_never_evaluates():
    epochs = epochs_from_log([*TRAINING, END])
    assert [(e["epoch"], e["step"], e["loss"], e["cross_entropy"], e["gd_beta"]) for e in epochs] == [
        (0.5, 5, 2.0, 3.0, 0.1),
        (1.0, 10, 1.0, 2.0, 0.2),
        (1.5, 15, -1.0, 1.0, 0.3),
    ]
    assert epochs_from_log([]) == epochs_from_log([END]) == []


def test_a_log_of_another_loss():
    assert epochs_from_log([{"loss": 1.0, "epoch": 1.0, "step": 1}, EVALUATIONS[1]])[0]["cross_entropy"] is None


def test_the_log_is_left_alone():
    log = [TRAINING[0], EVALUATIONS[0]]
    before = json.dumps(log)
    epochs_from_log(log)
    assert json.dumps(log) == before


# read_record ----------------------------------------------------------------------------------------------------------


def test_read_record(tmp_path):
    write_json(tmp_path / "record.json", RECORD | {"more": [1]})
    assert read_record(str(tmp_path / "record.json")) == RECORD | {"more": [1]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not JSON"),
        (b"", "not JSON"),
        (b"\xff\xfe\xff", "not JSON"),
        (b"[1]", "JSON list"),
        (json.dumps({k: v for k, v in RECORD.items() if k != "format"}).encode(), "no 'format'"),
        (json.dumps(RECORD | {"format": 2}).encode(), "format 2, this version reads 1"),
        (
            json.dumps({"format": 1, "name": "x", "seed": 0, "final": {}}).encode(),
            "lacks config, dataset, epochs, wall_time_s",
        ),
    ],
)
def test_what_is_no_record_is_refused(tmp_path, content, message):
    path = tmp_path / "some.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_record(path)
    assert str(path) in str(error.value) and "; " in str(error.value) and "\n" not in str(error.value)


def test_an_absent_record(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_record(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/data/cifar10", "cifar10"),
        ("~/cifar10", "cifar10"),
        ("hfds//data/cifar10", "hfds/cifar10"),
        ("hfds/uoft-cs/cifar10", "hfds/uoft-cs/cifar10"),
        ("https://host/name", "https://host/name"),
        ("data/cifar10", "data/cifar10"),
        (0.5, 0.5),
    ],
)
def test_a_record_keeps_no_folder_of_a_machine(value, expected):
    assert publishable(value) == expected
