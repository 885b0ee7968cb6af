"""The optimizer of a run: which parameters decay, and at which rate."""

from __future__ import annotations

import torch
from torch import nn

from mtl.options import FitOptions
from mtl.sharing.stacks import weight_axes


def build_optimizer(model: nn.Module, weighting: nn.Module, options: FitOptions) -> torch.optim.Optimizer:
    """SGD or AdamW over what requires a gradient.

    Weight decay is for weights only: a bias or the scale of a norm (at most one axis) has no scale symmetry to
    control, and He et al. 2019 ("Bag of Tricks", section 3.1) measured that leaving them out helps. Parameters of the
    weighting are no weights of the model and do not decay either.

    Raises:
        ValueError: if nothing requires a gradient.
    """
    parameters = [(parameter, axes) for parameter, axes in weight_axes(model) if parameter.requires_grad]
    if not parameters:
        raise ValueError("no parameter of the model requires a gradient, so there is nothing to train")
    groups = [
        {"params": [p for p, axes in parameters if axes > 1], "weight_decay": options.weight_decay},
        {"params": [*(p for p, axes in parameters if axes <= 1), *weighting.parameters()], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=options.peak_lr, momentum=options.momentum, nesterov=options.nesterov)
    return torch.optim.AdamW(groups, lr=options.peak_lr)
