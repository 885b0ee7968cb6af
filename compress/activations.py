"""How large the activation of each channel is, and how often it is not zero, where its consumers read it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from compress.calibration import Calibration
from compress.channels import ChannelGraph
from compress.errors import CalibrationError
from compress.labels import FIXED, Array
from compress.recorder import Op, Trace
from compress.rules import propagate
from compress.sums import channel_sums
from compress.trace import ExampleInputs
from compress.watch import Look, Looks, OtherPathError, gather

Values = npt.NDArray[np.float64]

_ATEN = torch.ops.aten
NONNEGATIVE = {_ATEN.relu, _ATEN.relu_, _ATEN.sigmoid, _ATEN.sigmoid_, _ATEN._softmax}


@dataclass(frozen=True)
class ActivationSums:
    """Sums by label of what is known of each channel where its consumers read it: totals over reads of per-read means.

    ``magnitude`` is the mean absolute value, ``nonzero`` the part of elements that are not zero.
    """

    magnitude: Values
    nonzero: Values
    num_reads: Array


def collect_activations(model: nn.Module, graph: ChannelGraph, calibration: Calibration) -> ActivationSums:
    """One pass over ``calibration`` in evaluation mode; see :func:`compress.watch.gather` for what it raises."""
    (sums,) = gather(model, graph.trace, calibration, [lambda: ActivationCollector(graph)])
    assert isinstance(sums, ActivationSums)
    return sums


@dataclass
class _ReadSums:
    """Sums over what one read has seen, by channel."""

    labels: Array
    magnitude: Tensor
    nonzero: Tensor
    count: int = 0


class ActivationCollector:
    """Sums the activations that enter every read. Those of the same values are summed once for all reads of a batch."""

    def __init__(self, graph: ChannelGraph) -> None:
        self._graph = graph
        self._sums: dict[tuple[str, int], _ReadSums] = {}  # by the module, and the how-manieth of its reads it is
        self.begin(0, ())

    def watch(self, trace: Trace, looks: Looks) -> None:
        """All reads of channels, and what makes values that are not below zero."""
        labels = self._graph.labels if trace is self._graph.trace else propagate(trace)
        occurrences: dict[str, int] = {}
        for read in labels.reads:
            op = trace.evaluation[read.op]
            key = (op.module, occurrences.get(op.module, 0))
            occurrences[op.module] = key[1] + 1
            zeros = torch.zeros(len(read.labels), dtype=torch.float64)
            sums = self._sums.setdefault(key, _ReadSums(read.labels, zeros, zeros.long()))
            position = [argument.name for argument in op.func._schema.arguments].index(read.argument)
            looks.add_before(op.index, self._look(op, position, read.axis, sums))
        for op in trace.evaluation:
            if op.func._overloadpacket in NONNEGATIVE:
                looks.add_after(op.index, self._note)

    def begin(self, batch: int, inputs: ExampleInputs) -> None:
        """Forget the tensors of the batch before."""
        self._batch = batch
        self._known: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
        self._nonnegative: set[tuple[int, int]] = set()
        self._alive: dict[int, StorageWeakRef] = {}  # while one is held, no other storage gets its address
        self._moment = 0

    def result(self) -> ActivationSums:
        """Means of each read, added up by label."""
        number = self._graph.labels.num_labels
        magnitude, nonzero, reads = np.zeros(number), np.zeros(number), np.zeros(number, dtype=np.int64)
        for read in self._sums.values():
            if read.count:
                known = (read.labels != FIXED) & (read.labels < number)
                np.add.at(magnitude, read.labels[known], (read.magnitude.numpy() / read.count)[known])
                np.add.at(nonzero, read.labels[known], (read.nonzero.numpy() / read.count)[known])
                np.add.at(reads, read.labels[known], 1)
        return ActivationSums(magnitude, nonzero, reads)

    def _look(self, op: Op, position: int, axis: int, sums: _ReadSums) -> Look:
        def look(args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
            value = args[position]
            if value.shape[axis] != len(sums.labels):
                raise OtherPathError(self._batch, op.func)
            magnitude, nonzero = self._sums_of(value, axis, op.module)
            sums.magnitude += magnitude
            sums.nonzero += nonzero
            sums.count += value.numel() // value.shape[axis]

        return look

    def _note(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        if isinstance(result, Tensor) and _is_whole(result):
            self._nonnegative.add(self._identity(result))

    def _sums_of(self, value: Tensor, axis: int, module: str) -> tuple[Tensor, Tensor]:
        identity = self._identity(value)
        key = (*identity, value.storage_offset(), value.shape, value.stride(), axis)
        if key not in self._known:
            magnitude, nonzero = channel_sums(value, axis, nonnegative=identity in self._nonnegative)
            if not bool(magnitude.sum().isfinite()):  # or only too large for single precision
                magnitude, nonzero = channel_sums(value.double(), axis)
                check_finite(magnitude, module, self._batch)
            self._known[key] = magnitude.cpu(), nonzero.cpu()
        return self._known[key]

    def _identity(self, tensor: Tensor) -> tuple[int, int]:
        """What two tensors share only if one is a view of the other, and nothing was written in between."""
        reference = StorageWeakRef(tensor.untyped_storage())
        self._alive.setdefault(reference.cdata, reference)
        self._moment += 1
        # inference tensors do not count what is written to them: none is taken for another
        return reference.cdata, -self._moment if tensor.is_inference() else tensor._version


def check_finite(values: Tensor, module: str, batch: int) -> None:
    """Raises :class:`CalibrationError`, which names the layer and the batch, for values that are not finite."""
    if not bool(values.isfinite().all()):
        raise CalibrationError(
            f"activations that enter {module or 'the model'!r} are not finite in calibration batch {batch}: "
            "check the data, the normalisation and the weights"
        )


def _is_whole(tensor: Tensor) -> bool:
    return tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
