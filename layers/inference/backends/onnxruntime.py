"""ONNX Runtime, through an ONNX file in memory. Needs the packages onnx, onnxscript and onnxruntime."""

from __future__ import annotations

import contextlib
import io
import logging
import threading
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, fx

from layers.inference.runner import BackendError, Program, Runner


def onnxruntime_program(model: fx.GraphModule, tensors: list[Tensor]) -> Program:
    """The graph as a session on as many threads as PyTorch has now."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise BackendError(f"not installed: {', '.join(missing)} (the extra 'export')")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4
    provider = "CUDAExecutionProvider" if tensors[0].is_cuda else "CPUExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise BackendError("the installed onnxruntime has no CUDA")
    try:
        data = _onnx(model, tensors)
        session = onnxruntime.InferenceSession(data, options, providers=[provider])
    except Exception as error:
        raise BackendError(
            f"ONNX Runtime failed: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
        ) from error
    run = _copying(session) if tensors[0].is_cuda else _binding(session, [x.shape for x in model(*tensors)])
    return Program("onnxruntime", run, any_batch=False)


class _Binding(threading.local):
    """What a session reads and writes, one for each thread that runs it: making one takes a tenth of a short call."""

    def __init__(self, session: Any) -> None:
        self.here = session.io_binding()


def _binding(session: Any, shapes: Sequence[torch.Size]) -> Runner:
    """Calls that read PyTorch's memory and write into it: for ResNet-20 at batch 1, 0.95 of the time through numpy."""
    bindings = _Binding(session)
    inputs = [(given.name, *_types(given.type)) for given in session.get_inputs()]
    outputs = [
        (made.name, *_types(made.type), tuple(shape)) for made, shape in zip(session.get_outputs(), shapes, strict=True)
    ]

    def run(*tensors: Tensor) -> list[Tensor]:
        binding = bindings.here
        given = [x.contiguous() for x in tensors]
        for (name, _, number), x in zip(inputs, given, strict=True):
            binding.bind_input(name, "cpu", 0, number, x.shape, x.data_ptr())
        found = [torch.empty(shape, dtype=dtype) for _, dtype, _, shape in outputs]
        for (name, _, number, shape), y in zip(outputs, found, strict=True):
            binding.bind_output(name, "cpu", 0, number, shape, y.data_ptr())
        session.run_with_iobinding(binding)
        return found

    return run


def _copying(session: Any) -> Runner:
    """Calls through numpy, which need no knowledge of streams."""
    names = [given.name for given in session.get_inputs()]

    def run(*tensors: Tensor) -> list[Tensor]:
        arrays = {name: x.contiguous().numpy(force=True) for name, x in zip(names, tensors, strict=True)}
        return [torch.from_numpy(array).to(tensors[0].device) for array in session.run(None, arrays)]

    return run


def _types(kind: str) -> tuple[torch.dtype, Any]:
    """PyTorch's and numpy's type for "tensor(float)"."""
    name = kind.removeprefix("tensor(").removesuffix(")")
    dtype: torch.dtype = getattr(torch, {"float": "float32", "double": "float64"}.get(name, name))
    return dtype, torch.empty(0, dtype=dtype).numpy().dtype


def _onnx(model: fx.GraphModule, tensors: list[Tensor]) -> bytes:
    level = logging.getLogger("torch").level
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        logging.getLogger("torch").setLevel(logging.CRITICAL)
        try:
            exported = torch.onnx.export(model, tuple(tensors), dynamo=True, verbose=False)
        finally:
            logging.getLogger("torch").setLevel(level)
    assert exported is not None
    data: bytes = exported.model_proto.SerializeToString()
    return data
