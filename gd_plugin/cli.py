"""The console script. Bad input is one line on stderr and exit code 2; Ctrl-C is 130."""

from __future__ import annotations

import sys
from pathlib import Path

from . import __version__

USAGE = f"""gd-plugin {__version__}: gradient-decay softmax cross-entropy (arXiv 2210.17145)

usage: gd-plugin COMMAND [...]

  train [RECIPE] [--flag value ...]   fine-tune a classifier and show what came of it
                                      gd-plugin train digits          built-in data, no network, about a minute
                                      gd-plugin train --help          every flag

options: --help, --version
"""


def main(argv: list[str] | None = None) -> int:
    """Run ``gd-plugin`` with ``argv`` (default: the command line's) and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    if argv[0] == "--version":
        print(__version__)
        return 0
    if argv[0] != "train":
        return _fail(f"there is no command {argv[0]!r}; the commands are: train (gd-plugin --help)")
    try:
        from . import train
    except ImportError as error:
        return _fail(f"gd-plugin train needs {error.name}: pip install 'gd_plugin[hf]'")
    try:
        job = train.prepare(argv[1:], recipes_folder())
    except ModuleNotFoundError as error:
        return _fail(f"this needs the package {error.name}: pip install 'gd_plugin[hf,timm]'")
    except ValueError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return 130
    # From here on an exception that is not foreseen keeps its traceback.
    try:
        job.run()
    except train.Interrupted as error:
        print(f"gd-plugin: {error}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("gd-plugin: killed; go on from the last checkpoint with --resume", file=sys.stderr)
        return 130
    return 0


def recipes_folder() -> Path:
    """Where the recipes are: inside an installed package, beside the package in a checkout."""
    inside = Path(__file__).parent / "recipes"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "recipes"


def _fail(message: str) -> int:
    print(f"gd-plugin: error: {' '.join(message.split())}", file=sys.stderr)
    return 2
