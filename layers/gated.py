"""Gated linear units: one half of what a layer computes decides how much of the other half passes.

`GatedLinear(gate="silu")` is SwiGLU, with "gelu" GEGLU and with "relu" ReGLU (Shazeer: GLU Variants Improve
Transformer, 2020, equations 4 and 5).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from layers._checks import check_positive, check_shape, fail, same_padding
from layers.activation import activation_module


class GLU(nn.GLU):
    """y = a * sigmoid(b), where a and b are the halves of x along `dim`: (*, 2 n, *) -> (*, n, *).

    Source: Dauphin et al.: Language Modeling with Gated Convolutional Networks (2017), equation 1.

    Raises ValueError for an axis of odd length, and an empty one.

    >>> GLU()(torch.tensor([3.0, 0.0]))
    tensor([1.5000])
    """

    def forward(self, input: Tensor) -> Tensor:
        check_shape(self, "input", input, ("...", "*"))
        if not -input.dim() <= self.dim < input.dim() or input.shape[self.dim] % 2:
            raise fail(self, f"input must be of even length along axis {self.dim}, but has shape {tuple(input.shape)}")
        return super().forward(input)


class GatedLinear(nn.Module):
    """y = (W x + b) * g(V x + c): (*, in_features) -> (*, out_features).

    One matrix product makes both halves (child `linear`, values first). `gate` g is a name of `layers.ACTIVATIONS` or a
    module. Source: as above.

    Raises ValueError for sizes below 1, an unknown gate, and an input whose last axis is not in_features.

    >>> GatedLinear(3, 5, gate="silu")(torch.zeros(2, 3)).shape
    torch.Size([2, 5])
    """

    def __init__(
        self, in_features: int, out_features: int, *, gate: str | nn.Module = "sigmoid", bias: bool = True
    ) -> None:
        super().__init__()
        check_positive(self, in_features=in_features, out_features=out_features)
        self.linear: nn.Module = nn.Linear(in_features, 2 * out_features, bias=bias)
        self.gate = _gate_module(self, gate)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.linear, nn.Linear):
            check_shape(self, "x", x, ("...", self.linear.in_features))
        return _gated(self.linear(x), self.gate, -1)


class GatedConv1d(nn.Module):
    """y = (w * x + b) sigmoid(v * x + c), with convolutions: (batch, in_channels, time) -> (batch, out_channels, time).

    With `causal`, y at a step depends on x up to that step alone, and the kernel may be even. Source: as for `GLU`,
    section 2.

    Raises ValueError for an even kernel unless causal, an unknown gate, and another rank or number of channels.

    >>> GatedConv1d(3, 5, 4, causal=True)(torch.zeros(2, 3, 9)).shape
    torch.Size([2, 5, 9])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        dilation: int = 1,
        causal: bool = False,
        gate: str | nn.Module = "sigmoid",
    ) -> None:
        super().__init__()
        check_positive(self, in_channels=in_channels, out_channels=out_channels, kernel_size=kernel_size)
        self.past = dilation * (kernel_size - 1) if causal else 0
        padding = 0 if causal else same_padding(self, kernel_size, dilation)
        self.conv: nn.Module = nn.Conv1d(in_channels, 2 * out_channels, kernel_size, padding=padding, dilation=dilation)
        self.gate = _gate_module(self, gate)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.conv, nn.Conv1d):
            check_shape(self, "x", x, ("batch", self.conv.in_channels, "time"))
        return _gated(self.conv(F.pad(x, (self.past, 0)) if self.past else x), self.gate, 1)


class GatedConv2d(nn.Module):
    """`GatedConv1d` for images: (batch, in_channels, height, width) -> (batch, out_channels, height', width').

    Formula and source as for `GatedConv1d`. Raises ValueError for an even kernel, an unknown gate, and another rank or
    number of channels.

    >>> GatedConv2d(3, 5, 3, stride=2)(torch.zeros(2, 3, 9, 7)).shape
    torch.Size([2, 5, 5, 4])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        gate: str | nn.Module = "sigmoid",
    ) -> None:
        super().__init__()
        check_positive(self, in_channels=in_channels, out_channels=out_channels)
        padding = same_padding(self, kernel_size)
        self.conv: nn.Module = nn.Conv2d(in_channels, 2 * out_channels, kernel_size, stride=stride, padding=padding)
        self.gate = _gate_module(self, gate)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.conv, nn.Conv2d):
            check_shape(self, "x", x, ("batch", self.conv.in_channels, "height", "width"))
        return _gated(self.conv(x), self.gate, 1)


def _gate_module(layer: nn.Module, gate: str | nn.Module) -> nn.Module:
    module = activation_module(layer, gate)
    assert module is not None
    if isinstance(gate, str) and hasattr(module, "inplace"):
        module.inplace = False  # type: ignore[assignment]  # autograd forbids it: both halves are views of one tensor
    return module


def _gated(halves: Tensor, gate: nn.Module, dim: int) -> Tensor:
    values, gates = halves.chunk(2, dim)
    return values * gate(gates)
