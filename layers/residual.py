"""Residual connections."""

from collections.abc import Sequence

from torch import Tensor, nn

from layers._checks import check_shape, fail, is_symbolic
from layers.activation import activation_module
from layers.conv import ConvBNAct


class Residual(nn.Module):
    """y = f(body(x) + shortcut(x)).

    `body` and `shortcut` are modules whose outputs have one shape. `shortcut` None is the identity; where body changes
    the shape, `projection(...)` makes the usual one. `activation` f is a name of `layers.ACTIVATIONS`, None or a
    module. Source: He et al.: Deep Residual Learning for Image Recognition (2016), equations 1 (identity) and 2
    (projection).

    Raises ValueError for an unknown activation, an empty axis, and where the two shapes differ.

    >>> body = ConvBNAct(4, 8, 3, stride=2, activation=None)
    >>> Residual(body, projection(4, 8, stride=2), activation="relu")(torch.zeros(2, 4, 9, 7)).shape
    torch.Size([2, 8, 5, 4])
    """

    def __init__(
        self, body: nn.Module, shortcut: nn.Module | None = None, *, activation: str | nn.Module | None = None
    ) -> None:
        super().__init__()
        self.body = body
        self.shortcut = nn.Identity() if shortcut is None else shortcut
        self.activation = activation_module(self, activation)

    def forward(self, x: Tensor) -> Tensor:
        check_shape(self, "x", x, ("...",))
        y, kept = self.body(x), self.shortcut(x)
        if not is_symbolic(y) and not _same(y.shape, kept.shape):
            raise fail(
                self,
                f"body and shortcut must give one shape, but give {tuple(y.shape)} and {tuple(kept.shape)} for an x of "
                f"shape {tuple(x.shape)}; layers.projection(...) makes a shortcut of another shape",
            )
        y = y + kept
        return y if self.activation is None else self.activation(y)


def projection(in_channels: int, out_channels: int, *, stride: int = 1) -> ConvBNAct:
    """The shortcut for a body that changes channels or size: 1 x 1 convolution and batch norm, for images.

    (batch, in_channels, height, width) -> (batch, out_channels, ceil(height / stride), ceil(width / stride)). Source:
    He et al. (2016), section 3.3, option B.

    >>> projection(4, 8, stride=2)(torch.zeros(2, 4, 9, 7)).shape
    torch.Size([2, 8, 5, 4])
    """
    return ConvBNAct(in_channels, out_channels, 1, stride=stride, activation=None)


def _same(a: Sequence[int], b: Sequence[int]) -> bool:
    return len(a) == len(b) and all(m == n for m, n in zip(a, b, strict=True))
