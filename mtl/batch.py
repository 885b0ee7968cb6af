"""A batch on its way through a model: arguments in, one output and one target per task out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mtl.task import Task


def unpack(batch: Any, device: torch.device) -> tuple[Any, Any]:
    """``(input, target)`` of a batch, on the device.

    Raises:
        ValueError: if the batch is not a pair.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise ValueError(f"a batch of the data is a {type(batch).__name__}, but it must be a pair (input, target)")
    return _move(batch[0], device), _move(batch[1], device)


def call(model: nn.Module, inputs: Any) -> Any:
    """The model on its input: a tuple is its positional arguments, a dict its keyword arguments."""
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(inputs)


def by_task(values: Any, tasks: Sequence[Task], what: str) -> dict[str, Tensor]:
    """One tensor per task, from a dict, or from a tensor where there is one task. Half precision becomes float32.

    Args:
        values: what the model or the data gave
        tasks: the tasks that need a tensor each; further entries of a dict are left out
        what: "output of the model" or "target", for the message

    Raises:
        ValueError: naming the task that has none.
    """
    if isinstance(values, Tensor):
        if len(tasks) > 1:
            raise ValueError(
                f"the {what} is one tensor, but there are {len(tasks)} tasks: it must be a dict {{task: tensor}}"
            )
        values = {tasks[0].name: values}
    if not isinstance(values, dict):
        raise ValueError(f"the {what} is a {type(values).__name__}, but it must be a tensor or a dict {{task: tensor}}")
    for task in tasks:
        if task.name not in values:
            raise ValueError(f"the {what} has no entry for task {task.name!r}; it has {sorted(values)}")
    return {task.name: _full(values[task.name]) for task in tasks}


@contextmanager
def mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Training or evaluation mode inside the block; afterwards every submodule has its own mode again."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, was_training in before:
            module.training = was_training


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer is; the CPU for a model without any."""
    tensors: Iterable[Tensor] = (*model.parameters(), *model.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: _move(item, device) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return tuple(_move(item, device) for item in value)
    return value


def _full(tensor: Tensor) -> Tensor:
    # Losses and metrics of half-precision outputs lose digits, and some have no such kernel.
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
