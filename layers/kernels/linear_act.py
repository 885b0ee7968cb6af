"""Matrix product, bias, residual and activation as one operator: y = activation(x weight^T + bias + residual).

On CUDA it is one kernel, so that the product never leaves the chip before it is final; elsewhere oneDNN's or BLAS's
product and an activation in place. The backward pass keeps x, weight and y.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.kernels.bn_act import ACTIVATIONS, Activation, activate, activation_backward
from layers.kernels.dispatch import uses_triton


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str) -> Tensor:
    """The specification."""
    z = F.linear(x, weight, bias)
    return activate(z if residual is None else z.add_(residual), activation)


@torch.library.custom_op("prunus::linear_act", mutates_args=())
def _linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str) -> Tensor:
    if uses_triton(x) and weight.numel():
        from layers.kernels import linear_act_triton

        return linear_act_triton.forward(x, weight, bias, residual, activation)
    return reference(x, weight, bias, residual, activation)


@_linear_act.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.bias, ctx.residual, ctx.activation = inputs
    ctx.bias, ctx.residual = ctx.bias is not None, ctx.residual is not None
    ctx.save_for_backward(x, weight, output)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, y = ctx.saved_tensors
    dz = activation_backward(dy, y, ctx.activation)
    return dz @ weight, dz.T @ x, dz.sum(0) if ctx.bias else None, dz if ctx.residual else None, None


_linear_act.register_autograd(_backward, setup_context=_setup_context)


def linear_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    activation: Activation = "relu",
) -> Tensor:
    """activation(x weight^T + bias + residual).

    Shapes: `x` (..., in), `weight` (out, in), `bias` (out,), `residual` and the result (..., out), all of one
    floating-point dtype; products are summed in float32 or better, and on CUDA float32 operands are rounded to TF32
    where `torch.backends.cuda.matmul.allow_tf32` allows it. Differentiable; silu is not where a gradient is wanted,
    since its derivative needs what is not kept: there the steps run one by one.

    Raises ValueError for other shapes and dtypes, and for an unknown activation.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"linear_act: activation is {activation!r}; give one of {', '.join(ACTIVATIONS)}")
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear_act: x {tuple(x.shape)}, weight {tuple(weight.shape)}; expected (..., in) and (out, in)"
        )
    shape = (*x.shape[:-1], weight.shape[0])
    for name, tensor, expected in (("bias", bias, shape[-1:]), ("residual", residual, shape)):
        if tensor is not None and (tensor.shape != expected or tensor.dtype != x.dtype):
            raise ValueError(
                f"linear_act: {name} is {tensor.dtype} of shape {tuple(tensor.shape)}; expected {x.dtype} of {expected}"
            )
    if weight.dtype != x.dtype or not x.is_floating_point():
        raise ValueError(f"linear_act: x is {x.dtype} and weight {weight.dtype}; expected one floating-point dtype")
    if activation == "silu" and torch.is_grad_enabled():
        z = F.linear(x, weight, bias)
        return F.silu(z if residual is None else z + residual)
    count = math.prod(shape[:-1])
    rows = None if residual is None else residual.reshape(count, shape[-1])
    return _linear_act(x.reshape(count, x.shape[-1]), weight, bias, rows, activation).view(shape)
