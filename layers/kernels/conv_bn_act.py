"""Convolution, batch norm, residual and activation: what the blocks of `layers` compute.

The steps below in plain PyTorch are the specification, and what runs on CPUs; in training on CUDA all that follows the
convolution is one operator (`layers.kernels.bn_act`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from layers.kernels import bn_act as fused
from layers.kernels.dispatch import fuses

Activation = Callable[[Tensor], Tensor]

# By which name the operator knows an activation, given as a function or as the class of a module.
_NAMES: dict[Any, fused.Activation] = {
    **dict.fromkeys((None, nn.Identity), "none"),
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, nn.ReLU), "relu"),
    **dict.fromkeys((F.relu6, nn.ReLU6), "relu6"),
    **dict.fromkeys((F.silu, nn.SiLU), "silu"),
}


@dataclass(frozen=True)
class ConvArguments:
    """What `torch.nn.functional.conv2d` takes besides its input.

    Shapes: `weight` (out, in / groups, height, width), `bias` (out,).
    """

    weight: Tensor
    bias: Tensor | None = None
    stride: int | tuple[int, ...] = 1
    padding: int | str | tuple[int, ...] = 0
    dilation: int | tuple[int, ...] = 1
    groups: int = 1


@dataclass(frozen=True)
class NormArguments:
    """What `torch.nn.functional.batch_norm` takes besides its input; all tensors have shape (out,).

    In training the batch's own statistics normalise, and the running ones, if any, move towards them by `momentum`.
    With a `group` the batch is that of all its ranks.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5
    group: dist.ProcessGroup | None = None


def conv_bn_act(
    x: Tensor, conv: ConvArguments, norm: NormArguments | None = None, activation: Activation | None = None
) -> Tensor:
    """`activation(batch_norm(conv2d(x)))`, without the steps that are None.

    `x` has shape (batch, in, height, width), the result (batch, out, height', width'). Batch norm is that of Ioffe and
    Szegedy (2015), algorithms 1 and 2. Differentiable in `x` and in every parameter.
    """
    y = F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    if norm is not None:
        return batch_norm_act(y, norm, activation)
    return y if activation is None else activation(y)


def batch_norm_act(
    x: Tensor, norm: NormArguments, activation: Activation | None = None, residual: Tensor | None = None
) -> Tensor:
    """`activation(batch_norm(x) + residual)`, without the steps that are None; x (batch, channels, *)."""
    in_one = norm.training and (norm.group is not None or fuses(x))
    name = activation_name(activation) if in_one else None
    if name is not None and _fits(x, residual, name):
        return _in_one(x, norm, name, residual)
    y = _in_one(x, norm, "none", None) if norm.training and norm.group is not None else _batch_norm(x, norm)
    y = y if residual is None else y + residual
    return y if activation is None else activation(y)


def activation_name(activation: Any) -> fused.Activation | None:
    """What the operator calls an activation, a function or a module; None for one that it does not know."""
    if isinstance(activation, nn.Module):
        return None if activation._forward_hooks or activation._forward_pre_hooks else _NAMES.get(type(activation))
    try:
        return _NAMES.get(activation)
    except TypeError:  # not hashable
        return None


def _fits(x: Tensor, residual: Tensor | None, name: str) -> bool:
    """Whether the operator takes these; what it does not take, the steps one by one do, or raise their own errors."""
    if x.dim() < 2 or x.numel() <= x.shape[1]:
        return False
    return residual is None or (name != "silu" and (residual.shape, residual.dtype) == (x.shape, x.dtype))


def _batch_norm(x: Tensor, norm: NormArguments) -> Tensor:
    statistics, affine = (norm.running_mean, norm.running_var), (norm.weight, norm.bias)
    return F.batch_norm(x, *statistics, *affine, training=norm.training, momentum=norm.momentum, eps=norm.eps)


def _in_one(x: Tensor, norm: NormArguments, name: fused.Activation, residual: Tensor | None) -> Tensor:
    y, mean, variance = fused.bn_act(
        x, residual, weight=norm.weight, bias=norm.bias, activation=name, eps=norm.eps, group=norm.group
    )
    with torch.no_grad():
        for running, batch in ((norm.running_mean, mean), (norm.running_var, variance)):
            if running is not None:
                running.lerp_(batch.to(running.dtype), norm.momentum)
    return y
