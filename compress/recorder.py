"""Write down every ATen operator that a running model calls, as plain data.

Two modes of PyTorch see the run: one every operator (:class:`TorchDispatchMode`), one every torch function with the
arguments that Python gave it (:class:`TorchFunctionMode`), which is where traced integers are still to be seen.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

from compress.provenance import (
    AxisSize,
    Observations,
    SizeComparison,
    Stored,
    TracedInt,
    ValueUse,
    expression_of,
    traced_size,
)


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor of the recorded run, without its data."""

    id: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Call:
    """The torch function during which operators ran, with the integers it was given (traced ones among them).

    ``flat`` holds the integers that stood alone among the arguments, in order (bounds of slices included);
    ``nested`` holds each list or tuple of integers.
    """

    name: str
    flat: tuple[int, ...]
    nested: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Op:
    """One ATen operator call: arguments by schema name with tensors as :class:`TensorRef`, and where it happened."""

    func: torch._ops.OpOverload
    arguments: Mapping[str, Any]
    outputs: tuple[TensorRef, ...]
    call: Call | None
    module: str
    index: int

    def __str__(self) -> str:
        where = f" in {self.module}" if self.module else ""
        return f"{self.func}{where}"

    def as_called(self, arguments: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """``arguments`` by schema name as ``func`` takes them: positional ones in order, and those by keyword."""
        schema = self.func._schema.arguments
        return [arguments[a.name] for a in schema if not a.kwarg_only], {
            a.name: arguments[a.name] for a in schema if a.kwarg_only
        }

    @property
    def formula(self) -> Callable[..., Any] | None:
        """PyTorch's count of the floating-point operations, for operators that have one."""
        found: Callable[..., Any] | None = flop_registry.get(self.func._overloadpacket)
        return found

    @cached_property
    def tensors(self) -> tuple[TensorRef, ...]:
        """Every tensor among the arguments, in order."""
        return tuple(leaf for leaf in tree_leaves(dict(self.arguments)) if isinstance(leaf, TensorRef))


@dataclass
class Trace:
    """Everything that one model did in one or two runs. ``parameters`` names buffers too, ``buffers`` says which.

    ``shapes`` are those of the outputs in evaluation mode, ``outputs`` holds the outputs of both; ``named``
    has those of a model that gives a mapping, by key.
    """

    parameters: dict[str, TensorRef] = field(default_factory=dict)
    buffers: set[str] = field(default_factory=set)
    inputs: list[TensorRef] = field(default_factory=list)
    outputs: list[TensorRef] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    named: dict[str, list[TensorRef]] = field(default_factory=dict)
    evaluation: list[Op] = field(default_factory=list)
    training: list[Op] = field(default_factory=list)
    observations: Observations = field(default_factory=Observations)
    stored: dict[Stored, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    real: bool = False

    @property
    def ops(self) -> list[Op]:
        """The operators of both runs."""
        return self.evaluation + self.training


class Recorder:
    """Gives every tensor its reference and appends operators to the current list."""

    def __init__(self, trace: Trace, run: Callable[[Any, Sequence[Any], Mapping[str, Any]], Any]) -> None:
        """``run(func, args, kwargs)`` gives what the operator gives."""
        self.trace = trace
        self.run = run
        self.ops: list[Op] = trace.evaluation
        self.refs = WeakTensorKeyDictionary()
        self.num_refs = 0
        self.call: Call | None = None
        self.path: list[str] = []
        self.dispatch = _DispatchRecorder(self)
        self.function = _FunctionRecorder(self)

    def ref(self, tensor: Tensor) -> TensorRef:
        known = self.refs.get(tensor)
        if known is None or known.shape != tuple(tensor.shape):  # in-place resizing gives a new reference
            known = TensorRef(self.num_refs, tuple(tensor.shape), tensor.dtype)
            self.num_refs += 1
            self.refs[tensor] = known
        return known

    def arguments(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments by schema name. To be read before the operator runs: ``squeeze_`` changes its input's shape."""
        arguments: dict[str, Any] = {}
        for position, argument in enumerate(func._schema.arguments):
            value = args[position] if position < len(args) else kwargs.get(argument.name, argument.default_value)
            arguments[argument.name] = self._as_data(value)
        return arguments

    def append(self, func: Any, arguments: Mapping[str, Any], outputs: Any) -> None:
        results = outputs if isinstance(outputs, list | tuple) else (outputs,)
        tensors = tuple(self.ref(result) for result in results if isinstance(result, Tensor))
        module = self.path[-1] if self.path else ""
        self.ops.append(Op(func, arguments, tensors, self.call, module, len(self.ops)))

    def _as_data(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.ref(value)
        if isinstance(value, list | tuple):
            return tuple(self._as_data(item) for item in value)
        return value


class _DispatchRecorder(TorchDispatchMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        arguments = self.recorder.arguments(func, args, kwargs)
        outputs = self.recorder.run(func, args, kwargs)
        if func.namespace != "prim":
            self.recorder.append(func, arguments, outputs)
        return outputs


class _FunctionRecorder(TorchFunctionMode):
    """Notes which torch function is running, and hands out traced shapes."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        recorder = self.recorder
        if func == _SHAPE_GETTER or func is Tensor.size:  # the getter is bound anew at each look-up
            return self._size(*args, **kwargs)
        if func is F.scaled_dot_product_attention and kwargs.get("scale") is None:
            query = recorder.ref(args[0] if args else kwargs["query"])
            size = AxisSize(query.id, len(query.shape) - 1)
            recorder.trace.observations.value_uses.append(
                ValueUse(size, "the default scale of attention", query.shape[-1])
            )
        if func is torch.rms_norm:  # it asks that these be the last sizes of its input, and is taken apart
            self._same_sizes(*args[:2])
        name = getattr(func, "__name__", str(func))
        if name in _MAKERS:
            for leaf in tree_leaves(args):
                if isinstance(leaf, TracedInt):
                    recorder.trace.observations.value_uses.append(
                        ValueUse(leaf.expression, f"given to {name}", int(leaf))
                    )
        outer, recorder.call = recorder.call, _call(name, (*args, *kwargs.values()))
        try:
            return func(*args, **kwargs)
        finally:
            recorder.call = outer

    def _same_sizes(self, tensor: Tensor, sizes: Sequence[int]) -> None:
        ref = self.recorder.ref(tensor)
        for axis, size in enumerate(sizes, start=len(ref.shape) - len(sizes)):
            comparison = SizeComparison(expression_of(size), AxisSize(ref.id, axis))
            self.recorder.trace.observations.comparisons.append(comparison)

    def _size(self, tensor: Tensor, dim: int | None = None) -> Any:
        sizes = traced_size(self.recorder.ref(tensor).id, tensor.shape)
        return sizes if dim is None else sizes[dim]


_MAKERS = frozenset(("tensor", "new_tensor", "as_tensor", "asarray", "scalar_tensor"))  # of tensors from values
_SHAPE_GETTER = Tensor.shape.__get__  # type: ignore[attr-defined]


def _call(name: str, arguments: Sequence[Any]) -> Call:
    flat: list[int] = []
    nested: list[tuple[int, ...]] = []
    for argument in arguments:
        if isinstance(argument, slice):
            flat.extend(v for v in (argument.start, argument.stop, argument.step) if isinstance(v, int))
        elif isinstance(argument, int) and not isinstance(argument, bool):
            flat.append(argument)
        elif isinstance(argument, list | tuple) and argument:
            inner = _call(name, argument)
            nested.extend(((inner.flat,) if inner.flat else ()) + inner.nested)
            if any(isinstance(item, slice) for item in argument):  # indexing: x[:, a:b] has its bounds in a tuple
                flat.extend(inner.flat)
    return Call(name, tuple(flat), tuple(nested))


@contextmanager
def module_path(recorder: Recorder, names: Mapping[int, str]) -> Iterator[None]:
    """Keep the path of the running module in ``recorder``; ``names`` maps module ids to paths."""

    def enter(module: nn.Module, _: Any) -> None:
        recorder.path.append(names.get(id(module), ""))

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        recorder.path.pop()

    recorder.path.clear()
    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
