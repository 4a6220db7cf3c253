"""The console script. Bad input is one line on stderr and exit code 2; Ctrl-C is 130."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from . import __version__
from .markdown import one_line

USAGE = f"""gd-plugin {__version__}: gradient-decay softmax cross-entropy (arXiv 2210.17145)

usage: gd-plugin COMMAND [...]

  train [RECIPE] [--flag value ...]   fine-tune a classifier and show what came of it
                                      gd-plugin train digits          built-in data, no network, about a minute
                                      gd-plugin train --help          every flag
  timm TRAIN_PY [--flag value ...]    timm's own train.py with one loss more: --loss gd --gd-beta 5
                                      gd-plugin timm TRAIN_PY --help  timm's flags and ours
                                      torchrun --nproc-per-node 2 -m gd_plugin.timm TRAIN_PY ...
  study RECIPE [--seeds N] [--jobs N] every method of a recipe with several seeds, and their statistics
                                      gd-plugin study digits          twenty-two methods, five seeds
  report RUN_OR_STUDY [...]           draw and compare what either command left
  card RUN_OR_STUDY                   write its model card for the Hub, from its records
  push RUN --repo_id USER/NAME        upload its model, card and record to the Hub; --dry_run shows what would go
  diagnose RUNS                       curriculum, features and smoothness of runs trained with --trace_samples

options: --help, --version
"""
TIMM_USAGE = """usage: gd-plugin timm PATH/TO/train.py [timm's arguments] --loss gd --gd-beta 5 [--gd-beta-start ...]

Runs the train.py of a timm checkout, which is not edited. Its arguments and ours:
  gd-plugin timm PATH/TO/train.py --help
Several processes:
  torchrun --nproc-per-node 2 -m gd_plugin.timm PATH/TO/train.py ...
Without a launcher:
  GD_BETA=5 python PATH/TO/train.py ... --device-modules gd_plugin.timm_hook
"""
_AFTER_A_KILL = {
    "train": "go on from the last checkpoint, if there is one, with --resume",
    "timm": "go on from the last checkpoint, if there is one, with timm's --resume",
    "study": "give the command again, and it goes on after the last whole run",
    "push": "give the command again, and it goes on",
}
# Top-level modules that come with the extra `hf`.
_OF_EXTRA_HF = ("transformers", "accelerate", "datasets", "matplotlib", "PIL", "rich", "sklearn", "torchvision")


def main(argv: list[str] | None = None) -> int:
    """Run ``gd-plugin`` with ``argv`` (default: the command line's) and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    if argv[0] == "--version":
        print(__version__)
        return 0
    command = COMMANDS.get(argv[0])
    if command is None:
        return _fail(f"there is no command {argv[0]!r}; the commands are: {', '.join(COMMANDS)} (gd-plugin --help)")
    try:
        return command(argv[1:])
    except ImportError as error:
        if error.path is not None:  # a name that a package which is there does not have: no missing package
            raise
        return _fail(_missing_package(error))
    except KeyboardInterrupt:
        print(f"gd-plugin: killed; {_AFTER_A_KILL.get(argv[0], 'give the command again')}", file=sys.stderr)
        return 130


def _train(argv: list[str]) -> int:
    from . import train  # imports packages that come with the extras

    try:
        job = train.prepare(argv, recipes_folder())
    except ValueError as error:
        return _fail(str(error))
    except train.PushError as error:
        _fail(str(error))
        return 1
    # From here on an exception that is not foreseen keeps its traceback.
    try:
        job.run()
    except train.Interrupted as error:
        if os.environ.get("RANK", "0") == "0":  # of several processes
            print(f"gd-plugin: {error}", file=sys.stderr)
        return 130
    except train.FullDisk as error:
        _fail(str(error))
        return 1
    except train.PushError as error:
        message = str(error).replace("give the command again", "give the command again with --resume")
        _fail(f"{message}; the trained models are kept" + (", and --resume pushes them" * ("--resume" not in message)))
        return 1
    return 0


def _timm(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(TIMM_USAGE)
        return 0 if argv else 2
    path, folder = list(sys.path), Path(argv[0]).resolve().parent
    if folder != Path(__file__).resolve().parent:  # whose timm.py is ours; `launch` refuses its files
        # As Python does for a script, and before timm is imported: beside the train.py of a checkout lies its own timm.
        sys.path.insert(0, str(folder))
    try:
        from . import timm_launch, timm_options

        try:
            return timm_launch.launch(argv)
        except timm_options.UsageError as error:
            timm_options.say(error)
            return 2
    finally:
        sys.path[:] = path


def _study(argv: list[str]) -> int:
    from . import study

    try:
        job = study.prepare(argv, recipes_folder())
    except ValueError as error:
        return _fail(str(error))
    return job.run()


def _report(argv: list[str]) -> int:
    from . import report

    try:
        return report.main(argv)
    except (ValueError, OSError) as error:
        return _fail(str(error))


def _diagnose(argv: list[str]) -> int:
    from . import diagnose

    try:
        return diagnose.main(argv)
    except (ValueError, OSError) as error:
        return _fail(str(error))


def _card(argv: list[str]) -> int:
    from . import card

    try:
        return card.main(argv)
    except (ValueError, OSError) as error:
        return _fail(str(error))


def _push(argv: list[str]) -> int:
    from . import push

    try:
        return push.main(argv)
    except (ValueError, OSError) as error:
        return _fail(str(error))
    except push.PushError as error:
        _fail(str(error))
        return 1


COMMANDS = {
    "train": _train,
    "study": _study,
    "timm": _timm,
    "report": _report,
    "diagnose": _diagnose,
    "card": _card,
    "push": _push,
}


def recipes_folder() -> Path:
    """Where the recipes are: inside an installed package, beside the package in a checkout."""
    inside = Path(__file__).parent / "recipes"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "recipes"


def _missing_package(error: ImportError) -> str:
    text = str(error)
    # transformers raises an ImportError of its own, with a paragraph and no name, for packages that it can do without.
    name = (error.name or "").split(".")[0] or next((n for n in ("timm", *_OF_EXTRA_HF) if n in text), "")
    extra = {"timm": "timm", "scipy": "study"}.get(name, "hf" if name in _OF_EXTRA_HF else None)
    return f"the package {name} is missing: pip install 'gd_plugin[{extra}]'" if extra else text


def _fail(message: str) -> int:
    print(f"gd-plugin: error: {one_line(message)}", file=sys.stderr)
    return 2
