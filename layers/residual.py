"""Residual connections."""

from collections.abc import Sequence

from torch import Tensor, nn

from layers._checks import check_shape, fail, is_symbolic
from layers.activation import activation_module
from layers.conv import ConvBNAct
from layers.kernels.dispatch import fuses
from layers.norm_act import has_hooks, norm_act


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
        last = _last_block(self.body) if not is_symbolic(x) and fuses(x) else None
        y = self.body(x) if last is None else self._before_norm(x, last)
        kept = self.shortcut(x)
        if not is_symbolic(y) and not _same(y.shape, kept.shape):
            raise fail(
                self,
                f"body and shortcut must give one shape, but give {tuple(y.shape)} and {tuple(kept.shape)} for an x of "
                f"shape {tuple(x.shape)}; layers.projection(...) makes a shortcut of another shape",
            )
        if last is not None:
            return norm_act(last.norm, y, kept, activation=self.activation)
        y = y + kept
        return y if self.activation is None else self.activation(y)

    def _before_norm(self, x: Tensor, last: ConvBNAct) -> Tensor:
        """What the last block of the body normalises."""
        for block in list(self.body)[:-1] if isinstance(self.body, nn.Sequential) else ():
            x = block(x)
        return last.convolved(x)


def _last_block(body: nn.Module) -> ConvBNAct | None:
    """The block at the end of the body whose batch norm adds the shortcut; None where there is none, or it is seen."""
    last = body[-1] if type(body) is nn.Sequential and len(body) and not has_hooks(body) else body
    if not isinstance(last, ConvBNAct) or type(last) is not ConvBNAct:  # a subclass may do anything
        return None
    return last if last.activation is None and not has_hooks(last) else None


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
