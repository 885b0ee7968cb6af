"""PyTorch alone: fused operators chosen one by one, run by TorchScript, or recorded as a CUDA graph."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from layers.inference.fuse import fuse_layers
from layers.inference.lower import choose_kernels
from layers.inference.runner import BackendError, Program
from layers.inference.script import NotScriptableError, script


def torch_program(model: fx.GraphModule, tensors: list[Tensor]) -> Program:
    """The graph with the fastest kernels, and without Python between its operators where that can be had."""
    model = copy.deepcopy(model)
    notes = [*fuse_layers(model), *choose_kernels(model, tensors)]
    if tensors[0].is_cuda:
        return Program("torch", _CudaGraph(model, tensors), any_batch=False, notes=(*notes, "recorded as a CUDA graph"))
    try:
        return Program("torch", script(model), notes=(*notes, "called by TorchScript"))
    except NotScriptableError as error:
        return Program("torch", model, notes=(*notes, f"called by Python ({error})"))


class _CudaGraph:
    """All kernels of a graph as one launch; its inputs and outputs lie where they lay when it was recorded."""

    def __init__(self, model: fx.GraphModule, tensors: Sequence[Tensor]) -> None:
        self._inputs = [tensor.clone() for tensor in tensors]
        self._graph = torch.cuda.CUDAGraph()
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):  # lets cuDNN and the allocator settle
                    model(*self._inputs)
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(self._graph):
                self._outputs = model(*self._inputs)
        except RuntimeError as error:
            raise BackendError(f"no CUDA graph of it: {str(error).splitlines()[0]}") from error

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        for inside, given in zip(self._inputs, tensors, strict=True):
            inside.copy_(given)
        self._graph.replay()
        return [output.clone() for output in self._outputs]
