"""Inception blocks: branches side by side, described as data, whose channels are joined."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layers._checks import check_choice, check_positive, check_shape, fail, same_padding
from layers.conv import ConvBNAct


@dataclass(frozen=True)
class ConvStep:
    """A convolution of a branch, with batch norm and ReLU; padding keeps the size at stride 1."""

    out_channels: int
    kernel_size: int = 1
    stride: int = 1


@dataclass(frozen=True)
class PoolStep:
    """A pooling of a branch, `kind` "max" or "average"; padding keeps the size at stride 1."""

    kind: str = "max"
    kernel_size: int = 3
    stride: int = 1


Branch = Sequence[ConvStep | PoolStep]


class Inception(nn.Module):
    """Branches on the same input, joined along the channels: y = concat(branch_1(x), branch_2(x), ...).

    Input (batch, in_channels, height, width); output (batch, `out_channels`, height', width') with `out_channels` the
    sum over branches. A branch is a list of steps, without any it passes x on. Source: Szegedy et al.: Going Deeper
    with Convolutions (2015), figure 2b; batch norm as in Ioffe and Szegedy (2015), section 4.2.

    Raises ValueError for no branches, an even kernel, strides that differ between branches, and another rank or number
    of channels.

    >>> block = Inception(8, [[ConvStep(4)], [ConvStep(4), ConvStep(6, 3)], [PoolStep("max"), ConvStep(2)]])
    >>> block.out_channels, block(torch.zeros(1, 8, 9, 7)).shape
    (12, torch.Size([1, 12, 9, 7]))
    """

    def __init__(self, in_channels: int, branches: Sequence[Branch]) -> None:
        super().__init__()
        check_positive(self, in_channels=in_channels)
        if not branches:
            raise fail(self, "branches must hold at least one branch, but is empty")
        strides = [math.prod(step.stride for step in branch) for branch in branches]
        if len(set(strides)) > 1:
            raise fail(self, f"branches must reduce the size alike, but have strides {strides}")
        self.in_channels = in_channels
        self.branches = nn.ModuleList(self._branch(branch) for branch in branches)
        self.out_channels = sum(_width(in_channels, branch) for branch in branches)

    def forward(self, x: Tensor) -> Tensor:
        check_shape(self, "x", x, ("batch", self.in_channels, "height", "width"))
        return torch.cat([branch(x) for branch in self.branches], dim=1)

    def _branch(self, branch: Branch) -> nn.Sequential:
        modules: list[nn.Module] = []
        for i, step in enumerate(branch):
            padding = same_padding(self, step.kernel_size)
            if isinstance(step, ConvStep):
                channels = _width(self.in_channels, branch[:i])
                modules.append(ConvBNAct(channels, step.out_channels, step.kernel_size, stride=step.stride))
                continue
            check_choice(self, "kind of a PoolStep", step.kind, ("max", "average"))
            pool = nn.MaxPool2d if step.kind == "max" else nn.AvgPool2d
            modules.append(pool(step.kernel_size, step.stride, padding))
        return nn.Sequential(*modules)


def _width(in_channels: int, branch: Branch) -> int:
    """Channels after these steps."""
    return next((step.out_channels for step in reversed(branch) if isinstance(step, ConvStep)), in_channels)
