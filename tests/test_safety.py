"""No file of ours runs what others wrote: no pickle, no unsafe YAML, no remote code, no shell."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted([*(ROOT / "gd_plugin").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")])
MODULES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
CALLS = {"eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.full_load", "yaml.unsafe_load"}
LOADERS = {"yaml.Loader", "yaml.FullLoader", "yaml.UnsafeLoader"}
RUNS_THE_USERS_SCRIPT = {"timm_launch.py": {"exec"}}  # the train.py that the user names


def unsafe(source: str) -> list[str]:
    """What in a source is not safe, in order."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            found.append(node.module)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in LOADERS:
            found.append(ast.unparse(node))
        elif isinstance(node, ast.Call):
            name, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
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
        "os.system(text)",
    ],
)
def test_the_search_finds(source):
    assert len(unsafe(source)) == 1
    assert not unsafe("torch.load(path, weights_only=True); yaml.safe_load(text); np.load(path, allow_pickle=False)")
