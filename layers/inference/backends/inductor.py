"""torch.compile with weights frozen into the code. Needs a C++ compiler (on CUDA: Triton)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx

from layers.inference.runner import BackendError, Program


def inductor_program(model: fx.GraphModule, tensors: list[Tensor]) -> Program:
    """The graph as `torch.compile` makes it with freezing; it compiles again for other batch sizes."""
    run = torch.compile(copy.deepcopy(model).eval(), options={"freezing": True}, dynamic=False)
    try:
        run(*tensors)
    except Exception as error:
        raise BackendError(f"torch.compile failed: {str(error).strip().splitlines()[0]}") from error
    return Program("inductor", run)
