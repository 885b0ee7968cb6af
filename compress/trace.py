"""Run a model once without arithmetic and write down every ATen operator that it calls.

The model runs on fake tensors (shapes without data) in evaluation and in training mode: auxiliary heads and batch
statistics exist in training only. Models whose control flow depends on data are run once on real tensors instead.
Nothing of the model changes: mode, buffers, attributes, caches and random states are as before.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from compress.errors import TraceError
from compress.provenance import Observations, Stored, observing, traced_integers, traced_size

ExampleInputs = Tensor | tuple[Any, ...] | dict[str, Any]


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

    @cached_property
    def tensors(self) -> tuple[TensorRef, ...]:
        """Every tensor among the arguments, in order."""
        return tuple(leaf for leaf in tree_leaves(dict(self.arguments)) if isinstance(leaf, TensorRef))


@dataclass
class Trace:
    """Everything that one model did in one or two runs. ``parameters`` names buffers too, ``buffers`` says which."""

    parameters: dict[str, TensorRef] = field(default_factory=dict)
    buffers: set[str] = field(default_factory=set)
    inputs: list[TensorRef] = field(default_factory=list)
    outputs: list[TensorRef] = field(default_factory=list)
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


def record(model: nn.Module, example_inputs: ExampleInputs, *, training: bool = True) -> Trace:
    """Trace ``model`` on ``example_inputs`` in evaluation mode, and in training mode unless ``training`` is False.

    Raises:
        TraceError: the model does not run on its example inputs, was scripted, or has no parameters.
    """
    args, kwargs = as_arguments(example_inputs)
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError("the model is a TorchScript module, whose operators are hidden: pass the original nn.Module")
    if next(model.parameters(), None) is None:
        raise TraceError(
            "the model has no parameters (is it quantised, or built lazily?): there is nothing to compress"
        )
    try:
        return _record(model, args, kwargs, training=training, real=False)
    except Exception as fake_error:  # noqa: BLE001  data-dependent control flow, or an operator without a fake kernel
        try:
            trace = _record(model, args, kwargs, training=training, real=True)
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise TraceError(
                f"the model does not run on its example inputs ({describe(example_inputs)}): {reason[0]}; "
                "pass inputs of the shape that the model is used with"
            ) from error
        trace.notes.append(f"traced with a real forward pass: {type(fake_error).__name__}")
        return trace


def as_arguments(example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments for ``model(...)``.

    Raises:
        TraceError: the inputs are neither a tensor, nor a tuple of arguments, nor a dict of keyword arguments.
    """
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, tuple):
        return example_inputs, {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    raise TraceError(
        f"example_inputs is a {type(example_inputs).__name__}: pass a tensor, a tuple of arguments, "
        "or a dict of keyword arguments (a list that is one argument goes inside a tuple)"
    )


def describe(example_inputs: Any) -> str:
    """The shapes of the tensors in ``example_inputs``, for messages."""
    shapes = [str(tuple(leaf.shape)) for leaf in tree_leaves(example_inputs) if isinstance(leaf, Tensor)]
    return ", ".join(shapes) or "no tensors"


def _record(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, training: bool, real: bool) -> Trace:
    trace = Trace(real=real)
    recorder = _Recorder(trace)
    fake_mode = None if real else FakeTensorMode(allow_non_fake_inputs=True)
    with untouched(model), ExitStack() as stack:
        trace.observations = stack.enter_context(observing())
        _substitute(model, recorder, fake_mode)
        if fake_mode is not None:
            args, kwargs = tree_map_only(Tensor, lambda t: fake_mode.from_tensor(t, static_shapes=True), (args, kwargs))
            stack.enter_context(fake_mode)
        modes = (False, True) if training else (False,)
        for train in modes:
            recorder.ops = trace.training if train else trace.evaluation
            try:
                _run(model, recorder, args, kwargs, train=train)
            except Exception as error:
                if not train or (not real and _is_data_dependent(error)):
                    raise
                trace.notes.append(f"training mode was not traced: {str(error).splitlines()[0]}")
                trace.training.clear()
    return trace


def _run(
    model: nn.Module, recorder: "_Recorder", args: tuple[Any, ...], kwargs: dict[str, Any], *, train: bool
) -> None:
    model.train(train)
    if train:  # batch norm refuses a single value a channel, which a batch of one with 1 x 1 maps would give
        args, kwargs = _doubled(args), _doubled(kwargs)
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor):
            recorder.trace.inputs.append(recorder.ref(leaf))
    names = {id(module): name for name, module in model.named_modules()}
    with torch.no_grad(), _module_path(recorder, names), recorder.dispatch, recorder.function:
        outputs = model(*args, **kwargs)
    leaves = tree_leaves(dict(outputs) if isinstance(outputs, Mapping) else outputs)
    recorder.trace.outputs.extend(recorder.ref(leaf) for leaf in leaves if isinstance(leaf, Tensor))


def _doubled(inputs: Any) -> Any:
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim() > 0]
    batch = tensors[0].shape[0] if tensors else 0
    twice = lambda t: torch.cat([t, t]) if t.dim() > 0 and t.shape[0] == batch else t  # noqa: E731
    return tree_map_only(Tensor, twice, inputs)


def _is_data_dependent(error: Exception) -> bool:
    return type(error).__module__.startswith("torch._subclasses")


class _Recorder:
    """Gives every tensor its reference and appends operators to the current list."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
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
    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        arguments = self.recorder.arguments(func, args, kwargs)
        outputs = func(*args, **kwargs)
        if func.namespace != "prim":
            self.recorder.append(func, arguments, outputs)
        return outputs


class _FunctionRecorder(TorchFunctionMode):
    """Notes which torch function is running, and hands out traced shapes."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        recorder = self.recorder
        if func == _SHAPE_GETTER or func is Tensor.size:  # the getter is bound anew at each look-up
            return self._size(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        outer, recorder.call = recorder.call, _call(name, (*args, *kwargs.values()))
        try:
            return func(*args, **kwargs)
        finally:
            recorder.call = outer

    def _size(self, tensor: Tensor, dim: int | None = None) -> Any:
        sizes = traced_size(self.recorder.ref(tensor).id, tensor.shape)
        return sizes if dim is None else sizes[dim]


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
def untouched(model: nn.Module) -> Iterator[None]:
    """Whatever happens inside, the model and the random states are as before afterwards."""
    modules = list(model.modules())
    attributes = [dict(vars(module)) for module in modules]
    registered = [(dict(module._parameters), dict(module._buffers)) for module in modules]
    data = {id(b): (b, b.detach().clone()) for b in model.buffers() if not b.is_meta}
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002  (the global state is what is kept)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda and p.device.index is not None})
    with torch.random.fork_rng(devices=devices), _transparent_functional():
        torch.backends.mha.set_fastpath_enabled(False)  # the fused path hides the operators of attention
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
            for module, before, (parameters, buffers) in zip(modules, attributes, registered, strict=True):
                vars(module).clear()
                vars(module).update(before)
                _refill(module._parameters, parameters)
                _refill(module._buffers, buffers)
            with torch.no_grad():
                for buffer, value in data.values():
                    if buffer.numel() and not torch.equal(buffer, value):
                        buffer.copy_(value)


def _refill(slots: dict[str, Any], values: dict[str, Any]) -> None:
    slots.clear()
    slots.update(values)


@contextmanager
def _transparent_functional() -> Iterator[None]:
    """Let Python functions of ``torch.nn.functional`` run their bodies under the function mode.

    They ask ``has_torch_function`` first and would otherwise reach the mode as one opaque call, which hides the
    integers that, say, ``multi_head_attention_forward`` reshapes with.
    """
    names = [name for name in vars(F) if name.startswith("has_torch_function")]
    before = {name: getattr(F, name) for name in names}
    for name in names:
        setattr(F, name, lambda *_: False)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(F, name, function)


def _substitute(model: nn.Module, recorder: _Recorder, fake_mode: FakeTensorMode | None) -> None:
    """Put fake tensors and traced integers in the place of the model's own, and name every tensor once."""
    stand_ins: dict[int, Tensor] = {}
    for prefix, module in model.named_modules():
        for slots in (module._parameters, module._buffers):
            for slot, tensor in slots.items():
                if tensor is None:
                    continue
                if id(tensor) not in stand_ins:
                    fake = tensor if fake_mode is None else fake_mode.from_tensor(tensor, static_shapes=True)
                    stand_ins[id(tensor)] = fake
                    name = f"{prefix}.{slot}" if prefix else slot
                    recorder.trace.parameters[name] = recorder.ref(fake)
                    if slots is module._buffers:
                        recorder.trace.buffers.add(name)
                slots[slot] = stand_ins[id(tensor)]
    for prefix, module in model.named_modules():
        for name, value in list(vars(module).items()):
            if name in _MODULE_INTERNALS:
                continue
            if type(value) in (int, list, tuple, dict):
                vars(module)[name] = _stand_in(traced_integers(value, Stored(prefix, name)), stand_ins)
                recorder.trace.stored.update(_stored_values(value, Stored(prefix, name)))


_MODULE_INTERNALS = frozenset(vars(nn.Module())) | {"training"}


def _stand_in(value: Any, stand_ins: Mapping[int, Tensor]) -> Any:
    if isinstance(value, Tensor):  # recurrent layers keep their parameters in a list as well
        return stand_ins.get(id(value), value)
    if type(value) in (list, tuple):
        return type(value)(_stand_in(item, stand_ins) for item in value)
    return value


def _stored_values(value: Any, leaf: Stored) -> dict[Stored, int]:
    if type(value) is int:
        return {leaf: value}
    items = enumerate(value) if type(value) in (list, tuple) else value.items() if type(value) is dict else ()
    found: dict[Stored, int] = {}
    for key, item in items:
        if isinstance(key, int | str):
            found.update(_stored_values(item, Stored(leaf.module, leaf.name, (*leaf.path, key))))
    return found


@contextmanager
def _module_path(recorder: _Recorder, names: Mapping[int, str]) -> Iterator[None]:
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
