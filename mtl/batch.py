"""A batch on its way through a model: inputs and labels in, one output per task out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mtl.task import Labels, Task


@dataclass(frozen=True)
class Batch:
    """What one step sees.

    Args:
        inputs: of the model; by task where ``own``
        labels: by task, of the tasks that have any in this batch
        own: whether each task has inputs of its own
    """

    inputs: Any
    labels: dict[str, Labels]
    own: bool = False

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        labels = {name: labels.to(device) for name, labels in self.labels.items()}
        return replace(self, inputs=move(self.inputs, device), labels=labels)


def read(batch: Any, tasks: Sequence[Task]) -> Batch:
    """The batch ``(input, target)`` of data that have all labels of these tasks.

    Raises:
        ValueError: if the batch is not a pair, or a target is missing.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise ValueError(f"a batch of the data is a {type(batch).__name__}, but it must be a pair (input, target)")
    targets = by_task(batch[1], tasks, "target")
    labels = {task.name: task.labels(targets[task.name]) for task in tasks}
    return Batch(batch[0], {name: found for name, found in labels.items() if found.count})


def forward(model: nn.Module, batch: Batch, tasks: Sequence[Task]) -> dict[str, Any]:
    """What the model gives for the batch: ``{task: output}``, and what else it gives.

    Where each task has inputs of its own, a model that has ``forward_tasks`` is given all of them, ``{task: input}``,
    at once; every other model is called once for each task.
    """
    if not batch.own:
        values = call(model, batch.inputs)
        if isinstance(values, Mapping) and not isinstance(values, dict):
            values = dict(values)
        return by_task(values, tasks, "output of the model", rest=True)
    if callable(forward_tasks := getattr(model, "forward_tasks", None)):
        return by_task(forward_tasks(batch.inputs), [t for t in tasks if t.name in batch.inputs], "output", rest=True)
    asked = [task for task in tasks if task.name in batch.inputs]
    return {
        task.name: by_task(call(model, batch.inputs[task.name]), [task], "output of the model")[task.name]
        for task in asked
    }


def call(model: nn.Module, inputs: Any) -> Any:
    """The model on its input: a tuple is its positional arguments, a dict its keyword arguments."""
    args, kwargs = arguments(inputs)
    return model(*args, **kwargs)


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments that an input stands for."""
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs,), {}


def by_task(values: Any, tasks: Sequence[Task], what: str, *, rest: bool = False) -> dict[str, Any]:
    """One tensor per task, from a dict, or from a tensor where there is one task. Half precision becomes float32.

    Args:
        values: what the model or the data gave
        tasks: the tasks that need a tensor each
        what: "output of the model" or "target", for the message
        rest: keep further entries of a dict as well

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
    found = values if rest else {task.name: values[task.name] for task in tasks}
    return {name: _full(value) if isinstance(value, Tensor) else value for name, value in found.items()}


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


def move(value: Any, device: torch.device) -> Any:
    """Tensors in nested dicts and sequences on the device."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: move(item, device) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return tuple(move(item, device) for item in value)
    return value


def _full(tensor: Tensor) -> Tensor:
    # Losses and metrics of half-precision outputs lose digits, and some have no such kernel.
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
