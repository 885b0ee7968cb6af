"""What tells one run from another, so that a folder is only ever continued by its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from torch import nn

from mtl.distillation import Distillation
from mtl.options import FitOptions
from mtl.task import Task
from mtl.weighting import Weighting

# They change where or how loudly a run works, or what it is compared with, not which run it is.
_LEFT_OUT = ("device", "num_threads", "progress", "reference")


def signature(
    model: nn.Module,
    tasks: Sequence[Task],
    weighting: Weighting,
    options: FitOptions,
    distillation: Distillation | None,
    penalty: Callable[..., Any] | None,
) -> dict[str, Any]:
    """Nested dicts of plain values."""
    found: dict[str, Any] = {
        "options": {name: value for name, value in asdict(options).items() if name not in _LEFT_OUT},
        "tasks": {task.name: f"{_described(task.loss)}, {type(task.metric).__name__}, {task.weight}" for task in tasks},
        "weighting": f"{type(weighting).__name__}({weighting.extra_repr()})",
        "coupling": repr(getattr(model, "coupling", None)),
        "model": {name: list(tensor.shape) for name, tensor in model.state_dict().items()},
    }
    if distillation is not None:
        found["distillation"] = {"weight": distillation.weight, "temperature": distillation.temperature}
        if distillation.features:
            found["distillation"] |= {"features": sorted(distillation.features), "of": distillation.feature_weight}
    if penalty is not None:
        found["penalty"] = _described(penalty)
    return found


def _described(loss: Callable[..., Any]) -> str:
    if not isinstance(loss, nn.Module):
        return getattr(loss, "__qualname__", type(loss).__name__)
    settings = {name: value for name, value in vars(loss).items() if isinstance(value, int | float | str)}
    shown = (f"{name}={value}" for name, value in sorted(settings.items()) if name != "training" and name[0] != "_")
    return f"{type(loss).__name__}({', '.join(shown)})"
