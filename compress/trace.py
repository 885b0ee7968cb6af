"""Run a model once without arithmetic and write down every ATen operator that it calls.

The model runs on tensors without data in evaluation and in training mode: auxiliary heads and batch
statistics exist in training only. Models whose control flow depends on data are run once on real tensors instead.
Nothing of the model changes: mode, buffers, attributes, caches and random states are as before.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map_only

from compress.errors import TraceError, first_line
from compress.provenance import observing
from compress.recorder import Call, Op, Recorder, TensorRef, Trace, module_path
from compress.sandbox import on_meta, substitute, untouched, visible_operators
from compress.stand_ins import STAND_INS, RealTensors, StandIns

ExampleInputs = Tensor | tuple[Any, ...] | dict[str, Any]

IN_MODULE = "in module "  # begins the note that says where a run failed


def record(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    training: bool = True,
    stand_ins: Sequence[Callable[[], StandIns]] = STAND_INS,
) -> Trace:
    """Trace ``model`` on ``example_inputs`` in evaluation mode, and in training mode unless ``training`` is False.

    ``stand_ins`` are what it runs on, the first kind with which it does.

    Raises:
        TraceError: the model does not run on its example inputs, was scripted, or has no parameters.
    """
    args, kwargs = as_arguments(example_inputs)
    _check_model(model)
    failures: list[Exception] = []
    for make in stand_ins:
        try:
            trace = _record(model, args, kwargs, training=training, stand_ins=make())
        except Exception as problem:  # noqa: BLE001  see the list of stand-ins; the last error is the user's
            failures.append(problem)
            continue
        if trace.real and failures:
            trace.notes.append(f"traced with a real forward pass: {type(failures[-1]).__name__}")
        return trace
    error = failures[-1]
    where = "".join(f" {note}" for note in getattr(error, "__notes__", []) if note.startswith(IN_MODULE))
    raise TraceError(
        f"the model does not run on its example inputs ({describe(example_inputs)}){where}: {first_line(error)}; "
        "pass inputs of the shape that the model is used with"
    ) from error


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


def _check_model(model: nn.Module) -> None:
    modules = dict(model.named_modules())
    names = [name for name, _ in model.named_parameters()]
    if not names:
        raise TraceError(
            "the model has no parameters (is it quantised?): there is nothing to compress; pass it in floating point"
        )
    if all(isinstance(modules[name.rpartition(".")[0]], torch.jit.ScriptModule) for name in names):
        where = next(name for name, module in modules.items() if isinstance(module, torch.jit.ScriptModule))
        what = f"module {where}" if where else "the model"
        raise TraceError(f"{what} is a TorchScript module, whose sizes are fixed: pass the original nn.Module")
    if lazy := next((name for name, p in model.named_parameters() if is_lazy(p)), None):
        raise TraceError(f"parameter {lazy} has no shape yet (a lazy module): run the model once on its inputs")


def _record(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, training: bool, stand_ins: StandIns
) -> Trace:
    trace = Trace(real=isinstance(stand_ins, RealTensors))
    # in inference mode operators would not be seen one by one
    with torch.inference_mode(False), untouched(model), visible_operators(), ExitStack() as stack:
        recorder = Recorder(trace, stand_ins.run)
        trace.observations = stack.enter_context(observing())
        if on_meta(model):  # a model without data takes inputs without data
            args, kwargs = tree_map_only(Tensor, lambda t: t.to("meta"), (args, kwargs))
        substitute(model, recorder, stand_ins.of)
        args, kwargs = tree_map_only(Tensor, stand_ins.of, (args, kwargs))
        stack.enter_context(stand_ins.context())
        modes = (False, True) if training else (False,)
        for train in modes:
            recorder.ops = trace.training if train else trace.evaluation
            try:
                _run(model, recorder, args, kwargs, train=train)
            except Exception as error:
                if not train or not trace.real:
                    raise
                trace.notes.append(f"training mode was not traced: {str(error).splitlines()[0]}")
                trace.training.clear()
    return trace


def _run(model: nn.Module, recorder: "Recorder", args: tuple[Any, ...], kwargs: dict[str, Any], *, train: bool) -> None:
    model.train(train)
    if train:  # batch norm refuses a single value a channel, which a batch of one with 1 x 1 maps would give
        args, kwargs = _doubled(args), _doubled(kwargs)
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor):
            recorder.trace.inputs.append(recorder.ref(leaf))
    names = {id(module): name for name, module in model.named_modules()}
    with torch.no_grad(), module_path(recorder, names), recorder.dispatch, recorder.function:
        try:
            outputs = model(*args, **kwargs)
        except Exception as error:
            if recorder.path and recorder.path[-1]:
                error.add_note(IN_MODULE + recorder.path[-1])
            raise
    tensors = output_tensors(outputs)
    recorder.trace.outputs.extend(recorder.ref(tensor) for tensor in tensors)
    if not train:
        recorder.trace.shapes = [tuple(tensor.shape) for tensor in tensors]
        named = outputs if isinstance(outputs, Mapping) else {}
        recorder.trace.named = {str(k): [recorder.ref(t) for t in output_tensors(v)] for k, v in named.items()}


def output_tensors(outputs: Any) -> list[Tensor]:
    """All tensors in what a model returned, in order; some libraries return dataclasses that are mappings."""
    leaves = tree_leaves(dict(outputs) if isinstance(outputs, Mapping) else outputs)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _doubled(inputs: Any) -> Any:
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim() > 0]
    batch = tensors[0].shape[0] if tensors else 0
    twice = lambda t: torch.cat([t, t]) if t.dim() > 0 and t.shape[0] == batch else t  # noqa: E731
    return tree_map_only(Tensor, twice, inputs)


__all__ = ["Call", "ExampleInputs", "Op", "TensorRef", "Trace", "as_arguments", "describe", "record", "untouched"]
