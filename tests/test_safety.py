"""No file of ours runs what others wrote: no pickle, no unsafe YAML, no remote code, no shell. No secret is told, and
what others wrote does not move the terminal."""

import ast
import io
import json
from pathlib import Path

import pytest
import torch
from files import contents
from timm_runs import launch, write_digits

from gd_plugin.terminal import Console

ROOT = Path(__file__).parent.parent
FILES = sorted([*(ROOT / "gd_plugin").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")])
MODULES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "builtins"}
CALLS = {
    "eval", "exec", "__import__", "os.system", "os.popen", "yaml.load", "yaml.full_load", "yaml.unsafe_load",
    "pandas.read_pickle", "subprocess.getoutput", "subprocess.getstatusoutput", "torch.jit.load", "torch.hub.load",
    "runpy.run_path", "numpy.lib.format.read_array", *(f"os.exec{how}" for how in ("l", "le", "lp", "v", "ve", "vp")),
}  # fmt: skip
LOADERS = {"yaml.Loader", "yaml.FullLoader", "yaml.UnsafeLoader"}
RUNS_THE_USERS_SCRIPT = {"timm_launch.py": {"exec"}}  # the train.py that the user names


def unsafe(source: str) -> list[str]:
    """What in a source is not safe, in order; under whatever name it was imported."""
    found, names = [], {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            found.append(node.module)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in LOADERS:
            found.append(ast.unparse(node))
        elif isinstance(node, ast.Call):
            first, *rest = ast.unparse(node.func).split(".")
            name = ".".join([names.get(first, first), *rest])
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if "trust_remote_code" in given.get(None, "") or (name == "numpy.load" and len(node.args) > 2):
                found.append(name)
            if name in CALLS:
                found.append(name)
            if name == "torch.load" and given.get("weights_only") != "True":
                found.append(name)
            for knob in ("trust_remote_code", "allow_pickle", "shell"):
                if given.get(knob, "False") != "False":
                    found.append(knob)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_unsafe(path):
    assert set(unsafe(path.read_text())) <= RUNS_THE_USERS_SCRIPT.get(path.name, set())


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text, Loader=loader)",
        "class A(yaml.FullLoader): pass",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(command, shell=True)",
        "eval(text)",
        "from torch import load; load(path)",
        "from os import system as run; run(text)",
        "from yaml import unsafe_load; unsafe_load(text)",
        "import pandas as pd; pd.read_pickle(path)",
        "import numpy as np; np.load(path, None, True)",
        "subprocess.getoutput(text)",
        "torch.hub.load(text, text)",
        "runpy.run_path(path)",
        "AutoModel.from_pretrained(name, **{'trust_remote_code': True})",
        "os.system(text)",
    ],
)
def test_the_search_finds(source):
    assert len(unsafe(source)) == 1
    assert not unsafe("torch.load(path, weights_only=True); yaml.safe_load(text); np.load(path, allow_pickle=False)")


# Secrets --------------------------------------------------------------------------------------------------------------

TOKEN = "hf_SENTINEL0123456789"


def test_the_token_is_told_nowhere(command, small, tmp_path, monkeypatch):
    """Given in the environment and as a flag: not in what any command prints, and not in a file that it leaves."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    runs = json.dumps({"reference": {"gd_beta": 1}, "cross-entropy": {"gd_beta": 1}, "beta 5": {"gd_beta": 5}})
    methods = json.dumps({"cross-entropy": {"gd_beta": 1}, "beta 5": {"gd_beta": 5}})
    train, study = tmp_path / "train", tmp_path / "study"
    hidden = [*small[: small.index("--seed")], "--hub_token", TOKEN, "--dataset", "digits"]
    done = [
        command("train", *hidden, "--runs", runs, "--trace_samples", "16", "--save_strategy", "epoch",
                "--output_dir", train),
        command("study", *hidden, "--study", methods, "--jobs", "1", "--output_dir", study),
        command("report", train),
        command("report", study),
        command("diagnose", train),
        command("card", train / "beta-5"),
        command("card", study),
        command("push", train / "beta-5", "--repo_id", "user/name", "--dry_run"),
        launch(command, "old", write_digits(tmp_path / "digits"), tmp_path / "timm", "--loss gd --gd-beta 5".split()),
        # What is wrong is told, but not with the token in it.
        command("train", *hidden, "--gd_beta", "-1", "--output_dir", tmp_path / "no"),
    ]  # fmt: skip
    assert [outcome.code for outcome in done] == [0] * 9 + [2], [outcome.err for outcome in done]
    assert not any(TOKEN in text for outcome in done for text in (outcome.out, outcome.err))
    found = contents(tmp_path)
    names = {path.name for path in tmp_path.rglob("*")}
    assert {"training_args.bin", "record.json", "study.json", "README.md", "args.yaml", "trace.npz"} <= names
    assert len(found) > 100 and not any(TOKEN.encode() in content for content in found)

    torch.save({"token": TOKEN}, tmp_path / "control.bin")
    assert any(TOKEN.encode() in content for content in contents(tmp_path))


# The terminal ---------------------------------------------------------------------------------------------------------


HOSTILE = ["\x1b[2J\x1b[1;1H", "\x1b]0;title\x07", "\x9b31m", "a\rb", "\u202eabc", "\x08\x08"]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_nobody_else_moves_the_cursor(hostile):
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None)
    console.print(f"name: {hostile}", markup=False)
    out = console.file.getvalue()
    assert out.startswith("name: ") and not set(out) & set("\x1b\x07\x9b\r\u202e\x08")
    # Its own colours are still there.
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard")
    console.print("[red]x[/red]")
    assert "\x1b[31mx" in console.file.getvalue()


def test_rich_alone_lets_the_cursor_be_moved():
    import rich.console

    console = rich.console.Console(file=io.StringIO(), force_terminal=True)
    console.print("\u202e\x9b31m\x1b[2J", markup=False)
    assert {"\u202e", "\x9b", "\x1b"} <= set(console.file.getvalue())
