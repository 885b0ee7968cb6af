"""Recovery without training: what a pruned model can win back from unlabelled data alone."""

import torch
from torch import nn

from compress.calibration import Calibration, batches
from compress.trace import as_arguments

_NORM = nn.modules.batchnorm._BatchNorm


def reestimate_batch_norm(model: nn.Module, calibration: Calibration) -> None:
    """Replace the running statistics of every batch norm by averages over ``calibration``, in place.

    Removing channels shifts the distribution of everything downstream; statistics of the dense model no longer fit
    (Li et al. 2020, "EagleEye", section 3.3). Layers without running statistics are left alone.
    """
    norms = [
        m for m in model.modules() if isinstance(m, _NORM) and m.track_running_stats and m.running_mean is not None
    ]
    if not norms:
        return
    was_training = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average over all batches
        norm.train()
    try:
        with torch.no_grad():
            for inputs, _ in batches(calibration, model):
                args, kwargs = as_arguments(inputs)
                model(*args, **kwargs)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in was_training.items():
            module.training = mode
