"""The knobs as flags and variables of a ``train.py`` of timm, and what of timm's own options does not go with them."""

from __future__ import annotations

import dataclasses
import os
import sys
from argparse import Namespace
from typing import Any

from .config import GradientDecayConfig
from .markdown import one_line
from .metrics import METRICS

__all__ = ["FIELDS", "UsageError", "refuse", "say", "value_of"]

FIELDS = {field.name: field for field in dataclasses.fields(GradientDecayConfig)}


class UsageError(Exception):
    """Bad input, in one line. Not a ValueError: argparse would take that for one of its own."""


def say(error: UsageError, prefix: str = "gd-plugin") -> None:
    """The error on stderr, once and not per process of torchrun: all of them meet it."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{prefix}: error: {one_line(error)}", file=sys.stderr)


def value_of(field: str, text: Any, shown: str) -> Any:
    """The value of a field of `GradientDecayConfig` from the text of a flag or variable, ``shown``.

    Several numbers have commas between them, as in timm's ``--loss-class-weight``.
    """
    kind = FIELDS[field].type
    if not isinstance(text, str) or kind == "str":
        return text
    several = "tuple" in kind
    try:
        if not several:
            return int(text) if kind == "int" else float(text)
        values = [float(part) for part in text.split(",")]
    except ValueError:
        what = "a whole number" if kind == "int" else "a number"
        what = "one number, or one per class with commas between them" if several else what
        raise UsageError(f"{shown} {text!r}: give {what}") from None
    return values[0] if len(values) == 1 and "float |" in kind else values


def refuse(args: Namespace) -> None:
    """Options of timm that do not go with a softmax over classes, as far as this script has them."""
    for name, what in (("bce_loss", "binary cross-entropy"), ("jsd_loss", "its own Jensen-Shannon loss")):
        if getattr(args, name, False):
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} trains with {what}, the gradient-decay loss is a softmax: remove {flag}")
    if getattr(args, "task", None) == "multilabel":
        raise UsageError(
            "--task multilabel: the gradient-decay loss is a softmax over exclusive classes; use --loss bce"
        )
    metric = getattr(args, "eval_metric", None)
    if metric in METRICS and metric != "accuracy":
        raise UsageError(
            f"--eval-metric {metric}: timm keeps the checkpoint with the largest value of any metric but the loss; use "
            "--eval-metric loss"
        )
