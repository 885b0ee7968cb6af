"""What criteria judge channels by: weights, and statistics of activations gathered in one pass over all batches."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compress.calibration import Calibration, batches
from compress.channels import ChannelGraph, ChannelGroup, Member
from compress.errors import CalibrationError, PruneError
from compress.gram import Grams
from compress.labels import FIXED, Array, Labels, Read
from compress.recorder import Trace
from compress.rules import propagate
from compress.sandbox import on_meta, untouched, visible_operators
from compress.trace import ExampleInputs, as_arguments, record
from compress.trial import Trial

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ActivationSums:
    """Sums by label of what is known of each channel where its consumers read it: totals over reads of per-read means.

    ``magnitude`` is the mean absolute value, ``nonzero`` the part of elements that are not zero.
    """

    magnitude: Values
    nonzero: Values
    num_reads: Array


@dataclass(frozen=True)
class Evidence:
    """Everything a criterion may look at. Weights are read from the model; the rest was collected beforehand."""

    model: nn.Module
    graph: ChannelGraph
    activations: ActivationSums | None = None
    loss: Callable[..., Any] | None = None
    seed: int = 0
    grams: Grams | None = None
    trial: Trial | None = None
    _tensors: dict[str, Tensor] = field(default_factory=dict)

    def tensor(self, name: str) -> Tensor:
        """A parameter or buffer of the model."""
        if not self._tensors:
            self._tensors.update(self.model.named_parameters(remove_duplicate=False))
            self._tensors.update(self.model.named_buffers(remove_duplicate=False))
        return self._tensors[name].detach()

    def members(self, group: ChannelGroup) -> Iterator[tuple[Member, Tensor]]:
        """The members of ``group`` with their tensors."""
        return ((member, self.tensor(member.parameter)) for member in group.members)

    def weight_mean(self, group: ChannelGroup, power: int) -> Values:
        """Mean of ``|w| ** power`` over the weights that make each channel, shape (units,).

        Those are the slices of the group's producers (matrices and kernels); where there are none, of all members.
        """
        if on_meta(self.model):
            raise PruneError(
                "weights on the meta device have no values to rank by: load them, or plan with criterion='random'"
            )
        found = [(m, t) for m, t in self.members(group) if t.is_floating_point()]
        makers = [(m, t) for m, t in found if m.role == "producer" and t.dim() > 1] or found
        total, count = np.zeros(group.num_units), 0
        for member, tensor in makers:
            rows = tensor.movedim(member.axis, 0).reshape(tensor.shape[member.axis], -1)
            sums = rows.double().abs().pow(power).sum(dim=1).cpu().numpy()
            total += sums[member.indices].sum(axis=1)
            count += rows.shape[1] * member.indices.shape[1]
        return total / max(count, 1)

    def activation_mean(self, group: ChannelGroup, statistic: str) -> Values:
        """``"magnitude"`` or ``"nonzero"`` of each channel where it is read, shape (units,).

        Raises:
            PruneError: the evidence was collected without activations.
        """
        if self.activations is None:
            raise PruneError("this evidence holds no activations: declare `needs = {'activations'}` on the criterion")
        values = self.graph.unit_means(group, getattr(self.activations, statistic), self.activations.num_reads)
        # a channel that no weight reads (it is only multiplied by others) is judged by its weights instead
        return np.where(np.isnan(values), self.weight_mean(group, 1), values)


def collect_activations(model: nn.Module, graph: ChannelGraph, calibration: Calibration) -> ActivationSums:
    """One pass over ``calibration`` in evaluation mode.

    Raises:
        CalibrationError: batches of the wrong form or shape, or activations that are not finite.
    """
    number = graph.labels.num_labels
    magnitude, nonzero, reads = np.zeros(number), np.zeros(number), np.zeros(number, dtype=np.int64)
    sums: dict[tuple[str, int], _ReadSums] = {}
    observers: dict[Any, _Observer] = {}
    with untouched(model):
        model.eval()
        for index, (inputs, _) in enumerate(batches(calibration, model)):
            shapes = tuple(leaf.shape for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))
            if shapes not in observers:  # operators may decompose differently at another size: trace each once
                observers[shapes] = _observer(model, inputs, sums)
            observers[shapes].run(model, inputs, index)
    for read in sums.values():
        known = (read.labels != FIXED) & (read.labels < number)
        np.add.at(magnitude, read.labels[known], (read.magnitude / read.count)[known])
        np.add.at(nonzero, read.labels[known], (read.nonzero / read.count)[known])
        np.add.at(reads, read.labels[known], 1)
    return ActivationSums(magnitude, nonzero, reads)


@dataclass
class _ReadSums:
    labels: Array
    magnitude: Values
    nonzero: Values
    count: int = 0


def _observer(model: nn.Module, inputs: ExampleInputs, sums: dict[tuple[str, int], _ReadSums]) -> "_Observer":
    try:
        trace = record(model, inputs, training=False)
    except PruneError as error:
        raise CalibrationError(f"calibration data do not fit the model: {error}") from error
    return _Observer(trace, propagate(trace), sums)


class _Observer:
    """Watches the reads of one input shape: the n-th operator of a run is the n-th of its trace."""

    def __init__(self, trace: Trace, labels: Labels, sums: dict[tuple[str, int], _ReadSums]) -> None:
        self._names = [op.func for op in trace.evaluation]
        self._modules = [op.module for op in trace.evaluation]
        self._reads: dict[int, list[tuple[tuple[str, int], Read]]] = {}
        occurrences: dict[str, int] = {}
        for read in labels.reads:
            module = self._modules[read.op]
            key = (module, occurrences.get(module, 0))
            occurrences[module] = key[1] + 1
            self._reads.setdefault(read.op, []).append((key, read))
        self._sums = sums

    def run(self, model: nn.Module, inputs: ExampleInputs, batch: int) -> None:
        args, kwargs = as_arguments(inputs)
        with torch.no_grad(), visible_operators(), _Watch(self, batch):
            model(*args, **kwargs)

    def observe(self, index: int, func: Any, args: tuple[Any, ...], batch: int) -> None:
        """Take note of operator ``index`` of the run if a channel is read there."""
        if index >= len(self._names) or self._names[index] is not func:
            raise CalibrationError(
                f"calibration batch {batch} takes another path through the model than its trace (operator {func}): "
                "activation criteria need a model whose operators do not depend on the data; use l1 or l2"
            )
        for key, read in self._reads.get(index, ()):
            position = [argument.name for argument in func._schema.arguments].index(read.argument)
            self._add(key, read, args[position], batch)

    def _add(self, key: tuple[str, int], read: Read, value: Tensor, batch: int) -> None:
        axis = read.axis
        others = [d for d in range(value.dim()) if d != axis]
        size = torch.linalg.vector_norm(value, 1, dim=others, dtype=torch.float64) if others else value.double().abs()
        if not torch.isfinite(size).all():
            where = self._modules[read.op] or "the model"
            raise CalibrationError(
                f"activations that enter {where!r} are not finite in calibration batch {batch}: check the data, "
                "the normalisation and the weights"
            )
        known = self._sums.get(key)
        if known is None:
            zeros = np.zeros(value.shape[axis])
            known = self._sums[key] = _ReadSums(read.labels, zeros, zeros.copy())
        known.magnitude += size.cpu().numpy()
        known.nonzero += (value != 0).sum(dim=others).cpu().numpy() if others else (value != 0).cpu().numpy()
        known.count += value.numel() // value.shape[axis]


class _Watch(TorchDispatchMode):
    def __init__(self, observer: _Observer, batch: int) -> None:
        super().__init__()
        self._observer = observer
        self._batch = batch
        self._index = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "prim":
            self._observer.observe(self._index, func, args, self._batch)
            self._index += 1
        return func(*args, **(kwargs or {}))
