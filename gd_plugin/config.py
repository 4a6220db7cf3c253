"""Every knob of the method, once, checked where it is made."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .reading import load_json, load_yaml

__all__ = ["SCHEDULES", "GradientDecayConfig", "rename_fields"]

SCHEDULES = ("constant", "linear", "geometric", "cosine")


def _help(text: str) -> dict[str, str]:
    """Field metadata: what the flags of the integrations say of the knob."""
    return {"help": text}


@dataclass(frozen=True)
class GradientDecayConfig:
    """What the loss and its warm-up need to know. Frozen, checked on construction, plain data.

    With only ``beta`` set, beta is constant. With ``beta_start`` and one of the three ``warmup_*`` lengths, beta goes
    from ``beta_start`` to ``beta`` along ``schedule`` and stays there (the paper's warm-up, section 4).

    Args:
        beta: final coefficient, > 0; 1 is cross-entropy. A number, or one number per class.
        beta_start: coefficient of the first update; ``None`` for no warm-up.
        schedule: ``"linear"`` (the paper's), ``"geometric"`` (linear in log beta), ``"cosine"`` or ``"constant"``.
        warmup_ratio: length of the warm-up as a fraction of training, in [0, 1].
        warmup_steps: the same in optimizer updates.
        warmup_epochs: the same in epochs, fractions allowed.
        class_weights: rescaling per class, the ``weight`` of ``F.cross_entropy``.

    Raises:
        ValueError: one line that begins with the field's name and says what value would do.
    """

    beta: float | tuple[float, ...] = field(
        default=1.0,
        metadata=_help(
            "Gradient-decay coefficient > 0: 1 is cross-entropy, smaller widens the margin, larger lowers confidence. "
            "One number, or one per class."
        ),
    )
    beta_start: float | tuple[float, ...] | None = field(
        default=None,
        metadata=_help("Coefficient of the first update; needs a length of the warm-up. One number, or one per class."),
    )
    schedule: str = field(
        default="linear",
        metadata=_help(f"Shape of the warm-up from the first to the final beta: {', '.join(SCHEDULES)}."),
    )
    warmup_ratio: float = field(
        default=0.0, metadata=_help("Length of beta's warm-up as a fraction of training, 0 to 1.")
    )
    warmup_steps: int = field(default=0, metadata=_help("Length of beta's warm-up in optimizer updates."))
    warmup_epochs: float = field(default=0.0, metadata=_help("Length of beta's warm-up in epochs, fractions allowed."))
    class_weights: tuple[float, ...] | None = field(
        default=None, metadata=_help("One weight per class, as `weight` of torch.nn.CrossEntropyLoss.")
    )

    def __post_init__(self) -> None:
        # object.__setattr__: the dataclass is frozen. Arrays (scikit-learn's class weights) and tensors become plain
        # numbers, lists from JSON, YAML and flags become tuples.
        for name in (f.name for f in dataclasses.fields(self)):
            if hasattr(getattr(self, name), "tolist"):
                object.__setattr__(self, name, getattr(self, name).tolist())
        object.__setattr__(self, "beta", _positive("beta", self.beta))
        if self.beta_start is not None:
            object.__setattr__(self, "beta_start", _positive("beta_start", self.beta_start))
        if self.class_weights is not None:
            object.__setattr__(self, "class_weights", _weights(self.class_weights))
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        for name in ("warmup_ratio", "warmup_steps", "warmup_epochs"):
            value = _number(name, getattr(self, name))
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}; 0 means no warm-up")
        if self.warmup_ratio > 1:
            raise ValueError(
                f"warmup_ratio must be in [0, 1], got {self.warmup_ratio}: the warm-up would be longer than training; "
                "use warmup_steps or warmup_epochs for a length in updates or epochs"
            )
        if self.warmup_steps != int(self.warmup_steps):
            raise ValueError(f"warmup_steps must be a whole number of updates, got {self.warmup_steps}")
        object.__setattr__(self, "warmup_steps", int(self.warmup_steps))

        lengths = [n for n in ("warmup_ratio", "warmup_steps", "warmup_epochs") if getattr(self, n)]
        if len(lengths) > 1:
            raise ValueError(f"{lengths[1]} and {lengths[0]} both set the warm-up's length; keep one of them")
        if lengths and self.beta_start is None:
            raise ValueError(
                f"{lengths[0]} is {getattr(self, lengths[0])} but beta_start is not set; set beta_start (for example "
                f"0.01), or remove {lengths[0]} for a constant beta"
            )
        if self.beta_start is not None and self.schedule == "constant":
            raise ValueError("schedule is 'constant' but beta_start is set; choose linear, geometric or cosine")
        if self.beta_start is not None and not lengths:
            raise ValueError(
                f"beta_start is {self.beta_start} but the warm-up has no length; set warmup_ratio (for example 0.5), "
                "warmup_steps or warmup_epochs"
            )
        if isinstance(self.beta, tuple) and isinstance(self.beta_start, tuple):
            _same_length("beta_start", self.beta_start, len(self.beta))

    def check_num_classes(self, num_classes: int) -> None:
        """Raise ``ValueError`` unless every per-class list has ``num_classes`` values."""
        for name in ("beta", "beta_start", "class_weights"):
            value = getattr(self, name)
            if isinstance(value, tuple):
                _same_length(name, value, num_classes)

    def resolve(self, total_updates: int, updates_per_epoch: float | None = None) -> GradientDecayConfig:
        """The same configuration with the warm-up's length as ``warmup_ratio``, which is what `beta_at` takes.

        Args:
            total_updates: optimizer updates in the whole training.
            updates_per_epoch: optimizer updates in an epoch; needed for ``warmup_epochs`` only.

        Raises:
            ValueError: the warm-up is longer than training.
        """
        if self.warmup_steps:
            name, updates = "warmup_steps", self.warmup_steps
        elif self.warmup_epochs:
            if updates_per_epoch is None:
                raise ValueError(
                    f"warmup_epochs is {self.warmup_epochs} but the length of an epoch is unknown; use warmup_ratio "
                    "or warmup_steps"
                )
            name, updates = "warmup_epochs", self.warmup_epochs * updates_per_epoch
        else:
            return self
        if math.isclose(updates, total_updates):  # 0.28 epochs of 25 updates are 7.000000000000001
            updates = total_updates
        if updates > total_updates:
            raise ValueError(
                f"{name} is {getattr(self, name)}, {updates:g} updates, but training has only {total_updates}; "
                f"lower {name} or train longer"
            )
        return dataclasses.replace(self, warmup_ratio=updates / total_updates, warmup_steps=0, warmup_epochs=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: tuples become lists."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GradientDecayConfig:
        """The inverse of `to_dict`. Raises ``ValueError`` for a key that is not a field, with the nearest one."""
        if not isinstance(values, dict):
            raise ValueError(f"a configuration must be a mapping of names to values, got {type(values).__name__}")
        known = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"the fields are {', '.join(known)}"
                raise ValueError(f"{key} is not a field of GradientDecayConfig; {hint}")
        return cls(**values)

    def save(self, path: str | Path) -> None:
        """Write as JSON, or as YAML where ``path`` ends in .yaml or .yml."""
        path, values = Path(path), self.to_dict()
        text = yaml.safe_dump(values, sort_keys=False) if _is_yaml(path) else json.dumps(values, indent=2) + "\n"
        path.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> GradientDecayConfig:
        """Read what `save` wrote, by the same rule. Raises ``ValueError`` naming the file for anything else."""
        path = Path(path)
        try:
            return cls.from_dict((load_yaml if _is_yaml(path) else load_json)(path.read_bytes()))
        except ValueError as error:
            raise ValueError(f"{path}: {' '.join(str(error).split())}") from error


def rename_fields(error: ValueError, form: Callable[[str], str]) -> str:
    """The message of a `GradientDecayConfig`, which names its fields, with ``form(field)`` in their place: the flag or
    variable under which a user knows them."""
    names = "|".join(f.name for f in dataclasses.fields(GradientDecayConfig))
    return re.sub(rf"\b({names})\b", lambda match: form(match[0]), str(error))


def _is_yaml(path: Path) -> bool:
    return path.suffix.lower() in (".yaml", ".yml")


def _number(name: str, value: Any) -> float:
    if isinstance(value, str):
        raise ValueError(f"{name} must be a number, got the text {value!r} (YAML reads 1e-3 as text: write 1.0e-3)")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return value


def _positive(name: str, value: Any) -> float | tuple[float, ...]:
    if isinstance(value, (list, tuple)):
        if not value:
            raise ValueError(f"{name} is an empty list; give one number, or one number per class")
        return tuple(_positive_number(name, v) for v in value)
    return _positive_number(name, value)


def _positive_number(name: str, value: Any) -> float:
    if _number(name, value) <= 0:
        raise ValueError(f"{name} must be greater than 0, got {value}; 1 is cross-entropy, 0.01 a small value")
    return float(value)


def _weights(values: Any) -> tuple[float, ...]:
    if not isinstance(values, (list, tuple)) or not values:
        raise ValueError(f"class_weights must be a list of one number per class, got {values!r}")
    for value in values:
        if _number("class_weights", value) < 0:
            raise ValueError(f"class_weights must not be negative, got {value}")
    if not any(values):
        raise ValueError("class_weights are all 0: no class would count; give at least one a positive weight")
    return tuple(float(v) for v in values)


def _same_length(name: str, values: tuple[float, ...], expected: int) -> None:
    if len(values) != expected:
        one = "" if name == "class_weights" else "one number, or "
        raise ValueError(f"{name} has {len(values)} values for {expected} classes; give {one}one number per class")
