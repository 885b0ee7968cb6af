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


@functools.cache
def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1" and os.environ.get("PRUNUS_KERNELS") == "triton"


def uses_triton(x: Tensor) -> bool:
    """Whether kernels on tensors like `x` are those in Triton; interpreted ones with PRUNUS_KERNELS=triton."""
    return (x.is_cuda or _interpreted()) and x.dtype in _DTYPES and x.numel() > 0 and has_triton()


def fuses(x: Tensor) -> bool:
    """Whether layers compute several steps on `x` by one operator of `layers.kernels`.

    Where kernels are in Triton: there the steps are passes over memory, of which one operator saves most. On CPUs
    PyTorch's operators in turn are as fast, and a compiler fuses the steps itself, with what is around them.
    """
    return not torch.compiler.is_compiling() and uses_triton(x)
