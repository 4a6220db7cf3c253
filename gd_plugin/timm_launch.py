"""``gd-plugin timm PATH/TO/train.py ...``: timm's own script, unedited, with one loss more.

The script is loaded, not run; its argument parser, a global, gets our options, so that ``--help``, a YAML ``--config``
and the run's ``args.yaml`` know them as timm's own; then its ``main`` is called. What was changed in timm is put back.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import os
import shlex
import sys
import types
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
from packaging.version import Version

from .config import GradientDecayConfig, rename_fields
from .reading import load_yaml
from .record import publishable_words
from .timm import LOSS_TYPE, has_loss_factory, register, unregister
from .timm_options import FIELDS, UsageError, refuse, value_of
from .timm_train import TimmRun

__all__ = ["launch"]

_OLDEST = "1.0.20"
# What a script must have: its functions, and of train_one_epoch the parameters that a `TimmRun` reads or replaces.
_FUNCTIONS = ("main", "_parse_args", "train_one_epoch", "validate")
_PARAMETERS = ("epoch", "model", "loader", "args", "device", "lr_scheduler", "output_dir", "num_updates_total")
_active = False


def launch(argv: list[str]) -> int:
    """Run a ``train.py`` of timm.

    Args:
        argv: path of the script, then its words; ours are among them.

    Returns:
        The script's exit code.

    Raises:
        UsageError: bad input, in one line; nothing has been trained. What only the model and the data can tell (a
            warm-up longer than training) ends the script with exit code 2, after it has made its output folder.
    """
    if is_active():
        raise UsageError("gd-plugin timm is running already; start it once, with timm's train.py")
    path, words = Path(argv[0]), argv[1:]
    source = _read(path)
    _check_config_file(words)
    with _script(path, source, words) as script:
        _add_arguments(script.parser)
        script._parse_args = _parsing(script, f"{_program()} {shlex.join(publishable_words(argv))}")
        try:
            script.main()
        except SystemExit as end:
            if end.code is None or isinstance(end.code, int):
                return end.code or 0
            print(end.code, file=sys.stderr)  # as Python does
            return 1
    return 0


def _program() -> str:
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return "gd-plugin timm" if processes == "1" else f"torchrun --nproc-per-node {processes} -m gd_plugin.timm"


def is_active() -> bool:
    """Whether a script that this launcher has started is running in this process."""
    return _active


def _read(path: Path) -> str:
    """The text of a script that is timm's, as far as that can be told without running it."""
    if not path.is_file():
        hint = "put torchrun first: torchrun -m gd_plugin.timm PATH/TO/train.py" if path.name == "torchrun" else (
            "give the path to the train.py of a timm checkout first, then its arguments"
        )  # fmt: skip
        raise UsageError(f"there is no script {path}; {hint}")
    if Version(timm.__version__) < Version(_OLDEST):
        raise UsageError(
            f"timm {timm.__version__} is too old, gd-plugin timm needs timm >= {_OLDEST}: pip install -U timm"
        )
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (UnicodeDecodeError, SyntaxError, ValueError):
        raise UsageError(f"{path} is not a Python script; give the path to the train.py of a timm checkout") from None
    imported = {name.split(".")[0] for name in _imports(tree)}
    if "gd_plugin" in imported or path.resolve().parent == Path(__file__).parent.resolve():
        raise UsageError(f"{path} is a launcher itself, and two cannot be nested; give timm's train.py instead")
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    assigned = {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
    missing = [name for name in (*_FUNCTIONS, "parser") if name not in (assigned if name == "parser" else functions)]
    if missing or "timm" not in imported:
        raise UsageError(
            f"{path} is not timm's train.py: it {'has no ' + missing[0] if missing else 'does not import timm'}; give "
            "the path to the train.py of a timm checkout"
        )
    arguments = functions["train_one_epoch"].args
    parameters = {a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
    missing = [name for name in _PARAMETERS if name not in parameters]
    if missing or not parameters & {"task", "loss_fn"}:
        raise UsageError(
            f"{path} is not a train.py of timm >= {_OLDEST}: its train_one_epoch has no {(missing or ['task'])[0]}; "
            f"take the script of the installed version, git checkout v{timm.__version__}"
        )
    return source


def _check_config_file(words: list[str]) -> None:
    """That of --config can be read: the script would end in a traceback."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-c", "--config")
    try:
        name = parser.parse_known_args(words)[0].config
    except (argparse.ArgumentError, SystemExit):  # without a value, which the script tells
        return
    if not name:
        return
    try:
        values = load_yaml(Path(name).read_bytes())
    except OSError as error:
        raise UsageError(f"--config {name}: {error.strerror}; give a YAML file") from None
    except ValueError as error:
        raise UsageError(f"--config {name} is not a YAML file: {error}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UsageError(f"--config {name} must map the script's options to values, such as `epochs: 10`")


def _imports(tree: ast.Module) -> list[str]:
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
    return names


@contextmanager
def _script(path: Path, source: str, words: list[str]):
    """The script as a module, as ``import train`` would make it, and afterwards everything as it was."""
    global _active
    module = types.ModuleType(path.stem)
    module.__file__ = str(path)
    before = sys.argv, sys.modules.get(path.stem)
    sys.argv = [str(path), *words]  # first: a parser takes its program's name from it
    sys.modules[path.stem] = module  # what the script defines can be pickled for a worker process
    _active = True
    if has_loss_factory():
        register()
    try:
        try:
            exec(compile(source, str(path), "exec", dont_inherit=True), module.__dict__)
        except ImportError as error:
            if (error.name or "").split(".")[0] != "timm":
                raise
            raise UsageError(
                f"{path} does not go with timm {timm.__version__} ({error}): take the script of that version, "
                f"git checkout v{timm.__version__}, or pip install -U timm"
            ) from None
        yield module
    finally:
        unregister()
        _active = False
        sys.argv = before[0]
        if before[1] is None:
            sys.modules.pop(path.stem, None)
        else:
            sys.modules[path.stem] = before[1]


def _flag(field: str) -> str:
    return f"--gd-{field.replace('_', '-')}"


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    """Our options, with no default of their own: what was not given must be told from what was."""
    loss = next((action for action in parser._actions if "--loss" in action.option_strings), None)
    group = parser.add_argument_group("Gradient-decay loss (gd_plugin, arXiv 2210.17145)")
    if loss is None:  # before timm 1.0.31
        group.add_argument(
            "--loss",
            choices=("ce", LOSS_TYPE),
            help="'gd': the gradient-decay softmax cross-entropy in place of the script's cross-entropy",
        )
    elif loss.choices is not None and LOSS_TYPE not in loss.choices:
        loss.choices = (*loss.choices, LOSS_TYPE)
    metavars = {"beta": "B[,B...]", "beta_start": "B[,B...]", "class_weights": "W,W,...", "schedule": "SHAPE"}
    for name, field in FIELDS.items():
        group.add_argument(
            _flag(name),
            f"--gd_{name}",  # as in YAML, and as the flags of the Trainer are written
            dest=f"gd_{name}",
            type=lambda text, name=name: value_of(name, text, _flag(name)),
            metavar=metavars.get(name, "N"),
            help=field.metadata["help"] + (" Needs --loss gd." if name == "beta" else ""),
        )


def _parsing(script: types.ModuleType, command: str):
    """The script's ``_parse_args``, which also checks our options and puts the loss in its place."""
    original = script._parse_args

    def parse_args(*args, **kwargs):
        # Before the script's own checks, which may refuse a pair of losses with a page of usage.
        known, unknown = script.parser.parse_known_args(sys.argv[1:])
        for word in unknown:
            if word.startswith("--gd"):
                near = difflib.get_close_matches(word.partition("=")[0].replace("_", "-"), map(_flag, FIELDS), n=1)
                raise UsageError(
                    f"{word} is no flag; did you mean {near[0] if near else ', '.join(map(_flag, FIELDS))}?"
                )
        if getattr(known, "loss", None) == LOSS_TYPE:
            refuse(known)
        parsed = original(*args, **kwargs)
        config = _config(parsed[0], next(a.choices for a in script.parser._actions if "--loss" in a.option_strings))
        if config is None:
            TimmRun.detach(script.__dict__)
        else:
            refuse(parsed[0])
            TimmRun(config, command, _flag).attach(script.__dict__)
        return parsed

    return parse_args


def _config(args: argparse.Namespace, losses: Sequence[str] | None) -> GradientDecayConfig | None:
    """The checked configuration; None where the script trains with another of its ``losses``."""
    if args.loss is not None and losses is not None and args.loss not in losses:  # from YAML, which nobody has checked
        raise UsageError(f"loss: {args.loss} is unknown; the losses are {', '.join(losses)}")
    for name in vars(args):  # a YAML --config can hold any key
        if name.startswith(("gd_", "gd-")) and name not in {f"gd_{field}" for field in FIELDS}:
            near = difflib.get_close_matches(name[3:].replace("-", "_"), FIELDS, n=1) or list(FIELDS)
            raise UsageError(f"{name} is no option of gd_plugin; did you mean gd_{', gd_'.join(near)}?")
    values: dict[str, Any] = {name: getattr(args, f"gd_{name}") for name in FIELDS}
    values = {name: value for name, value in values.items() if value is not None}
    if args.loss != LOSS_TYPE:
        if values:
            raise UsageError(f"{_flag(next(iter(values)))} is set, but the loss is not gd; add --loss gd")
        return None
    variables = [f"GD_{name.upper()}" for name in FIELDS if f"GD_{name.upper()}" in os.environ]
    if variables:
        raise UsageError(f"{variables[0]} is set, which gd-plugin timm does not read: use flags and unset it")
    if "beta" not in values:
        raise UsageError("--loss gd needs a beta: add --gd-beta (for example 5; 1 is cross-entropy)")
    try:
        config = GradientDecayConfig(**values)
        if args.num_classes:
            config.check_num_classes(args.num_classes)
        return config
    except ValueError as error:
        raise UsageError(rename_fields(error, _flag)) from None
