"""Batch norm, activation and convolution as one operator that keeps only the input of the batch norm.

    out = conv(activation(batch_norm(x)))

Written out, autograd keeps x (for batch norm) and the activation's result (for the convolution): twice the memory. Here
the result is computed again from x and the statistics, and in the backward pass it serves as the convolution's input
and as the mask of the activation. Bulo, Porzi, Kontschieder: In-Place Activated BatchNorm (2018), section 3, keeps one
tensor too, but needs an invertible activation.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from layers.kernels import bn_act as norm
from layers.kernels.conv_bn_act import ConvArguments
from layers.kernels.dispatch import uses_triton

aten = torch.ops.aten


@torch.library.custom_op("prunus::bn_act_conv", mutates_args=())
def _bn_act_conv(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    activation: str,
    eps: float,
    group: str,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Result of the convolution, and the statistics of x as from prunus::bn_act."""
    y, *statistics = torch.ops.prunus.bn_act(x, None, weight, bias, activation, eps, group)
    out = torch.conv2d(y, conv_weight, conv_bias, stride, padding, dilation, groups)
    return (out, *statistics)


@_bn_act_conv.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    activation: str,
    eps: float,
    group: str,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, inverse_std, variance = (x.new_empty(x.shape[1], dtype=norm.statistics_dtype(x)) for _ in range(3))
    return torch.conv2d(x, conv_weight, conv_bias, stride, padding, dilation, groups), mean, inverse_std, variance


@torch.library.custom_op("prunus::bn_act_conv_backward", mutates_args=())
def _bn_act_conv_backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    inverse_std: Tensor,
    conv_weight: Tensor,
    activation: str,
    group: str,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients for x, weight, bias, conv_weight and conv_bias."""
    y: Tensor | None = norm.reapplied(x, weight, bias, mean, inverse_std, activation)
    dy, dconv_weight, dconv_bias = aten.convolution_backward(
        dout, y, conv_weight, [conv_weight.shape[0]], stride, padding, dilation, False, [0, 0], groups, [True] * 3
    )
    if activation == "silu" or uses_triton(x):  # needs z, or has z in registers anyway
        y = None
    backward = torch.ops.prunus.bn_act_backward
    dx, dweight, dbias, _ = backward(dy, x, y, weight, bias, mean, inverse_std, activation, group)
    if dconv_weight.stride() != conv_weight.stride():  # that of y, for some libraries
        dconv_weight = torch.empty_like(conv_weight).copy_(dconv_weight)
    return dx, dweight, dbias, dconv_weight, dconv_bias


@_bn_act_conv_backward.register_fake
def _(
    dout: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    inverse_std: Tensor,
    conv_weight: Tensor,
    activation: str,
    group: str,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dconv_bias = conv_weight.new_empty(conv_weight.shape[0])
    same = torch.empty_like
    return same(x), same(mean), same(mean), same(conv_weight), dconv_bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, conv_weight, conv_bias, ctx.activation, _, ctx.group, *ctx.convolution = inputs
    _, mean, inverse_std, _ = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.has_bias = conv_bias is not None
    ctx.save_for_backward(x, weight, bias, mean, inverse_std, conv_weight)


def _backward(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 12
    weight, bias = ctx.saved_tensors[1:3]
    gradients = _bn_act_conv_backward(dout, *ctx.saved_tensors, ctx.activation, ctx.group, *ctx.convolution)
    present = (True, weight is not None, bias is not None, True, ctx.has_bias)
    return (*[g if p else None for g, p in zip(gradients, present, strict=True)], *[None] * 7)


_bn_act_conv.register_autograd(_backward, setup_context=_setup_context)


def bn_act_conv(
    x: Tensor,
    conv: ConvArguments,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    activation: norm.Activation = "relu",
    eps: float = 1e-5,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """conv2d(activation(batch_norm(x))) with the batch's own statistics, and these: (out, mean, unbiased variance).

    `x` has shape (batch, in, height, width), `weight` and `bias` (in,); the rest as for `bn_act`. Of x's size, the
    backward pass keeps x alone. `conv.padding` must be numbers. Raises ValueError as `bn_act` does.
    """
    norm.check(x, None, {"weight": weight, "bias": bias}, activation)
    if x.dim() != 4 or conv.weight.dim() != 4 or conv.weight.shape[1] * conv.groups != x.shape[1]:
        raise ValueError(
            f"bn_act_conv: x of shape {tuple(x.shape)} and conv.weight of shape {tuple(conv.weight.shape)}; expected "
            f"(batch, in, height, width) and (out, in / groups, height, width) with {conv.groups} groups"
        )
    if isinstance(conv.padding, str):
        raise ValueError(f"bn_act_conv: padding is {conv.padding!r}; give numbers")
    if group is None and x.numel() <= x.shape[1]:
        raise ValueError(f"bn_act_conv: x has shape {tuple(x.shape)}; expected more than 1 value per channel")
    x = x.contiguous(memory_format=norm.dense_format(x))
    dtype = norm.statistics_dtype(x)
    weight, bias = None if weight is None else weight.to(dtype), None if bias is None else bias.to(dtype)
    stride, padding, dilation = (pair(value) for value in (conv.stride, conv.padding, conv.dilation))
    name = "" if group is None else group.group_name
    arguments = (activation, eps, name, stride, padding, dilation, conv.groups)
    out, mean, _, variance = _bn_act_conv(x, weight, bias, conv.weight, conv.bias, *arguments)
    return out, mean, variance


def pair(value: int | tuple[int, ...]) -> list[int]:
    """One number for each axis of an image."""
    return [value, value] if isinstance(value, int) else list(value)
