"""Convolutions: plain, transposed, depthwise separable, and with the batch norm and the activation that follow.

At stride s, padding p, dilation d and kernel size k, an axis of length n becomes (n + 2 p - d (k - 1) - 1) // s + 1,
and under a transposed convolution (n - 1) s - 2 p + d (k - 1) + 1 + output_padding.

Source: LeCun et al.: Gradient-Based Learning Applied to Document Recognition (1998), section II.A; Dumoulin and Visin:
A Guide to Convolution Arithmetic for Deep Learning (2016).
"""

import torch
from torch import Tensor, nn

from layers._checks import check_shape, fail, is_symbolic, same_padding
from layers.activation import activation_module
from layers.norm_act import norm_act


class Conv1d(nn.Conv1d):
    """`torch.nn.Conv1d` that says what is wrong with its input.

    Input (batch, in_channels, time), output (batch, out_channels, time'), zeros outside of x:
    y[o, t] = b[o] + sum_(i, u) w[o, i, u] x[i, s t + d u - p].

    Raises ValueError for another rank or number of channels, an empty axis, and an input smaller than the kernel.

    >>> Conv1d(3, 8, 3, dilation=2)(torch.zeros(1, 3, 9)).shape
    torch.Size([1, 8, 5])
    """

    def forward(self, input: Tensor) -> Tensor:
        _check_input(self, input)
        return super().forward(input)


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d` that says what is wrong with its input.

    Input (batch, in_channels, height, width), output (batch, out_channels, height', width'), zeros outside of x:
    y[o, t, r] = b[o] + sum_(i, u, v) w[o, i, u, v] x[i, s t + d u - p, s r + d v - p].

    Raises ValueError for another rank or number of channels, an empty axis, and an input smaller than the kernel.

    >>> Conv2d(4, 8, 3, stride=2, padding=1, groups=2)(torch.zeros(1, 4, 9, 7)).shape
    torch.Size([1, 8, 5, 4])
    """

    def forward(self, input: Tensor) -> Tensor:
        _check_input(self, input)
        return super().forward(input)


class Conv3d(nn.Conv3d):
    """`torch.nn.Conv3d` that says what is wrong with its input.

    Input (batch, in_channels, depth, height, width), output (batch, out_channels, depth', height', width'), zeros
    outside of x: y[o, t] = b[o] + sum_(i, u) w[o, i, u] x[i, s t + d u - p], where t and u have three components.

    Raises ValueError for another rank or number of channels, an empty axis, and an input smaller than the kernel.

    >>> Conv3d(3, 8, (1, 3, 3))(torch.zeros(1, 3, 4, 5, 6)).shape
    torch.Size([1, 8, 4, 3, 4])
    """

    def forward(self, input: Tensor) -> Tensor:
        _check_input(self, input)
        return super().forward(input)


class ConvTranspose1d(nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` that says what is wrong with its input: the adjoint of `Conv1d` with the same weight.

    Input (batch, in_channels, time), output (batch, out_channels, time').

    Raises ValueError for another rank or number of channels, and for an empty axis.

    >>> ConvTranspose1d(8, 3, 4, stride=2, padding=1)(torch.zeros(1, 8, 5)).shape
    torch.Size([1, 3, 10])
    """

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        _check_input(self, input)
        return super().forward(input, output_size)


class ConvTranspose2d(nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` that says what is wrong with its input: the adjoint of `Conv2d` with the same weight.

    Input (batch, in_channels, height, width), output (batch, out_channels, height', width').

    Raises ValueError for another rank or number of channels, and for an empty axis.

    >>> ConvTranspose2d(8, 3, 2, stride=2)(torch.zeros(1, 8, 5, 4)).shape
    torch.Size([1, 3, 10, 8])
    """

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        _check_input(self, input)
        return super().forward(input, output_size)


class ConvTranspose3d(nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` that says what is wrong with its input: the adjoint of `Conv3d` with the same weight.

    Input (batch, in_channels, depth, height, width), output (batch, out_channels, depth', height', width').

    Raises ValueError for another rank or number of channels, and for an empty axis.

    >>> ConvTranspose3d(8, 3, 3)(torch.zeros(1, 8, 4, 3, 2)).shape
    torch.Size([1, 3, 6, 5, 4])
    """

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        _check_input(self, input)
        return super().forward(input, output_size)


class _SeparableConv(nn.Module):
    """What the three below share."""

    _conv: type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if padding is None:
            padding = same_padding(self, kernel_size, dilation)
        self.depthwise = self._conv(
            in_channels,
            in_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=in_channels,
            bias=False,  # the pointwise convolution has one
        )
        self.pointwise = self._conv(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x))


class SeparableConv1d(_SeparableConv):
    """Depthwise convolution (one kernel a channel), then a 1 x 1 convolution over the channels.

    Input (batch, in_channels, time), output (batch, out_channels, time'). `padding` None keeps the size
    at stride 1 and needs an odd kernel. in_channels (kernel + out_channels) weights instead of in_channels kernel
    out_channels. Source: Chollet: Xception: Deep Learning with Depthwise Separable Convolutions (2017), section 1.

    Raises ValueError for an even kernel without padding, and as `Conv1d` does.

    >>> SeparableConv1d(3, 8, 5)(torch.zeros(1, 3, 9)).shape
    torch.Size([1, 8, 9])
    """

    _conv = Conv1d


class SeparableConv2d(_SeparableConv):
    """Depthwise convolution (one kernel a channel), then a 1 x 1 convolution over the channels.

    Input (batch, in_channels, height, width), output (batch, out_channels, height', width'). `padding` None keeps the
    size at stride 1 and needs an odd kernel. in_channels (kernel + out_channels) weights instead of in_channels kernel
    out_channels. Source: Chollet: Xception: Deep Learning with Depthwise Separable Convolutions (2017), section 1.

    Raises ValueError for an even kernel without padding, and as `Conv2d` does.

    >>> SeparableConv2d(3, 8, 3, stride=2)(torch.zeros(1, 3, 9, 7)).shape
    torch.Size([1, 8, 5, 4])
    """

    _conv = Conv2d


class SeparableConv3d(_SeparableConv):
    """Depthwise convolution (one kernel a channel), then a 1 x 1 convolution over the channels.

    Input (batch, in_channels, depth, height, width), output (batch, out_channels, depth', height', width'). `padding`
    None keeps the size at stride 1 and needs an odd kernel. in_channels (kernel + out_channels) weights instead of
    in_channels kernel out_channels. Source: Chollet: Xception: Deep Learning with Depthwise Separable Convolutions
    (2017), section 1.

    Raises ValueError for an even kernel without padding, and as `Conv3d` does.

    >>> SeparableConv3d(3, 8, 3)(torch.zeros(1, 3, 4, 5, 6)).shape
    torch.Size([1, 8, 4, 5, 6])
    """

    _conv = Conv3d


class ConvBNAct(nn.Module):
    """2-D convolution without bias, then batch norm, then activation.

    Input (batch, in_channels, height, width), output (batch, out_channels, height', width') as for `torch.nn.Conv2d`.
    `padding` None keeps height and width for stride 1 and needs an odd kernel: `dilation * (kernel_size - 1) / 2`.
    `activation` is a name ("relu"), None or a module. The three steps are the children `conv`, `norm` and `activation`,
    and each may be replaced, for example by what `fold_batch_norm` or a factorisation puts in its place.

    Raises ValueError when `activation` is none of the above, for an input of another rank or number of channels, and
    where `torch.nn.Conv2d` does.

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
        activation: str | nn.Module | None = "relu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if padding is None:
            padding = same_padding(self, kernel_size, dilation)
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
        self.activation = activation_module(self, activation)

    def forward(self, x: Tensor) -> Tensor:
        return norm_act(self.norm, self.convolved(x), activation=self.activation)

    def convolved(self, x: Tensor) -> Tensor:
        """What `norm` gets."""
        if isinstance(self.conv, nn.Conv2d):  # it may have been replaced
            check_shape(self, "x", x, ("batch", self.conv.in_channels, "height", "width"))
        return self.conv(x)


_AXES = ("depth", "height", "width")


def _check_input(conv: nn.modules.conv._ConvNd, x: Tensor) -> None:
    num_axes = len(conv.kernel_size)
    names = ("time",) if num_axes == 1 else _AXES[-num_axes:]
    check_shape(conv, "input", x, ("batch", conv.in_channels, *names))
    if conv.transposed or isinstance(conv.padding, str) or is_symbolic(x):
        return
    window = tuple(d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    padded = tuple(n + 2 * p for n, p in zip(x.shape[2:], conv.padding, strict=True))
    if any(n < k for n, k in zip(padded, window, strict=True)):
        size = " x ".join(str(int(n)) for n in padded)
        raise fail(conv, f"input with its padding must be at least {' x '.join(map(str, window))}, but is {size}")
