"""The gates of a highway block as one operator: y = f(h) sigmoid(t) + x (1 - sigmoid(t)), or + x sigmoid(c).

Srivastava, Greff, Schmidhuber: Highway Networks (2015), equations 2 and 3, after the matrix products or convolutions h,
t and c of x. Where it wins: on CUDA, where the steps are three to five passes over memory forward and some ten
backward, and this is one each. There is no operator for the gates of an LSTM: cuDNN runs whole sequences in one call,
and PyTorch's own cells have fused kernels.
"""

from typing import Any

import torch
from torch import Tensor

from layers.kernels.bn_act import ACTIVATIONS, Activation, activate, activation_backward, dense_format
from layers.kernels.dispatch import uses_triton


def forward_reference(h: Tensor, t: Tensor, x: Tensor, c: Tensor | None, activation: str) -> Tensor:
    """The specification."""
    y, gate = activate(h.clone(), activation), t.sigmoid()
    return torch.lerp(x, y, gate) if c is None else y * gate + x * c.sigmoid()


def backward_reference(
    dy: Tensor, h: Tensor, t: Tensor, x: Tensor, c: Tensor | None, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients for h, t, x and c; the last is empty where there is no c."""
    y, gate = activate(h.clone(), activation), t.sigmoid()
    dh = activation_backward(dy * gate, h, activation)
    if c is None:
        return dh, dy * (y - x) * gate * (1 - gate), dy * (1 - gate), x.new_empty(0)
    carry = c.sigmoid()
    return dh, dy * y * gate * (1 - gate), dy * carry, dy * x * carry * (1 - carry)


@torch.library.custom_op("prunus::highway", mutates_args=())
def _highway(h: Tensor, t: Tensor, x: Tensor, c: Tensor | None, activation: str) -> Tensor:
    if uses_triton(x):
        from layers.kernels import highway_triton

        return highway_triton.forward(h, t, x, c, activation)
    return forward_reference(h, t, x, c, activation)


@_highway.register_fake
def _(h: Tensor, t: Tensor, x: Tensor, c: Tensor | None, activation: str) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("prunus::highway_backward", mutates_args=())
def _highway_backward(
    dy: Tensor, h: Tensor, t: Tensor, x: Tensor, c: Tensor | None, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dy = dy.contiguous(memory_format=dense_format(x))
    if uses_triton(x):
        from layers.kernels import highway_triton

        return highway_triton.backward(dy, h, t, x, c, activation)
    return backward_reference(dy, h, t, x, c, activation)


@_highway_backward.register_fake
def _(
    dy: Tensor, h: Tensor, t: Tensor, x: Tensor, c: Tensor | None, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    same = torch.empty_like
    return same(x), same(x), same(x), x.new_empty(0) if c is None else same(x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    h, t, x, c = ctx.saved_tensors
    backward = backward_reference if torch.is_grad_enabled() else _highway_backward  # for a second derivative
    dh, dt, dx, dc = backward(dy, h, t, x, c, ctx.activation)
    return dh, dt, dx, None if c is None else dc, None


_highway.register_autograd(_backward, setup_context=_setup_context)


def highway_gates(
    h: Tensor, t: Tensor, x: Tensor, c: Tensor | None = None, *, activation: Activation = "relu"
) -> Tensor:
    """activation(h) sigmoid(t) + x sigmoid(c); without c the carry gate is 1 - sigmoid(t).

    All of one shape and floating-point dtype, computed in float32 or better. Differentiable in all.

    Raises ValueError for shapes or dtypes that differ, and for an unknown activation.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"highway_gates: activation is {activation!r}; give one of {', '.join(ACTIVATIONS)}")
    for name, tensor in (("h", h), ("t", t), ("c", c)):
        if tensor is not None and (tensor.shape, tensor.dtype) != (x.shape, x.dtype):
            raise ValueError(
                f"highway_gates: {name} is {tensor.dtype} of shape {tuple(tensor.shape)}; "
                f"expected {x.dtype} of shape {tuple(x.shape)}, as x"
            )
    form = dense_format(x)
    h, t, x = (each.contiguous(memory_format=form) for each in (h, t, x))
    return _highway(h, t, x, None if c is None else c.contiguous(memory_format=form), activation)
