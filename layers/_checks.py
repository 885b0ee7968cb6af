"""Checks of what layers are given: every message names the layer, the argument, what is expected and what was given."""

from typing import Any

import torch
from torch import Tensor, fx, nn

Layer = nn.Module | str  # a layer, or the name of a function that works like one


def fail(layer: Layer, what: str) -> ValueError:
    """The error to raise, with the layer's name in front."""
    name = layer if isinstance(layer, str) else type(layer).__name__
    return ValueError(f"{name}: {what}")


def check_shape(layer: Layer, argument: str, x: Tensor, shape: tuple[Any, ...]) -> None:
    """Raise unless `x` has this shape and no axis of length 0.

    `shape` holds lengths and, for axes of any length, names; "..." in front or at the end stands for any number of
    axes. Says nothing about the stand-ins that `torch.fx` traces with.
    """
    if is_symbolic(x):
        return
    if not isinstance(x, Tensor):
        raise fail(layer, f"{argument} must be a tensor, but is a {type(x).__name__}")
    wanted = tuple(n for n in shape if n != "...")
    further = x.dim() - len(wanted)
    given = x.shape[further:] if shape[:1] == ("...",) else x.shape[: len(wanted)]
    fits = further == 0 or (further > 0 and "..." in shape)
    if not (fits and all(isinstance(n, str) or n == m for n, m in zip(wanted, given, strict=True))) or x.numel() == 0:
        expected = ", ".join(str(n) for n in shape) + ("," if len(shape) == 1 else "")
        raise fail(layer, f"{argument} must have shape ({expected}), no axis empty, but has shape {tuple(x.shape)}")


def check_positive(layer: Layer, **values: int) -> None:
    """Raise unless each of the named arguments is an integer of at least 1."""
    for argument, value in values.items():
        if not isinstance(value, int) or value < 1:
            raise fail(layer, f"{argument} must be an integer of at least 1, but is {value!r}")


def check_choice(layer: Layer, argument: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        raise fail(layer, f"{argument} must be one of {', '.join(map(repr, choices))}, but is {value!r}")


def same_padding(layer: Layer, kernel_size: int, dilation: int = 1) -> int:
    """Padding on each side that keeps the size at stride 1: `dilation * (kernel_size - 1) / 2`, for an odd kernel."""
    check_positive(layer, kernel_size=kernel_size, dilation=dilation)
    if kernel_size % 2 == 0:
        raise fail(layer, f"kernel_size must be odd so that padding can keep the size, but is {kernel_size}")
    return dilation * (kernel_size - 1) // 2


def check_lengths(layer: Layer, lengths: Tensor, batch: int, time: int) -> None:
    """Raise unless `lengths` are `batch` integers from 1 to `time`."""
    check_shape(layer, "lengths", lengths, (batch,))
    check_range(layer, "lengths", lengths, 1, time)


def check_range(layer: Layer, argument: str, values: Tensor, low: int, high: int) -> None:
    """Raise unless all integers are from `low` to `high`, where their values can be read."""
    if is_symbolic(values):
        return
    if values.is_floating_point() or values.is_complex() or values.dtype is torch.bool:
        raise fail(layer, f"{argument} must be a tensor of integers, but has dtype {values.dtype}")
    if not readable(values):
        return
    least, most = (int(v) for v in values.aminmax())
    if least < low or most > high:
        raise fail(layer, f"{argument} must be from {low} to {high}, but are from {least} to {most}")


def is_symbolic(x: object) -> bool:
    """Whether `x` is what `torch.fx` traces with: without a shape, so that nothing can be checked."""
    return isinstance(x, fx.Proxy)


def readable(tensor: Tensor) -> bool:
    """Whether the values of `tensor` can be looked at: not while a graph is made of it, nor where it has none."""
    if torch.compiler.is_compiling() or is_symbolic(tensor):
        return False
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # torch.vmap and the like
    return not (wrapped or tensor.is_meta or isinstance(tensor, torch._subclasses.FakeTensor))
