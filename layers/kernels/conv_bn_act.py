"""Convolution, batch norm and activation as one operator.

The path below in plain PyTorch is the specification, and what runs on CPUs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

Activation = Callable[[Tensor], Tensor]


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
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5


def conv_bn_act(
    x: Tensor, conv: ConvArguments, norm: NormArguments | None = None, activation: Activation | None = None
) -> Tensor:
    """`activation(batch_norm(conv2d(x)))`, without the steps that are None.

    `x` has shape (batch, in, height, width), the result (batch, out, height', width'). Batch norm is that of Ioffe and
    Szegedy (2015), algorithms 1 and 2. Differentiable in `x` and in every parameter.
    """
    y = F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    if norm is not None:
        y = F.batch_norm(
            y,
            norm.running_mean,
            norm.running_var,
            norm.weight,
            norm.bias,
            training=norm.training,
            momentum=norm.momentum,
            eps=norm.eps,
        )
    return y if activation is None else activation(y)
