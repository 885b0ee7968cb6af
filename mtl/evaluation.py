"""The metrics of a model on data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mtl.batch import device_of, forward, mode
from mtl.sampling import batches_of
from mtl.task import Task, check_tasks

if TYPE_CHECKING:
    from torchmetrics import Metric


def evaluate(model: nn.Module, tasks: Task | Sequence[Task], data: Iterable[Any]) -> dict[str, float]:
    """The metric of each task over all of the data, in evaluation mode and in the model's own precision.

    Args:
        model: gives ``{task: output}``, or a tensor where there is one task; left in the modes that it was given in
        tasks: one or more
        data: batches ``(input, target)``; target is a tensor (one task) or ``{task: tensor}``; or ``{task: batches}``
            where each task has data of its own. Missing labels do not count

    Returns:
        ``{task: metric}``; accuracies are fractions in [0, 1].

    Raises:
        ValueError: if the data are empty, a task has no label in them, or an output or target is missing.
    """
    tasks = check_tasks(tasks)
    device = device_of(model)
    metrics = {task.name: task.new_metric().to(device) for task in tasks}
    for metric in metrics.values():
        metric.sync_on_compute = False  # every process has seen all of the data
    empty = True
    with torch.no_grad(), mode(model, training=False):
        for batch in batches_of(data, tasks):
            batch = batch.to(device)
            outputs = forward(model, batch, tasks)
            for task in tasks:
                if task.name in batch.labels:
                    update(metrics[task.name], *task.pair(outputs[task.name], batch.labels[task.name]))
            empty = False
    if empty:
        raise ValueError("the data to evaluate on are empty: give at least one batch (a used-up generator gives none)")
    for name, metric in metrics.items():
        if not metric.update_called:
            raise ValueError(f"task {name!r}: the data to evaluate on have no label for it")
    return compute(metrics)


def update(metric: Metric, output: Tensor, target: Tensor) -> None:
    """Let a metric take in a batch; contiguous, since torchmetrics flattens by views, which channels-last has not."""
    metric.update(output.contiguous(), target.contiguous())


def compute(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """The results as numbers.

    Raises:
        ValueError: for a metric whose result is not one number.
    """
    results = {}
    for name, metric in metrics.items():
        value = metric.compute()
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            raise ValueError(
                f"task {name!r}: the metric {type(metric).__name__} must give one number; average its result"
            )
        # The shortest decimal of the float32 result: 0.9173 rather than 0.9172999858856201.
        results[name] = float(str(value.cpu().numpy().reshape(())))
    return results
