"""What a task is: a name, a loss, the metric that it is judged by, and how missing labels are told.

Shapes: B samples in a batch, K classes, L tokens in a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from mtl import metrics

if TYPE_CHECKING:
    from torchmetrics import Metric

Direction = Literal["max", "min"]

# The class that PyTorch's losses ignore when told nothing else.
IGNORED = -100
_BINARY = (nn.BCEWithLogitsLoss, nn.BCELoss)
# Losses of two tensors of numbers: integers and booleans become numbers, and (B, 1) is compared with (B,).
_NUMERIC = (*_BINARY, nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss)


class TokenCrossEntropy(nn.CrossEntropyLoss):
    """Cross-entropy of a class per token, with the classes on the last axis, as networks for sequences give them."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """From logits (B, L, K) and classes (B, L); ``ignore_index`` marks padding."""
        return super().forward(input.flatten(0, -2), target.flatten())


@dataclass(frozen=True)
class Labels:
    """The targets of one task in one batch.

    Args:
        values: as the loss takes them
        known: True where there is a label; None where all are there
        count: how many labels there are
        left_out: whether the loss itself leaves out what has no label
    """

    values: Tensor
    known: Tensor | None
    count: int
    left_out: bool

    def to(self, device: torch.device) -> Labels:
        """The same on a device."""
        known = None if self.known is None else self.known.to(device, non_blocking=True)
        return replace(self, values=self.values.to(device, non_blocking=True), known=known)


@dataclass(frozen=True)
class Task:
    """One thing to be learnt: how an output of the model is compared with its target.

    ``Task.classification``, ``binary``, ``multi_label``, ``regression`` and ``tagging`` fill in loss and metric.

    A missing label is NaN in a target of numbers, and the loss's ``ignore_index`` (else -100) in one of classes. It
    counts neither in the loss nor in the metric; a batch without any label of a task does not train that task. A loss
    with the attribute ``ignore_index`` leaves out missing classes itself; any other gets the samples that have a class,
    with -100 in place of those that are missing.

    Args:
        name: names the model's output, the target and the curves; not empty, without "." and "/"
        loss: ``loss(output, target)``, a scalar tensor that is a mean over the batch
        metric: a torchmetrics metric with one number as its result, used as a template and never updated itself.
            Default by the loss: accuracy (a fraction) for cross-entropy, negative log-likelihood and binary
            cross-entropy on logits; mean squared or absolute error for regression.
        weight: factor on the loss before any weighting, > 0
        direction: whether more ("max") or less ("min") of the metric is better; default: what the metric says

    Raises:
        ValueError: for a bad name, weight or direction, and where no metric is given for a loss that has no default.

    Example:
        >>> from torch import nn
        >>> Task("digit", loss=nn.CrossEntropyLoss()).metric
        MulticlassAccuracy()
    """

    name: str
    loss: Callable[[Tensor, Tensor], Tensor]
    metric: Metric | None = None
    weight: float = 1.0
    direction: Direction | None = None

    def __post_init__(self) -> None:
        if not self.name or "." in self.name or "/" in self.name:
            raise ValueError(f"task name {self.name!r} must not be empty or contain '.' or '/': choose another")
        if not 0 < self.weight < math.inf:
            raise ValueError(f"task {self.name!r}: weight is {self.weight}, but it must be a number above 0")
        if self.direction not in (None, "max", "min"):
            raise ValueError(f"task {self.name!r}: direction is {self.direction!r}, but it must be 'max' or 'min'")
        if self.metric is None:
            metric = metrics.default_metric(self.loss)
            if metric is None:
                raise ValueError(
                    f"task {self.name!r}: no default metric for the loss {type(self.loss).__name__}; pass metric=, "
                    "for example torchmetrics.MeanSquaredError()"
                )
            object.__setattr__(self, "metric", metric)
        better = getattr(self.metric, "higher_is_better", None)
        if self.direction is None and better is not None:
            object.__setattr__(self, "direction", "max" if better else "min")

    @classmethod
    def classification(cls, name: str, **options: Any) -> Task:
        """One of K classes: logits (B, K), classes (B,); cross-entropy and accuracy. Options are those of ``Task``."""
        return cls(name, **{"loss": nn.CrossEntropyLoss(), **options})

    @classmethod
    def binary(cls, name: str, **options: Any) -> Task:
        """Yes or no: logits (B,) or (B, 1), targets (B,) of 0 and 1; cross-entropy and accuracy."""
        return cls(name, **{"loss": nn.BCEWithLogitsLoss(), **options})

    @classmethod
    def multi_label(cls, name: str, **options: Any) -> Task:
        """K times yes or no: logits and targets (B, K); cross-entropy, and F1 of all labels together."""
        return cls(name, **{"loss": nn.BCEWithLogitsLoss(), "metric": metrics.logit_f1(), **options})

    @classmethod
    def regression(cls, name: str, **options: Any) -> Task:
        """Numbers: outputs (B,), (B, 1) or (B, K), targets (B,) or (B, K); mean squared error as loss and metric."""
        return cls(name, **{"loss": nn.MSELoss(), **options})

    @classmethod
    def tagging(cls, name: str, **options: Any) -> Task:
        """A class per token: logits (B, L, K), classes (B, L) with -100 for padding; cross-entropy and accuracy."""
        return cls(name, **{"loss": TokenCrossEntropy(), "metric": metrics.token_accuracy(IGNORED), **options})

    def new_metric(self) -> Metric:
        """A fresh copy of the metric, empty."""
        assert self.metric is not None  # __post_init__ filled it in
        metric = self.metric.clone()
        metric.reset()
        return metric

    def labels(self, target: Tensor) -> Labels:
        """The labels in a target, and how many there are. Cheap where the target is on the CPU."""
        if target.is_floating_point():
            known = ~target.isnan()
        else:
            known = target != getattr(self.loss, "ignore_index", IGNORED)
            if isinstance(self.loss, _NUMERIC):
                missing = ~known if isinstance(self.loss, _BINARY) else torch.zeros_like(known)
                return self.labels(target.float().masked_fill(missing, math.nan))
        count = int(known.sum())
        left_out = hasattr(self.loss, "ignore_index") and not target.is_floating_point()
        return Labels(target, known if count < known.numel() else None, count, left_out)

    def pair(self, output: Tensor, labels: Labels) -> tuple[Tensor, Tensor]:
        """Output and target of what has a label, as loss and metric take them.

        Raises:
            ValueError: where a loss of two numbers gets an output and a target of different shapes.
        """
        target = labels.values
        if isinstance(self.loss, _NUMERIC):
            if output.dim() == target.dim() + 1 and output.shape[-1] == 1:
                output = output.squeeze(-1)
            elif target.dim() == output.dim() + 1 and target.shape[-1] == 1:
                output = output.unsqueeze(-1)
            if output.shape != target.shape:
                raise ValueError(
                    f"task {self.name!r}: the output has shape {tuple(output.shape)}, the target "
                    f"{tuple(target.shape)}; {type(self.loss).__name__} compares number with number"
                )
            target = target.to(output.dtype)
        known = labels.known
        if known is None or labels.left_out:
            return output, target
        if not isinstance(self.loss, _NUMERIC) and known.dim() > 1:
            # such a loss takes whole samples: it may know of a class that does not count, but never of NaN
            known = known.flatten(1).all(1) if target.is_floating_point() else known.flatten(1).any(1)
        return output[known], target[known]

    def check(self, output: Tensor, labels: Labels) -> None:
        """Whether the classes are among those of the output, and labels of yes or no in [0, 1].

        Raises:
            ValueError: naming the label and what there is.
        """
        if isinstance(self.loss, _BINARY):
            outside = labels.values[(labels.values < 0) | (labels.values > 1)]
            if outside.numel():
                raise ValueError(
                    f"task {self.name!r}: there is a label {outside[0]:g}, but {type(self.loss).__name__} takes 0 for "
                    "no and 1 for yes: use Task.classification for more classes, or mark missing labels by NaN"
                )
        if not isinstance(self.loss, nn.CrossEntropyLoss | nn.NLLLoss) or labels.values.is_floating_point():
            return
        num_classes = output.shape[-1 if isinstance(self.loss, TokenCrossEntropy) else min(1, output.dim() - 1)]
        values = labels.values[labels.values != self.loss.ignore_index]
        if values.numel() and not (int(values.min()) >= 0 and int(values.max()) < num_classes):
            wrong = int(values.min() if values.min() < 0 else values.max())
            raise ValueError(
                f"task {self.name!r}: there is a label {wrong}, but the head gives {num_classes} classes (0 to "
                f"{num_classes - 1}): give the head more outputs, or mark missing labels by {self.loss.ignore_index}"
            )


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
