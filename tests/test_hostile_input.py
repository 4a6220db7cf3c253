"""An inventory of wrong input: each is refused in one line that says what to mend, and nothing is left behind.

The rows are in hostile_input.json: the words of a command and the exact line that answers it, up to ``...`` where a
library goes on in words of its version. ``{T}`` is the folder of what `hostile_things.make_things` made, ``{O}`` an
output folder that does not exist.
"""

import json
from pathlib import Path

import pytest
from hostile_things import make_things

ROWS = json.loads((Path(__file__).parent / "hostile_input.json").read_text())


@pytest.fixture(scope="module")
def things(tmp_path_factory, bert, vit):
    return make_things(tmp_path_factory.mktemp("things"), bert, vit)


def everything(*folders):
    """All files there, with their sizes and dates."""
    found = {path: path.lstat() for folder in folders for path in sorted(folder.rglob("*"))}
    return {str(path): (stat.st_size, stat.st_mtime_ns) for path, stat in found.items() if not path.is_dir()}


@pytest.fixture
def answer(things, command, tmp_path, monkeypatch):
    """Exit code, standard output and the error of a command, and what it changed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path.parent / "cache"))

    def run(words):
        places = {"{T}": str(things), "{O}": str(tmp_path / "output")}
        before = everything(things, tmp_path)
        for name, folder in places.items():
            words = [word.replace(name, folder) for word in words]
        code, _, err = command(*words)
        after = everything(things, tmp_path)
        for name, folder in places.items():
            err = err.replace(folder, name)
        return code, err, {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}

    return run


@pytest.mark.parametrize("name", ROWS)
def test_wrong_input_is_one_line_and_leaves_nothing(name, answer):
    code, err, changed = answer(ROWS[name]["words"])
    says = ROWS[name]["says"]
    assert err.startswith(says[:-3]) if says.endswith("...") else err == f"{says}\n"
    assert code == 2 and err.count("\n") == 1 and err.startswith("gd-plugin: error: ")
    assert not changed


def test_there_are_many(figure):
    figure("wrong inputs", len(ROWS))
    assert len(ROWS) >= 80
    assert len({row["says"] for row in ROWS.values()}) >= 80  # of different kinds


def test_right_input_is_not_refused(answer):
    """Control: the same folders, where nothing is wrong, and a command that writes is seen to."""
    assert answer(["report", "{T}/good/run", "{T}/records/good/run", "--output_dir", "{O}"])[:2] == (0, "")
    code, err, changed = answer(["card", "{T}/good/run"])
    assert (code, err) == (0, "") and any(path.endswith("README.md") for path in changed)
