"""ONNX Runtime, through an ONNX file in memory. Needs the packages onnx, onnxscript and onnxruntime."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from importlib.util import find_spec

import torch
from torch import Tensor, fx

from layers.inference.runner import BackendError, Program


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
    names = [given.name for given in session.get_inputs()]

    def run(*tensors: Tensor) -> list[Tensor]:
        arrays = {name: x.contiguous().numpy(force=True) for name, x in zip(names, tensors, strict=True)}
        return [torch.from_numpy(array).to(tensors[0].device) for array in session.run(None, arrays)]

    return Program("onnxruntime", run, any_batch=False)


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
