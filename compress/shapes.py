"""Shapes of what operators give, for those whose kernels on the meta device are compositions of many others.

PyTorch knows the result of most operators on tensors without data within microseconds. For others it runs a reference
implementation in Python that takes about a millisecond: 53 times for the batch norms of a ResNet-50, in either mode.
What these give is known beforehand; where a call is unusual in any way, PyTorch is asked.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


class QuickShapes:
    """Calls operators on meta tensors. An instance remembers which type of number operators give for which types."""

    def __init__(self) -> None:
        self._dtypes: dict[Any, torch.dtype] = {}

    def __call__(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What ``func(*args, **kwargs)`` gives, all tensors being on the meta device."""
        known = _KNOWN.get(func)
        if known is not None and not kwargs:
            result = known(*args)
        elif torch.Tag.pointwise in func.tags and not kwargs:
            result = self._pointwise(func, args)
        else:
            result = None
        return func(*args, **kwargs) if result is None else result

    def _pointwise(self, func: Any, args: Sequence[Any]) -> Any:
        tensors = [argument for argument in args if isinstance(argument, Tensor)]
        shape = tensors[0].shape if tensors else None
        if any(t.shape != shape for t in tensors):
            shape = torch.broadcast_shapes(*(t.shape for t in tensors))  # raises what the operator would raise
        like = next((t for t in tensors if t.shape == shape), None)
        if like is None or len(func._schema.returns) != 1 or not all(t.is_meta for t in tensors):
            return None
        if func._schema.is_mutable:
            return args[0] if like is args[0] else None
        # a tensor without axes weighs less than others in deciding the type
        key = (func, *((a.dtype, a.dim() > 0) if isinstance(a, Tensor) else type(a) for a in args))
        if key not in self._dtypes:
            result = func(*args)
            self._dtypes[key] = result.dtype
            return result
        return torch.empty_like(like, dtype=self._dtypes[key])


def _like_first(value: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(value)


def _first(value: Tensor, *_: Any) -> Tensor:
    return value


def _softmax(value: Tensor, _: int, as_other: Any = None) -> Tensor | None:
    return None if as_other else torch.empty_like(value, memory_format=torch.contiguous_format)


def _batch_norm(value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor] | None:
    *statistics, training, _, _ = rest
    if value.dim() < 2 or any(t is not None and t.shape != value.shape[1:2] for t in statistics):
        return None
    saved = value.new_empty(value.shape[1] if training else 0)
    return torch.empty_like(value), saved, torch.empty_like(saved)


def _layer_norm(value: Tensor, normalised: Sequence[int], *rest: Any) -> tuple[Tensor, Tensor, Tensor] | None:
    outer = value.dim() - len(normalised)
    if any(
        tuple(part) != tuple(normalised)
        for part in (value.shape[outer:], *(t.shape for t in rest[:2] if t is not None))
    ):
        return None
    saved = value.new_empty((*value.shape[:outer], *[1] * len(normalised)))
    return torch.empty_like(value, memory_format=torch.contiguous_format), saved, torch.empty_like(saved)


def _addmm(bias: Tensor, left: Tensor, right: Tensor) -> Tensor | None:
    fits = left.dim() == right.dim() == 2 and left.shape[1] == right.shape[0] and bias.shape == right.shape[1:]
    return left.new_empty((left.shape[0], right.shape[1])) if fits and left.dtype == right.dtype else None


_KNOWN: Mapping[Any, Callable[..., Any]] = {
    aten.native_batch_norm.default: _batch_norm,
    aten.native_layer_norm.default: _layer_norm,
    aten.addmm.default: _addmm,
    aten.hardswish.default: _like_first,
    aten.hardswish_.default: _first,
    aten.roll.default: _like_first,
    **dict.fromkeys((aten._softmax.default, aten._log_softmax.default, aten._safe_softmax.default), _softmax),
}
