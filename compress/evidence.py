"""What criteria judge channels by: weights, and statistics of activations gathered in one pass over all batches."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compress.calibration import Calibration, batches
from compress.channels import ChannelGraph, ChannelGroup, Member
from compress.errors import CalibrationError, PruneError, first_line
from compress.gradients import FirstOrder
from compress.gram import Grams
from compress.labels import FIXED, Array, Labels, Read
from compress.recorder import Trace
from compress.rules import propagate
from compress.sandbox import untouched, visible_operators
from compress.sums import channel_sums
from compress.trace import ExampleInputs, as_arguments, describe, record
from compress.trial import Trial

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


@dataclass(frozen=True)
class Evidence:
    """Everything a criterion may look at. Weights are read from the model; the rest was collected beforehand."""

    model: nn.Module
    graph: ChannelGraph
    activations: ActivationSums | None = None
    loss: Callable[..., Any] | None = None
    seed: int = 0
    gradients: FirstOrder | None = None
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
        total, count = np.zeros(group.num_units), 0
        for member, tensor in self._makers(group):
            sums = _power_sums(tensor, member.axis, power).cpu().numpy()
            total += sums[member.indices].sum(axis=1)
            count += tensor.numel() // tensor.shape[member.axis] * member.indices.shape[1]
        return total / max(count, 1)

    def rows(self, group: ChannelGroup) -> Iterator[Tensor]:
        """The weights that make each channel, one float64 matrix of shape (units, weights) a parameter."""
        for member, tensor in self._makers(group):
            rows = tensor.movedim(member.axis, 0).reshape(tensor.shape[member.axis], -1).double()
            yield rows[torch.from_numpy(member.indices).to(tensor.device)].reshape(group.num_units, -1)

    def _makers(self, group: ChannelGroup) -> list[tuple[Member, Tensor]]:
        """The group's producers (matrices and kernels); where there are none, all members of floating point."""
        found = [(m, t) for m, t in self.members(group) if t.is_floating_point()]
        if any(t.is_meta for _, t in found):
            raise PruneError(
                "weights on the meta device have no values to rank by: load them, or plan with criterion='random'"
            )
        return [(m, t) for m, t in found if m.role == "producer" and t.dim() > 1] or found

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

    def first_order(self, group: ChannelGroup) -> Values:
        """Mean over batches of the squared sum of gradient x weight where a channel is read, shape (units,).

        Zero for a channel that the loss does not depend on. Raises :class:`PruneError` for evidence without gradients.
        """
        if self.gradients is None:
            raise PruneError("this evidence holds no gradients: declare `needs = {'gradients'}` on the criterion")
        return np.nan_to_num(self.graph.unit_means(group, self.gradients.squared, self.gradients.known))


def _power_sums(tensor: Tensor, axis: int, power: int) -> Tensor:
    """Sums of ``|tensor| ** power`` over all axes but one, in double precision; widened a block at a time."""
    others = [other for other in range(tensor.dim()) if other != axis]
    if not others:
        return tensor.double().abs() ** power
    rows = max(1, BLOCK * tensor.shape[axis] // max(tensor.numel(), 1))
    norms = [torch.linalg.vector_norm(part, power, others, dtype=torch.float64) for part in tensor.split(rows, axis)]
    return torch.cat(norms) ** power


BLOCK = 2**22  # elements that are widened at a time


def collect_activations(model: nn.Module, graph: ChannelGraph, calibration: Calibration) -> ActivationSums:
    """One pass over ``calibration`` in evaluation mode.

    Raises:
        CalibrationError: batches of the wrong form or shape, or activations that are not finite.
    """
    number = graph.labels.num_labels
    magnitude, nonzero, reads = np.zeros(number), np.zeros(number), np.zeros(number, dtype=np.int64)
    sums: dict[tuple[str, int], _ReadSums] = {}
    first = _Observer(graph.trace, graph.labels)
    traced = [torch.Size(ref.shape) for ref in graph.trace.inputs]  # of the evaluation run; those of training follow
    observers: dict[tuple[torch.Size, ...], _Observer] = {}
    with untouched(model):
        model.eval()
        for index, (inputs, _) in enumerate(batches(calibration, model)):
            shapes = tuple(leaf.shape for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))
            try:
                found = observers.get(shapes, first).run(model, inputs, index)
            except _OtherPathError:
                if shapes in observers or (graph.trace.real and list(shapes) == traced[: len(shapes)]):
                    raise  # it depends on the data
                # operators may decompose differently at this size, and on this device
                observers[shapes] = _observer(model, inputs, index)
                found = observers[shapes].run(model, inputs, index)
            for read in found:
                sums.setdefault(read.key, read.nothing()).add(read)
    for read in sums.values():
        known = (read.labels != FIXED) & (read.labels < number)
        np.add.at(magnitude, read.labels[known], (read.magnitude / read.count)[known])
        np.add.at(nonzero, read.labels[known], (read.nonzero / read.count)[known])
        np.add.at(reads, read.labels[known], 1)
    return ActivationSums(magnitude, nonzero, reads)


@dataclass
class _ReadSums:
    """Sums over what one read has seen; ``key`` is the module that reads, and the how-manieth of its reads it is."""

    key: tuple[str, int]
    labels: Array
    magnitude: Values
    nonzero: Values
    count: int = 0

    def nothing(self) -> "_ReadSums":
        return _ReadSums(self.key, self.labels, np.zeros(len(self.labels)), np.zeros(len(self.labels)))

    def add(self, other: "_ReadSums") -> None:
        self.magnitude += other.magnitude
        self.nonzero += other.nonzero
        self.count += other.count


class _OtherPathError(CalibrationError):
    """The model called other operators than its trace."""


def _observer(model: nn.Module, inputs: ExampleInputs, batch: int) -> "_Observer":
    try:
        trace = record(model, inputs, training=False, on_device=True)
    except PruneError as error:
        raise CalibrationError(f"calibration data (batch {batch}) do not fit the model: {error}") from error
    return _Observer(trace, propagate(trace))


class _Observer:
    """Watches the reads of one trace: the n-th operator of a run is the n-th of its trace."""

    def __init__(self, trace: Trace, labels: Labels) -> None:
        self._names = [op.func for op in trace.evaluation]
        self._modules = [op.module for op in trace.evaluation]
        self._reads: dict[int, list[tuple[tuple[str, int], int, Read]]] = {}
        occurrences: dict[str, int] = {}
        for read in labels.reads:
            module = self._modules[read.op]
            key = (module, occurrences.get(module, 0))
            occurrences[module] = key[1] + 1
            position = [argument.name for argument in self._names[read.op]._schema.arguments].index(read.argument)
            self._reads.setdefault(read.op, []).append((key, position, read))

    def run(self, model: nn.Module, inputs: ExampleInputs, batch: int) -> list[_ReadSums]:
        args, kwargs = as_arguments(inputs)
        watch = _Watch(self, batch)
        try:
            with torch.no_grad(), visible_operators(), watch:
                model(*args, **kwargs)
        except CalibrationError:
            raise
        except Exception as error:
            raise CalibrationError(
                f"calibration data (batch {batch}) do not fit the model: on {describe(inputs)} it fails with "
                f"{first_line(error)!r}"
            ) from error
        return watch.found

    def observe(self, index: int, func: Any, args: tuple[Any, ...], watch: "_Watch") -> Iterator[_ReadSums]:
        """What operator ``index`` of the run reads of the channels."""
        reads = self._reads.get(index, ())
        same = index < len(self._names) and self._names[index] is func
        if not same or any(args[place].shape[read.axis] != len(read.labels) for _, place, read in reads):
            raise _OtherPathError(
                f"calibration batch {watch.batch} takes another path through the model than its trace (operator "
                f"{func}): activation criteria need a model whose operators do not depend on the data; use l1 or l2"
            )
        for key, place, read in reads:
            value = args[place]
            magnitude, nonzero = watch.sums(value, read.axis)
            if not np.isfinite(magnitude).all():
                where = self._modules[read.op] or "the model"
                raise CalibrationError(
                    f"activations that enter {where!r} are not finite in calibration batch {watch.batch}: check the "
                    "data, the normalisation and the weights"
                )
            yield _ReadSums(key, read.labels, magnitude, nonzero, value.numel() // value.shape[read.axis])


class _Watch(TorchDispatchMode):
    """Sees every operator of one run. Sums are taken once for all reads of the same values."""

    def __init__(self, observer: _Observer, batch: int) -> None:
        super().__init__()
        self.batch = batch
        self.found: list[_ReadSums] = []
        self._observer = observer
        self._index = 0
        self._backends = torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()
        self._known: dict[tuple[Any, ...], tuple[Values, Values]] = {}
        self._nonnegative: set[tuple[int, int]] = set()
        self._alive: dict[int, StorageWeakRef] = {}  # while one is held, no other storage gets its address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "prim":
            self.found += self._observer.observe(self._index, func, args, self)
            self._index += 1
        # the fast backends are off for the choice of operators only: an operator that was chosen may use them
        _use_backends(*self._backends)
        try:
            result = func(*args, **(kwargs or {}))
        finally:
            _use_backends(False, False)
        if isinstance(result, Tensor) and func._overloadpacket in NONNEGATIVE and _is_whole(result):
            self._nonnegative.add(self._identity(result))
        return result

    def sums(self, value: Tensor, axis: int) -> tuple[Values, Values]:
        """`channel_sums` of ``value``."""
        identity = self._identity(value)
        key = (*identity, value.storage_offset(), value.shape, value.stride(), axis)
        if key not in self._known:
            magnitude, nonzero = channel_sums(value, axis, nonnegative=identity in self._nonnegative)
            if not torch.isfinite(magnitude).all():  # or only too large for single precision
                magnitude, nonzero = channel_sums(value.double(), axis)
            self._known[key] = magnitude.cpu().numpy(), nonzero.cpu().numpy().astype(np.float64)
        return self._known[key]

    def _identity(self, tensor: Tensor) -> tuple[int, int]:
        """What two tensors share only if one is a view of the other, and nothing was written in between."""
        reference = StorageWeakRef(tensor.untyped_storage())
        self._alive.setdefault(reference.cdata, reference)
        # inference tensors do not count what is written to them: none is taken for another
        return reference.cdata, -self._index if tensor.is_inference() else tensor._version


def _use_backends(onednn: bool, cudnn: bool) -> None:
    torch._C._set_mkldnn_enabled(onednn)
    torch._C._set_cudnn_enabled(cudnn)


def _is_whole(tensor: Tensor) -> bool:
    return tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
