"""OpenVINO in float32. Needs the package openvino."""

from __future__ import annotations

import warnings
from importlib.util import find_spec

import torch
from torch import Tensor, fx

from layers.inference.runner import BackendError, Program


def openvino_program(model: fx.GraphModule, tensors: list[Tensor]) -> Program:
    """The graph as an inference request on as many threads as PyTorch has now."""
    if find_spec("openvino") is None:
        raise BackendError("not installed: openvino")
    if tensors[0].is_cuda:
        raise BackendError("OpenVINO does not run on CUDA")
    import openvino

    config = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(model, tuple(tensors), strict=False)
            converted = openvino.convert_model(program)
        request = openvino.compile_model(converted, "CPU", config).create_infer_request()
    except Exception as error:
        raise BackendError(
            f"OpenVINO failed: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
        ) from error
    count = len(request.model_outputs)

    def run(*tensors: Tensor) -> list[Tensor]:
        request.infer([x.contiguous().numpy() for x in tensors], share_inputs=True)
        return [torch.from_numpy(request.get_output_tensor(i).data.copy()) for i in range(count)]

    return Program("openvino", run, any_batch=False)
