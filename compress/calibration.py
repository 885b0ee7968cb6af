"""Calibration data: batches of a model's inputs, iterated as often as needed."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from compress.errors import CalibrationError
from compress.trace import ExampleInputs

Calibration = Iterable[Any]


def check_calibration(calibration: Calibration | None, needed_by: str) -> Calibration:
    """The calibration data, which ``needed_by`` cannot do without.

    Raises:
        CalibrationError: there are none, or they can be iterated only once.
    """
    if calibration is None:
        raise CalibrationError(f"{needed_by} needs data: pass calibration=batches, for example a DataLoader")
    if isinstance(calibration, Tensor | Mapping):
        raise CalibrationError("calibration is one batch: pass a list of batches, or a DataLoader")
    if iter(calibration) is calibration:
        raise CalibrationError(
            "calibration is a generator, which can be read only once: pass a list of batches, or a DataLoader"
        )
    return calibration


def num_batches_of(calibration: Calibration) -> int:
    """How many batches there are; 1 where that is not known beforehand."""
    try:
        return max(len(calibration), 1)  # type: ignore[arg-type]
    except TypeError:
        return 1


def batches(calibration: Calibration, model: nn.Module) -> Iterator[tuple[ExampleInputs, Any]]:
    """Each batch as (model inputs, target or None), on the model's device.

    A batch is a tensor or dict (the model's input), or a pair ``(input, target)``; several positional inputs are a
    tuple inside the pair.

    Raises:
        CalibrationError: a batch of another form, or no batch at all.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    empty = True
    for number, batch in enumerate(calibration):
        empty = False
        if isinstance(batch, tuple | list):
            if len(batch) != 2:
                raise CalibrationError(
                    f"calibration batch {number} is a {type(batch).__name__} of {len(batch)}: pass a tensor, a dict, "
                    "or a pair (input, target); several inputs go in a tuple inside the pair"
                )
            inputs, target = batch
        else:
            inputs, target = batch, None
        if not isinstance(inputs, Tensor | tuple | Mapping):
            raise CalibrationError(f"calibration batch {number} holds a {type(inputs).__name__}, not a model input")
        yield tree_map_only(Tensor, lambda t: t.to(device), (inputs, target))
    if empty:
        raise CalibrationError("calibration has no batches: pass at least one")
