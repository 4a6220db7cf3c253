"""The way into timm's ``train.py`` without a launcher::

    GD_BETA=5 GD_BETA_START=0.01 GD_WARMUP_EPOCHS=5 python train.py --device-modules gd_plugin.timm_hook ...

The script imports this module after it has read its arguments; importing it puts the loss in place of the script's
cross-entropy, for one training per process: what is imported stays. Every knob of `GradientDecayConfig` is a variable:
``GD_BETA`` (needed), ``GD_BETA_START``, ``GD_SCHEDULE``, ``GD_WARMUP_RATIO``, ``GD_WARMUP_STEPS``,
``GD_WARMUP_EPOCHS``, ``GD_CLASS_WEIGHTS``; several numbers have commas between them. The script's ``args.yaml``,
written from its arguments, does not know them: ``record.json`` does.
"""

from __future__ import annotations

import difflib
import os
import shlex
import sys
from typing import Any

from .config import GradientDecayConfig, rename_fields
from .record import publishable_words
from .timm_launch import is_active
from .timm_options import FIELDS, UsageError, say, value_of
from .timm_train import TimmRun


def _variable(field: str) -> str:
    return f"GD_{field.upper()}"


def _from_environment() -> GradientDecayConfig:
    names = {_variable(field): field for field in FIELDS}
    for name in os.environ:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.85)
        if name.startswith("GD_") and name not in names and near:
            raise UsageError(f"{name} is no variable of gd_plugin.timm_hook; did you mean {near[0]}?")
    values = {field: os.environ[name] for name, field in names.items() if os.environ.get(name)}
    if "beta" not in values:
        raise UsageError("gd_plugin.timm_hook needs GD_BETA in the environment (for example GD_BETA=5)")
    try:
        return GradientDecayConfig(**{field: value_of(field, text, _variable(field)) for field, text in values.items()})
    except ValueError as error:
        raise UsageError(rename_fields(error, _variable)) from None


def _script() -> dict[str, Any]:
    """The globals of the ``train.py`` that is importing this module, under whatever name it runs."""
    frame = sys._getframe()
    while frame is not None:
        if {"train_one_epoch", "validate"} <= frame.f_globals.keys():
            return frame.f_globals
        frame = frame.f_back
    raise UsageError("gd_plugin.timm_hook is for timm's train.py: pass --device-modules gd_plugin.timm_hook to it")


def _command() -> str:
    variables = [
        f"{_variable(field)}={os.environ[_variable(field)]}" for field in FIELDS if _variable(field) in os.environ
    ]
    return " ".join([*variables, "python", shlex.join(publishable_words(sys.argv))])


try:
    if is_active():
        raise UsageError("gd-plugin timm is running already; leave --device-modules gd_plugin.timm_hook out")
    TimmRun(_from_environment(), _command(), _variable).attach(_script())
except UsageError as error:
    say(error, "gd_plugin.timm_hook")
    raise SystemExit(2) from None
