"""The optimizer of a run: which parameters decay, and at which rate."""

from __future__ import annotations

import torch
from torch import nn

from mtl.options import FitOptions
from mtl.sharing.stacks import weight_axes


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of the next step, times the factor of each group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]


def build_optimizer(model: nn.Module, weighting: nn.Module, options: FitOptions) -> torch.optim.Optimizer:
    """SGD or AdamW over what requires a gradient.

    Weight decay is for weights only: a bias or the scale of a norm (at most one axis) has no scale symmetry to
    control, and He et al. 2019 ("Bag of Tricks", section 3.1) measured that leaving them out helps. Parameters of the
    weighting are no weights of the model and do not decay either.

    Raises:
        ValueError: if nothing requires a gradient, or the model does not say which parameters a task has alone.
    """
    parameters = [(parameter, axes) for parameter, axes in weight_axes(model) if parameter.requires_grad]
    if not parameters:
        raise ValueError("no parameter of the model requires a gradient, so there is nothing to train")
    factors = _lr_factors(model, options)
    by_kind: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for parameter, axes in parameters:
        by_kind.setdefault((axes > 1, factors.get(parameter, 1.0)), []).append(parameter)
    by_kind.setdefault((False, 1.0), []).extend(weighting.parameters())
    groups = [
        {"params": members, "weight_decay": options.weight_decay if decays else 0.0, "lr_factor": factor}
        for (decays, factor), members in by_kind.items()
        if members
    ]
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=options.peak_lr, momentum=options.momentum, nesterov=options.nesterov)
    return torch.optim.AdamW(groups, lr=options.peak_lr)


def _lr_factors(model: nn.Module, options: FitOptions) -> dict[nn.Parameter, float]:
    if not options.task_lr:
        return {}
    parameters_of = getattr(model, "task_parameters", None)
    if not callable(parameters_of):
        raise ValueError(
            f"task_lr is given, but {type(model).__name__} has no method task_parameters(task), as mtl.HardShared has, "
            "that says which parameters belong to one task"
        )
    return {parameter: factor for task, factor in options.task_lr.items() for parameter in parameters_of(task)}
