"""What a task is: a name, a loss and the metric that it is judged by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from mtl.metrics import default_metric

if TYPE_CHECKING:
    from torchmetrics import Metric


@dataclass(frozen=True)
class Task:
    """One thing to be learnt: how an output of the model is compared with its target.

    Args:
        name: names the model's output, the target and the curves; not empty, without "." and "/"
        loss: ``loss(output, target)``, a scalar tensor that is a mean over the batch
        metric: a torchmetrics metric with one number as its result, used as a template and never updated itself.
            Default by the loss: accuracy (a fraction) for cross-entropy, negative log-likelihood and binary
            cross-entropy on logits; mean squared or absolute error for regression.

    Raises:
        ValueError: for a bad name, and where no metric is given for a loss that has no default.

    Example:
        >>> from torch import nn
        >>> Task("digit", loss=nn.CrossEntropyLoss()).metric
        MulticlassAccuracy()
    """

    name: str
    loss: Callable[[Tensor, Tensor], Tensor]
    metric: Metric | None = None

    def __post_init__(self) -> None:
        if not self.name or "." in self.name or "/" in self.name:
            raise ValueError(f"task name {self.name!r} must not be empty or contain '.' or '/': choose another")
        if self.metric is None:
            metric = default_metric(self.loss)
            if metric is None:
                raise ValueError(
                    f"task {self.name!r}: no default metric for the loss {type(self.loss).__name__}; pass metric=, "
                    "for example torchmetrics.MeanSquaredError()"
                )
            object.__setattr__(self, "metric", metric)

    def new_metric(self) -> Metric:
        """A fresh copy of the metric, empty."""
        assert self.metric is not None  # __post_init__ filled it in
        metric = self.metric.clone()
        metric.reset()
        return metric


def check_tasks(tasks: Task | Sequence[Task]) -> tuple[Task, ...]:
    """The tasks as a tuple.

    Raises:
        ValueError: if there is none, or two have the same name.
    """
    tasks = (tasks,) if isinstance(tasks, Task) else tuple(tasks)
    if not tasks:
        raise ValueError("there is no task: give at least one mtl.Task")
    names = [task.name for task in tasks]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two tasks are named {twice[0]!r}: outputs and targets go by name, so names must differ")
    return tasks
