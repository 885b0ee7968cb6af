"""PyTorch alone: fused operators chosen one by one, run by TorchScript, or recorded as a CUDA graph."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from layers.inference.examples import batched_inputs
from layers.inference.fuse import fuse_layers
from layers.inference.lower import choose_kernels
from layers.inference.parts import InParts, batch_size, best_size, first_examples
from layers.inference.runner import BackendError, Program, Runner
from layers.inference.script import NotScriptableError, script


def torch_program(model: fx.GraphModule, tensors: list[Tensor]) -> Program:
    """The graph with the fastest kernels, and without Python between its operators where that can be had.

    On CPUs a batch runs in parts where its examples do not depend on each other and that is faster.
    """
    model = copy.deepcopy(model)
    batched = batched_inputs(model)
    notes = fuse_layers(model)
    if tensors[0].is_cuda:
        notes += choose_kernels(model, tensors)
        return Program("torch", _CudaGraph(model, tensors), any_batch=False, notes=(*notes, "recorded as a CUDA graph"))
    if batched is None:
        notes += choose_kernels(model, tensors)
        run, how = _without_python(model)
        return Program("torch", run, notes=(*notes, how))
    usual = copy.deepcopy(model)
    choose_kernels(usual, tensors, timed=False)
    size = best_size(_without_python(usual)[0], tensors, batched)
    part = first_examples(tensors, batched, size)
    notes += choose_kernels(model, part)
    run, how = _without_python(model)
    whole = size == batch_size(tensors, batched)
    notes += [how] if whole else [how, f"a batch in parts of {size}"]
    return Program("torch", run if whole else InParts(run, batched, size), notes=tuple(notes))


def _without_python(model: fx.GraphModule) -> tuple[Runner, str]:
    """The graph as a function, and who calls its operators."""
    try:
        return script(model), "called by TorchScript"
    except NotScriptableError as error:
        return model, f"called by Python ({error})"


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
