"""Highway blocks: a learnt gate for every value decides how much is transformed and how much is carried on."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from layers._checks import check_choice, check_positive, check_shape, is_symbolic, same_padding
from layers.activation import activation_module
from layers.kernels.conv_bn_act import activation_name
from layers.kernels.dispatch import fuses
from layers.kernels.highway import highway_gates


class _Highway(nn.Module):
    """The gates, all of one kind of layer."""

    def __init__(
        self,
        layer: Callable[[], nn.Linear | nn.Conv1d | nn.Conv2d],
        *,
        carry: str,
        activation: str | nn.Module | None,
        gate_bias: float,
    ) -> None:
        super().__init__()
        check_choice(self, "carry", carry, ("coupled", "free"))
        self.transform, self.transform_gate = layer(), _with_bias(layer(), gate_bias)
        self.carry_gate = _with_bias(layer(), -gate_bias) if carry == "free" else None
        self.activation = activation_module(self, activation)

    def forward(self, x: Tensor) -> Tensor:
        h = self.transform(x)
        name = activation_name(self.activation) if not is_symbolic(x) and fuses(x) else None
        if name is not None and (h.shape, h.dtype) == (x.shape, x.dtype):
            carry = None if self.carry_gate is None else self.carry_gate(x)
            return highway_gates(h, self.transform_gate(x), x, carry, activation=name)
        h = h if self.activation is None else self.activation(h)
        t = self.transform_gate(x).sigmoid()
        if self.carry_gate is None:
            return torch.lerp(x, h, t)  # x + t (h - x)
        return h * t + x * self.carry_gate(x).sigmoid()


class Highway(_Highway):
    """y = F(x) T(x) + x C(x) with F(x) = f(W x + b) and T(x) = sigmoid(W_T x + b_T); products element by element.

    Input and output (*, features). `carry` "coupled": C = 1 - T; "free": C(x) = sigmoid(W_C x + b_C). `gate_bias` is
    where b_T starts (and -b_C): below 0 the block begins by carrying its input on, so that deep stacks train. Source:
    Srivastava, Greff, Schmidhuber: Highway Networks (2015), equations 2 and 3, and section 2.2 on the bias.

    Raises ValueError for another carry, an unknown activation, and an input whose last axis is not features.

    >>> Highway(6)(torch.zeros(2, 6)).shape
    torch.Size([2, 6])
    """

    def __init__(
        self,
        features: int,
        *,
        carry: str = "coupled",
        activation: str | nn.Module | None = "relu",
        gate_bias: float = -2.0,
    ) -> None:
        check_positive("Highway", features=features)
        super().__init__(lambda: nn.Linear(features, features), carry=carry, activation=activation, gate_bias=gate_bias)
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        check_shape(self, "x", x, ("...", self.features))
        return super().forward(x)


class _HighwayConv(_Highway):
    """What the two below share."""

    _conv: type[nn.Conv1d] | type[nn.Conv2d]
    _axes: tuple[str, ...]

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        *,
        carry: str = "coupled",
        activation: str | nn.Module | None = "relu",
        gate_bias: float = -2.0,
    ) -> None:
        name = type(self).__name__
        check_positive(name, channels=channels)
        padding = same_padding(name, kernel_size)
        super().__init__(
            lambda: self._conv(channels, channels, kernel_size, padding=padding),
            carry=carry,
            activation=activation,
            gate_bias=gate_bias,
        )
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        check_shape(self, "x", x, ("batch", self.channels, *self._axes))
        return super().forward(x)


class HighwayConv1d(_HighwayConv):
    """`Highway` with convolutions that keep the size in place of matrix products: (batch, channels, time), in and out.

    The kernel size is odd. Source: as for `Highway`, section 5; Zilly et al.: Recurrent Highway Networks (2017) for the
    free gates.

    Raises ValueError for an even kernel, and as `Highway` does.

    >>> HighwayConv1d(6, 3, carry="free")(torch.zeros(2, 6, 9)).shape
    torch.Size([2, 6, 9])
    """

    _conv, _axes = nn.Conv1d, ("time",)


class HighwayConv2d(_HighwayConv):
    """`HighwayConv1d` for images: (batch, channels, height, width), in and out. Errors as for `HighwayConv1d`.

    >>> HighwayConv2d(6, 3)(torch.zeros(2, 6, 9, 7)).shape
    torch.Size([2, 6, 9, 7])
    """

    _conv, _axes = nn.Conv2d, ("height", "width")


def _with_bias(gate: nn.Linear | nn.Conv1d | nn.Conv2d, value: float) -> nn.Module:
    assert gate.bias is not None
    nn.init.constant_(gate.bias, value)
    return gate
