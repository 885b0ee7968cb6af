"""Compute in double precision with a model of lower precision, without a copy of the model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map, tree_map_only

_WIDE = {torch.complex64: torch.complex128, torch.complex32: torch.complex128}


def widest(dtype: torch.dtype) -> torch.dtype:
    """The double-precision type of the same kind of number; types of integers and truth values stay.

    >>> widest(torch.bfloat16), widest(torch.int32)
    (torch.float64, torch.int32)
    """
    return torch.float64 if dtype.is_floating_point else _WIDE.get(dtype, dtype)


def widened(value: Any) -> Any:
    """A tensor, or a type of numbers, in double precision; anything else as it is."""
    if isinstance(value, Tensor):
        return value.to(widest(value.dtype))
    return widest(value) if isinstance(value, torch.dtype) else value


@contextmanager
def in_double() -> Iterator[None]:
    """Inside the block every function widens what it is given: weights one at a time, while they are used."""
    with _Double():
        yield


class _Double(TorchFunctionMode):
    """(Functions and not operators: convolutions and recurrent layers compare types before operators are reached.)"""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _ABOUT:
            return func(*args, **(kwargs or {}))
        if name in _WRITING or (name.endswith("_") and not name.endswith("__")):
            # what is written to may belong to the model (a cache): it keeps its type
            target = args[0]
            fit = lambda v: v.to(target.dtype) if v.is_floating_point() and target.is_floating_point() else v  # noqa: E731
            return func(target, *tree_map_only(Tensor, fit, tuple(args[1:])), **(kwargs or {}))
        args, kwargs = tree_map(widened, (tuple(args), kwargs or {}))
        return func(*args, **kwargs)


# functions that look at a tensor and compute nothing, and those that write without saying so in their name
_ABOUT = frozenset(("__get__", "size", "dim", "numel", "stride", "is_floating_point", "is_contiguous", "__len__"))
_WRITING = frozenset(("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"))
