"""Convolution with the batch norm and the activation that follow it."""

from typing import Literal

import torch
from torch import Tensor, fx, nn

from layers.functional import ConvArguments, NormArguments, conv_bn_act


class ConvBNAct(nn.Module):
    """2-D convolution without bias, then batch norm, then activation.

    Input (batch, in_channels, height, width), output (batch, out_channels, height', width') as for `torch.nn.Conv2d`.
    `padding` None keeps height and width for stride 1 and an odd kernel: `dilation * (kernel_size - 1) // 2`.
    `activation` is "relu", None or a module. The three steps are the children `conv`, `norm` and `activation`, and each
    may be replaced, for example by what `fold_batch_norm` or a factorisation puts in its place.

    Raises ValueError when `activation` is none of the above, and where `torch.nn.Conv2d` does.

    >>> ConvBNAct(3, 8, 3, stride=2)(torch.zeros(1, 3, 9, 9)).shape
    torch.Size([1, 8, 5, 5])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        groups: int = 1,
        activation: Literal["relu"] | nn.Module | None = "relu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if padding is None:
            padding = dilation * (kernel_size - 1) // 2
        self.conv: nn.Module = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=False,  # batch norm subtracts it again
            device=device,
            dtype=dtype,
        )
        self.norm: nn.Module = nn.BatchNorm2d(out_channels, device=device, dtype=dtype)
        self.activation = _activation_module(activation)

    def forward(self, x: Tensor) -> Tensor:
        conv, norm = self.conv, self.norm
        # The operator calls no child, so it is neither for one that was replaced (folded, factorised) nor for one whose
        # calls somebody wants to see: a hook, or torch.fx.
        unseen = not (has_hooks(conv) or has_hooks(norm) or isinstance(x, fx.Proxy))
        if type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d and unseen:
            return conv_bn_act(x, _conv_arguments(conv), _norm_arguments(norm), self.activation)
        y = norm(conv(x))
        return y if self.activation is None else self.activation(y)


def _activation_module(activation: str | nn.Module | None) -> nn.Module | None:
    if activation is None or isinstance(activation, nn.Module):
        return activation
    if activation == "relu":
        return nn.ReLU(inplace=True)  # the gradients of batch norm do not need its output
    raise ValueError(f'activation is {activation!r}; give "relu", None or a torch.nn.Module')


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody watches or changes what goes into or comes out of `module`."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _conv_arguments(conv: nn.Conv2d) -> ConvArguments:
    return ConvArguments(conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def _norm_arguments(norm: nn.BatchNorm2d) -> NormArguments:
    """What `norm` would pass on in its present mode; counts the batch in training, as its own forward does."""
    momentum = norm.momentum
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:  # cumulative average
            momentum = 1.0 / float(norm.num_batches_tracked)
    return NormArguments(
        norm.running_mean,
        norm.running_var,
        norm.weight,
        norm.bias,
        training=norm.training or norm.running_mean is None,
        momentum=0.0 if momentum is None else momentum,
        eps=norm.eps,
    )
