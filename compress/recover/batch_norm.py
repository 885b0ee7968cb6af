"""Statistics of batch norms, taken anew on the calibration data."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from compress.calibration import Calibration, batches
from compress.sandbox import untouched
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
    with torch.no_grad(), untouched(model):  # everything but the statistics stays as it was
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # cumulative average over all batches
            norm.train()
        for inputs, _ in batches(calibration, model):
            args, kwargs = as_arguments(inputs)
            model(*args, **kwargs)
        found = [{name: value.clone() for name, value in norm.named_buffers(recurse=False)} for norm in norms]
    for norm, statistics in zip(norms, found, strict=True):
        for name, value in statistics.items():
            getattr(norm, name).copy_(value)


@contextmanager
def statistics(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Gives a function that brings the present statistics of all batch norms back."""
    norms = [module for module in model.modules() if isinstance(module, _NORM)]
    before = [[(buffer, buffer.clone()) for buffer in norm.buffers(recurse=False)] for norm in norms]

    def restore() -> None:
        for buffer, value in (pair for pairs in before for pair in pairs):
            buffer.copy_(value)

    yield restore
