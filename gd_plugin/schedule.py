"""beta as a pure function of training progress, so that resuming needs no saved state."""

from __future__ import annotations

import math

from .config import GradientDecayConfig

__all__ = ["beta_at"]


def beta_at(config: GradientDecayConfig, progress: float) -> float | tuple[float, ...]:
    """beta for the update that begins at ``progress``.

    Args:
        config: its warm-up length given as ``warmup_ratio`` (`GradientDecayConfig.resolve` converts the others).
        progress: completed updates / all updates, in [0, 1]. Beyond 1 (cool-down epochs) beta stays final.

    Returns:
        ``beta_start`` at progress 0, ``beta`` from ``warmup_ratio`` on; a tuple where either has one value per class.

    Raises:
        ValueError: a negative or NaN progress, or a warm-up still given in updates or epochs.

    Source: arXiv 2210.17145, section 4 (linear); geometric and cosine are the usual alternatives.
    """
    if not progress >= 0:
        raise ValueError(f"progress must be a fraction of training >= 0, got {progress}")
    if config.warmup_steps or config.warmup_epochs:
        raise ValueError("beta_at needs the warm-up as a fraction: call config.resolve(total_updates) first")
    if config.beta_start is None or progress >= config.warmup_ratio:
        return config.beta
    way = progress / config.warmup_ratio
    start, end = config.beta_start, config.beta
    if isinstance(start, float) and isinstance(end, float):
        return _between(config.schedule, start, end, way)
    starts = start if isinstance(start, tuple) else (start,) * len(end)
    ends = end if isinstance(end, tuple) else (end,) * len(start)
    return tuple(_between(config.schedule, s, e, way) for s, e in zip(starts, ends, strict=True))


def _between(schedule: str, start: float, end: float, way: float) -> float:
    if schedule == "geometric":
        return start * (end / start) ** way
    if schedule == "cosine":
        way = (1 - math.cos(math.pi * way)) / 2
    return (1 - way) * start + way * end
