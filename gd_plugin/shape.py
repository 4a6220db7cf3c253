"""Whether data that others wrote have the shape that a report, a card and a study rely on."""

from __future__ import annotations

import math
import re
from typing import Any

__all__ = ["RECORD", "STUDY", "problem"]

# A shape is a type (float takes whole numbers too), None, a pattern of a text, a list with the shape of its entries, a
# dict of the shapes of some keys and with `...` of all others, or a tuple of shapes of which one must do. What is not
# named may be anything. With `...` the keys that are named must be there, without it they may be missing.
_NUMBER, _WHOLE = (float, None), (int, None)
_NUMBERS = {...: _NUMBER}
_WORD = re.compile(r"[\w-]{1,60}")  # goes into a card as it is
_BETA = (float, [float])
_LARGEST = 1e100  # beyond it a format or a picture can raise OverflowError

RECORD = {
    "name": str,
    "command": str,
    "config": dict,
    "seed": int,
    "loss": _WORD,
    "gd": {
        "beta": _BETA,
        "beta_start": (*_BETA, None),
        "schedule": _WORD,
        **{f"warmup_{unit}": _NUMBER for unit in ("ratio", "steps", "epochs")},
    },
    "wall_time_s": float,
    "energy_kwh": _NUMBER,
    "dataset": {
        **{name: str for name in ("name", "tested_on")},
        **{name: _WHOLE for name in ("train", "validation", "test")},
        "kind": _WORD,
    },
    "model": {"name": str, "parameters": int},
    "epochs": [_NUMBERS],
    "log": [_NUMBERS],
    "final": _NUMBERS,
    "calibrated": ({"temperature": (_NUMBERS, None), "vector": (_NUMBERS, None)}, None),
    "reliability": ([{"lower": float, "upper": float, "count": int, ...: _NUMBER}], None),
    "versions": {...: str},
    "commit": (str, None),
    "hardware": {"cpu": str, "gpu": [str], "torch_threads": int, "processes": int},
    "card": ({"task": (_WORD, None)}, None),
}
STUDY = {"methods": [str], "seeds": [int], "command": str}


def problem(value: Any, shape: Any, where: str = "") -> str:
    """What in ``value`` is not as ``shape`` has it, and where; empty if there is nothing."""
    if isinstance(shape, tuple):
        found = [problem(value, one, where) for one in shape]
        return "" if "" in found else found[0]
    if isinstance(shape, dict) and isinstance(value, dict):
        if ... in shape and (missing := [key for key in shape if key is not ... and key not in value]):
            return f"{where} lacks {', '.join(missing)}"
        known = ((key, entry, shape.get(key, shape.get(...))) for key, entry in value.items())
        parts = ((f"{where}.{key}" if where else key, entry, inner) for key, entry, inner in known if inner is not None)
    elif isinstance(shape, list) and isinstance(value, list):
        parts = ((f"{where}[{i}]", entry, shape[0]) for i, entry in enumerate(value))
    else:
        return "" if _is(value, shape) else f"{where} is {_shown(value)}, not {_named(shape)}"
    return next(filter(None, (problem(entry, inner, place) for place, entry, inner in parts)), "")


def _is(value: Any, shape: Any) -> bool:
    if shape is None:
        return value is None
    if isinstance(shape, re.Pattern):
        return isinstance(value, str) and shape.fullmatch(value) is not None
    if shape in (int, float):
        right = isinstance(value, (int, shape)) and not isinstance(value, bool)
        return right and (abs(value) < _LARGEST or (isinstance(value, float) and not math.isfinite(value)))
    return isinstance(shape, type) and isinstance(value, shape)


def _named(shape: Any) -> str:
    if isinstance(shape, re.Pattern):
        return "a word"
    names = {
        type(None): "null",
        dict: "a mapping",
        list: "a list",
        str: "a text",
        int: "a whole number",
        float: "a number",
    }
    return names[shape if isinstance(shape, type) else type(shape)]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
