"""`python train.py --device-modules gd_plugin.timm_hook`: the run of the launcher, without a launcher."""

import contextlib
import importlib
import io
import os
import runpy
import subprocess
import sys

import pytest
from timm_runs import (
    SCRIPTS,
    arguments,
    changed,
    expected_betas,
    flags,
    global_state,
    launch,
    own_logging,
    read_summary,
    write_digits,
)

from gd_plugin.config import GradientDecayConfig
from gd_plugin.record import read_record

HOOK = ["--device-modules", "gd_plugin.timm_hook"]
CONFIG = GradientDecayConfig(beta=5.0, beta_start=0.01, schedule="geometric", warmup_epochs=1.5)
# With a variable that is somebody else's, and an empty one, which is none.
VARIABLES = dict(
    GD_BETA="5", GD_BETA_START="0.01", GD_SCHEDULE="geometric", GD_WARMUP_EPOCHS="1.5", GD_DEBUG="1", GD_WARMUP_STEPS=""
)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module", autouse=True)
def process(digits, tmp_path_factory):
    """A run of a process of its own. It is started before the first test, and the last one waits for it: to start takes
    a process ten seconds."""
    folder = tmp_path_factory.mktemp("hooked") / "run"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GD_")} | VARIABLES
    words = [str(next(iter(SCRIPTS.values()))), *arguments(digits, folder, HOOK)]
    with open(folder.parent / "output", "w") as output:
        process = subprocess.Popen([sys.executable, *words], stdout=output, stderr=output, env=environment)
        yield process, folder
        process.terminate()
        process.wait()


@pytest.fixture
def by_itself(digits, monkeypatch, tmp_path):
    """A script with the hook in this process: how it ended, what it said, and its folder."""
    for name in [name for name in os.environ if name.startswith("GD_")]:
        monkeypatch.delenv(name)
    before = global_state()

    def run(script, variables, words=""):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        path, folder, code = str(SCRIPTS[script]), tmp_path / "run", 0
        monkeypatch.setattr(sys, "argv", [path, *arguments(digits, folder, [*HOOK, *words.split()])])
        with own_logging(), contextlib.redirect_stderr(io.StringIO()) as err:
            try:
                runpy.run_path(path, run_name="__main__")
            except SystemExit as end:
                code = end.code
        return code, err.getvalue(), folder

    sys.modules.pop("gd_plugin.timm_hook", None)
    yield run
    sys.modules.pop("gd_plugin.timm_hook", None)
    monkeypatch.undo()
    assert not changed(before, global_state())


BAD = {
    "nothing": ({}, "", "needs GD_BETA in the environment"),
    "empty": ({"GD_BETA": ""}, "", "needs GD_BETA in the environment"),
    "no beta": ({"GD_BETA_START": "1", "GD_WARMUP_EPOCHS": "1"}, "", "needs GD_BETA in the environment"),
    "misspelt": ({"GD_BETTA": "5"}, "", "GD_BETTA is no variable of gd_plugin.timm_hook; did you mean GD_BETA?"),
    "misspelt, too": ({"GD_BETA": "5", "GD_WARM_UP_EPOCHS": "5"}, "", "did you mean GD_WARMUP_EPOCHS?"),
    "text": ({"GD_BETA": "five"}, "", "GD_BETA 'five': give one number"),
    "zero": ({"GD_BETA": "0"}, "", "GD_BETA must be greater than 0"),
    "no length": ({"GD_BETA": "5", "GD_BETA_START": "1"}, "", "set GD_WARMUP_RATIO"),
    "not whole": ({"GD_BETA": "5", "GD_BETA_START": "1", "GD_WARMUP_STEPS": "1.5"}, "", "give a whole number"),
    "classes": ({"GD_BETA": "1,2,3"}, "", "GD_BETA has 3 values for 10 classes"),
    "long": ({"GD_BETA": "5", "GD_BETA_START": "1", "GD_WARMUP_EPOCHS": "3"}, "", "lower GD_WARMUP_EPOCHS"),
    "binary": ({"GD_BETA": "5"}, "--bce-loss", "remove --bce-loss"),
    "jsd": ({"GD_BETA": "5"}, "--jsd-loss --aug-splits 2", "remove --jsd-loss"),
    "metric": ({"GD_BETA": "5"}, "--eval-metric ece", "use --eval-metric loss"),
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("name", BAD)
def test_bad_input(script, name, by_itself):
    variables, words, message = BAD[name]
    code, err, folder = by_itself(script, variables, words)
    assert (code, err.count("\n")) == (2, 1), err
    assert err.startswith(("gd_plugin.timm_hook: error: ", "gd-plugin: error: "))
    assert message in err
    assert not list(folder.glob("*.pth.tar"))


@pytest.mark.parametrize("script", SCRIPTS.keys() & {"new"})
def test_another_loss_of_the_script_is_refused(script, by_itself):
    code, err, _ = by_itself(script, {"GD_BETA": "5"}, "--loss poly")
    assert (code, err.count("\n")) == (2, 1)
    assert "the script trains with PolyCrossEntropy" in err


def test_only_a_script_of_timm_can_import_it(monkeypatch, capsys):
    monkeypatch.setenv("GD_BETA", "5")
    sys.modules.pop("gd_plugin.timm_hook", None)
    with pytest.raises(SystemExit) as end:
        importlib.import_module("gd_plugin.timm_hook")
    out, err = capsys.readouterr()
    assert (end.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("gd_plugin.timm_hook: error: gd_plugin.timm_hook is for timm's train.py")


@pytest.mark.parametrize("script", reversed(SCRIPTS))
def test_the_hook_trains_as_the_launcher(script, command, digits, by_itself, process, tmp_path):
    launched = launch(command, script, digits, tmp_path / "launched", flags(CONFIG))
    other = launch(command, script, digits, tmp_path / "other", "--loss gd --gd-beta 5")
    if script == next(iter(SCRIPTS)):
        code, folder = process[0].wait(timeout=120), process[1]
        err = (folder.parent / "output").read_text()
    else:
        code, err, folder = by_itself(script, VARIABLES)
    assert code == launched.code == other.code == 0, err[-4000:]

    assert read_summary(folder) == launched.summary
    assert launched.betas == expected_betas(CONFIG, 2, [1] * 4)
    assert launched.column("train_loss") != pytest.approx(other.column("train_loss"), rel=1e-3)
    record = read_record(folder / "record.json")
    for part in ("gd", "epochs", "log", "final", "reliability", "dataset", "model", "seed"):
        assert record[part] == launched.record[part]
    assert record["final"] != other.record["final"]
    variables = "GD_BETA=5 GD_BETA_START=0.01 GD_SCHEDULE=geometric GD_WARMUP_STEPS= GD_WARMUP_EPOCHS=1.5"
    assert record["command"].startswith(f"{variables} python train.py --data-dir digits")
