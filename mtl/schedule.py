"""The learning rate as a pure function of the step, so that there is no scheduler state to save or to get wrong."""

from __future__ import annotations

import math
from collections.abc import Callable

# Smith & Topin 2018, "Super-Convergence", section 4, with the cosine form and the ratios of PyTorch's OneCycleLR.
_ONECYCLE_RISE = 0.3
_ONECYCLE_START = 1 / 25
_ONECYCLE_END = 1e-4 / 25


def lr_factor(schedule: str, step: int, total_steps: int, warmup_steps: float = 0.0) -> float:
    """Fraction of the peak learning rate at a step, in [0, 1].

    Args:
        schedule: "cosine", "onecycle" or "constant"
        step: 0 for the first step
        total_steps: of the whole run, > step
        warmup_steps: length of the linear rise before "cosine" and "constant"; "onecycle" has its own

    Example:
        >>> [round(lr_factor("cosine", step, 4), 3) for step in range(4)]
        [1.0, 0.854, 0.5, 0.146]
    """
    if schedule == "onecycle":
        warmup_steps = 0.0
    if step < warmup_steps:
        return (step + 1) / (math.floor(warmup_steps) + 1)
    return _SHAPES[schedule]((step - warmup_steps) / (total_steps - warmup_steps))


def _cosine(done: float) -> float:
    return (1 + math.cos(math.pi * done)) / 2


def _onecycle(done: float) -> float:
    if done < _ONECYCLE_RISE:
        return 1 - (1 - _ONECYCLE_START) * _cosine(done / _ONECYCLE_RISE)
    return _ONECYCLE_END + (1 - _ONECYCLE_END) * _cosine((done - _ONECYCLE_RISE) / (1 - _ONECYCLE_RISE))


def _constant(done: float) -> float:
    return 1.0


_SHAPES: dict[str, Callable[[float], float]] = {"cosine": _cosine, "onecycle": _onecycle, "constant": _constant}
