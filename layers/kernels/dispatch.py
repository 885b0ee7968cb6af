"""Where a kernel runs: Triton on CUDA where it is installed, and plain PyTorch elsewhere.

Triton is imported when the first kernel needs it, not before: it is not there on every platform, and it reads
TRITON_INTERPRET, which runs kernels in Python on CPU tensors, when kernels are decorated.
"""

import functools
import importlib.util
import os

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # statistics and sums are in float32


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def uses_triton(x: Tensor) -> bool:
    """Whether kernels on tensors like `x` are those in Triton; interpreted ones with PRUNUS_KERNELS=triton."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and os.environ.get("PRUNUS_KERNELS") == "triton"
    return x.dtype in _DTYPES and x.numel() > 0 and (x.is_cuda or interpreted) and has_triton()
