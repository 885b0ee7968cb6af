"""First-order effect of each channel on the loss, gathered in one pass over labelled calibration data."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.calibration import Calibration, batches
from compress.channels import ChannelGraph, ChannelGroup, Member
from compress.errors import CalibrationError, first_line
from compress.labels import Array
from compress.sandbox import untouched
from compress.tasks import EVERYTHING, Loss, View
from compress.trace import ExampleInputs, as_arguments, describe

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class FirstOrder:
    """By label: the mean over batches of ``(sum of gradient x weight) ** 2`` of the unit that the label belongs to."""

    squared: Values
    known: Array


def collect_gradients(
    model: nn.Module, graph: ChannelGraph, calibration: Calibration, loss: Loss | None = None, view: View = EVERYTHING
) -> FirstOrder:
    """One pass, forward and backward, over all batches of ``calibration`` in evaluation mode.

    The sum runs over the slices that read a channel: by the product rule it is the derivative of the loss by a factor
    on the channel where it is read, and so, to first order, what the loss changes by when the channel goes. Where no
    weight reads the channel, it runs over the weights that make it.

    Args:
        loss: ``loss(output, target)``, a scalar; cross-entropy on class indices if None.
        view: the task whose output and target it compares.

    Raises:
        CalibrationError: targets are missing or do not fit, or activations or gradients are not finite; says where.
    """
    starts = {(axis.parameter, axis.axis): axis.start for axis in graph.labels.axes}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    judged = [(group, _judges(group, parameters)) for group in graph.groups]
    names = sorted({member.parameter for _, members in judged for member in members})
    totals = [np.zeros(group.num_units) for group, _ in judged]
    number = 0
    with untouched(model), differentiable([parameters[name] for name in names]):
        model.eval()
        for number, (inputs, target) in enumerate(batches(calibration, model), start=1):
            value = _loss(model, inputs, target, loss, number - 1, view)
            found = torch.autograd.grad(value, [parameters[name] for name in names], allow_unused=True)
            products = _Products(dict(zip(names, found, strict=True)), parameters, number - 1)
            for total, (group, members) in zip(totals, judged, strict=True):
                total += products.of_units(group, members) ** 2
    squared, known = np.zeros(graph.labels.num_labels), np.zeros(graph.labels.num_labels, dtype=np.int64)
    for total, (_, members) in zip(totals, judged, strict=True):
        for member in members:  # every label of a unit stands for the whole unit
            labels = starts[member.parameter, member.axis] + member.indices
            squared[labels] = (total / number)[:, None]
            known[labels] = 1
    return FirstOrder(squared, known)


def _judges(group: ChannelGroup, parameters: Mapping[str, nn.Parameter]) -> list[Member]:
    for roles in (("consumer",), ("producer", "carrier")):
        members = [m for m in group.members if m.role in roles and m.parameter in parameters]
        members = [m for m in members if parameters[m.parameter].is_floating_point()]
        if members:
            return members
    return []


@contextmanager
def differentiable(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Gradients for all ``parameters``, those that the user froze included, whatever mode the caller is in."""
    before = [parameter.requires_grad for parameter in parameters]
    with torch.inference_mode(False), torch.enable_grad():
        try:
            for parameter in parameters:
                parameter.requires_grad_(True)
            yield
        finally:
            for parameter, required in zip(parameters, before, strict=True):
                parameter.requires_grad_(required)


def _loss(model: nn.Module, inputs: ExampleInputs, target: Any, loss: Loss | None, batch: int, view: View) -> Tensor:
    if target is None:
        raise CalibrationError(
            f"calibration batch {batch} has no target, which gradients need: pass pairs (input, target), "
            "or choose a criterion without gradients"
        )
    if isinstance(target, Mapping) and view.task is not None and view.task not in target:
        raise CalibrationError(f"calibration batch {batch} has no target for task {view.task!r}")
    args, kwargs = as_arguments(inputs)
    try:
        output, target = view.of(model(*args, **kwargs)), view.of(target)
    except Exception as error:
        raise CalibrationError(
            f"calibration batch {batch} ({describe(inputs)}) does not fit the model: {first_line(error)}"
        ) from error
    if loss is None and not isinstance(output, Tensor):
        raise CalibrationError(
            f"the model gives a {type(output).__name__}, which cross-entropy cannot take: pass loss=fn(output, target)"
        )
    try:
        value = (loss or F.cross_entropy)(output, target)
    except Exception as error:
        name = "cross-entropy, the default loss," if loss is None else "the loss"
        raise CalibrationError(
            f"{name} fails on calibration batch {batch}, whose target is {describe(target)}: {first_line(error)}; "
            "pass targets that fit, or loss=fn(output, target)"
        ) from error
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        raise CalibrationError(
            "the loss must be one number that depends on the weights: return a tensor, reduced, and not detached"
        )
    if not torch.isfinite(value):
        raise CalibrationError(
            f"the loss is not finite in calibration batch {batch} ({_where_not_finite(model, inputs)}): check the "
            "data, the normalisation and the weights"
        )
    return value


def _where_not_finite(model: nn.Module, inputs: ExampleInputs) -> str:
    """The first module whose result is not finite, in words."""
    found: list[str] = []

    def look(name: str, output: Any) -> None:
        if isinstance(output, Tensor) and not torch.isfinite(output).all():
            found.append(name)

    handles = [
        module.register_forward_hook(lambda _, __, output, name=name: look(name, output))
        for name, module in model.named_modules()
    ]
    args, kwargs = as_arguments(inputs)
    with torch.no_grad():
        model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    if not found:
        return "the model's activations are"
    return f"first what {found[0]!r} gives" if found[0] else "what the model gives"


class _Products:
    """Sums of gradient x weight of one batch, computed once for each parameter axis."""

    def __init__(self, gradients: Mapping[str, Tensor | None], parameters: Mapping[str, Tensor], batch: int) -> None:
        self._gradients, self._parameters, self._batch = gradients, parameters, batch
        self._known: dict[tuple[str, int], Values | None] = {}

    def of_units(self, group: ChannelGroup, members: list[Member]) -> Values:
        """One sum a unit, shape (units,)."""
        total = np.zeros(group.num_units)
        for member in members:
            key = (member.parameter, member.axis)
            if key not in self._known:
                self._known[key] = self._along(*key)
            values = self._known[key]
            if values is not None:
                total += values[member.indices].sum(axis=1)
        return total

    def _along(self, name: str, axis: int) -> Values | None:
        gradient = self._gradients[name]
        if gradient is None:  # the loss does not depend on it
            return None
        product = (gradient * self._parameters[name]).detach()
        others = [d for d in range(product.dim()) if d != axis]
        values: Values = (product.double().sum(dim=others) if others else product.double()).cpu().numpy()
        if not np.isfinite(values).all():
            raise CalibrationError(
                f"the gradient of {name!r} is not finite in calibration batch {self._batch}: check the data, "
                "the loss and the weights"
            )
        return values
