"""Thin convolutions in a row that stand for one: see :mod:`layers.low_rank`.

They may have 1 to 3 axes, strides, dilation and groups. Ranks count all groups together.

Legend: o output channels, i input channels, k kernel positions, a and b ranks.
"""

from collections.abc import Callable, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from layers._checks import check_positive, check_shape, fail
from layers.low_rank import give

Size = int | tuple[int, ...]
Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
_CONVS: dict[int, Callable[..., Conv]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class ThinConvs(nn.Module):
    """Convolutions in a row, of which one at most has a kernel, a stride ... along each axis: their sizes as of one."""

    @property
    def in_channels(self) -> int:
        """As of the convolution that they stand for, like all that follows."""
        return self._convs[0].in_channels

    @property
    def out_channels(self) -> int:
        """Of the last one."""
        return self._convs[-1].out_channels

    @property
    def groups(self) -> int:
        """Of all of them."""
        return self._convs[0].groups

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """One number for each axis."""
        return self._largest("kernel_size")

    @property
    def stride(self) -> tuple[int, ...]:
        """One number for each axis."""
        return self._largest("stride")

    @property
    def padding(self) -> tuple[int, ...]:
        """One number for each axis."""
        return self._largest("padding")

    @property
    def dilation(self) -> tuple[int, ...]:
        """One number for each axis."""
        return self._largest("dilation")

    @property
    def _convs(self) -> list[Conv]:
        return cast("list[Conv]", list(self.children()))  # in the order in which they run

    def _largest(self, name: str) -> tuple[int, ...]:
        return tuple(map(max, *(getattr(conv, name) for conv in self._convs), (0,) * 3))

    def _merged(self, weight: Tensor) -> Conv:
        """One convolution of this weight, with the sampling of all."""
        conv, bias = _CONVS[weight.dim() - 2], self._convs[-1].bias
        options = {name: getattr(self, name) for name in ("stride", "padding", "dilation", "groups")}
        merged = conv(self.in_channels, self.out_channels, self.kernel_size, bias=bias is not None, **options)
        give(merged, weight, bias)
        return merged


class Tucker2Conv(ThinConvs):
    """1 x 1 convolution to `ranks[0]` channels, k x k to `ranks[1]`, 1 x 1 to out_channels; None leaves its 1 x 1 out.

    Its weight is w[o, i, k] = sum_(a, b) expand[o, a] core[a, b, k] reduce[b, i], the Tucker-2 decomposition. Stride,
    padding (of zeros) and dilation are those of the core; the bias is that of the last convolution. Input (batch,
    in_channels, *), output (batch, out_channels, *'). `kernel_size` has one number for each axis. Source: Kim et al.:
    Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile Applications (2016), section 3.1.

    Raises ValueError for sizes below 1, sizes that `groups` does not divide, factors that do not fit, and another rank
    or number of channels of the input.

    >>> layer = Tucker2Conv(8, 12, (3, 3), ranks=(3, None), padding=1)
    >>> x = torch.ones(2, 8, 9, 7)
    >>> torch.allclose(layer(x), layer.merge()(x), atol=1e-6)
    True
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        ranks: tuple[int | None, int | None],
        *,
        groups: int = 1,
        bias: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        options = _checked_options(self, options)
        conv = _conv_of(self, len(kernel_size))
        inner_in, inner_out = (n if r is None else r for n, r in zip((in_channels, out_channels), ranks, strict=True))
        check_positive(self, in_channels=in_channels, out_channels=out_channels, groups=groups)
        check_positive(self, **{f"ranks[{side}]": rank for side, rank in enumerate((inner_in, inner_out))})
        _check_groups(self, groups, in_channels, inner_in, inner_out, out_channels)
        last = ranks[1] is not None
        self.reduce = None if ranks[0] is None else conv(in_channels, inner_in, 1, groups=groups, bias=False)
        self.core = conv(inner_in, inner_out, tuple(kernel_size), groups=groups, bias=bias and not last, **options)
        self.expand = conv(inner_out, out_channels, 1, groups=groups, bias=bias) if last else None

    @classmethod
    def from_factors(
        cls,
        core: Tensor,
        *,
        reduce: Tensor | None = None,
        expand: Tensor | None = None,
        bias: Tensor | None = None,
        groups: int = 1,
        **options: Any,
    ) -> Self:
        """The layer with these weights: core (a, b / groups, *k), reduce (b, i / groups), expand (o, a / groups), bias
        (o,).

        `options` are stride, padding and dilation.
        """
        name = cls.__name__
        check_shape(name, "core", core, ("a", "b", "k", "..."))
        inner_out, inner_in = core.shape[0], core.shape[1] * groups
        if reduce is not None:
            check_shape(name, "reduce", reduce, (inner_in, "in_channels / groups"))
        if expand is not None:
            check_shape(name, "expand", expand, ("out_channels", inner_out // groups))
        in_channels = inner_in if reduce is None else reduce.shape[1] * groups
        out_channels = inner_out if expand is None else expand.shape[0]
        ranks = (None if reduce is None else inner_in, None if expand is None else inner_out)
        layer = cls(in_channels, out_channels, core.shape[2:], ranks, groups=groups, bias=bias is not None, **options)
        if layer.reduce is not None and reduce is not None:
            give(layer.reduce, reduce)
        give(layer.core, core, bias if layer.expand is None else None)
        if layer.expand is not None and expand is not None:
            give(layer.expand, expand, bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        check_shape(self, "x", x, ("batch", self.in_channels, *("*",) * len(self.core.kernel_size)))
        y = self.core(x if self.reduce is None else self.reduce(x))
        return y if self.expand is None else self.expand(y)

    @torch.no_grad()
    def merge(self) -> Conv:
        """One convolution that computes the same."""
        core, groups = self.core, self.core.groups
        weight = _by_group(core.weight, groups)
        if self.reduce is not None:
            weight = torch.einsum("gabk,gbi->gaik", weight, _by_group(self.reduce.weight, groups)[..., 0])
        if self.expand is not None:
            weight = torch.einsum("goa,gaik->goik", _by_group(self.expand.weight, groups)[..., 0], weight)
        return self._merged(weight.flatten(0, 1).unflatten(-1, core.kernel_size))


class SpatialConv(ThinConvs):
    """A k x k convolution as two of one axis each: k x 1 to `rank` channels, then 1 x k, or the other way round.

    With `first` "vertical" its weight is w[o, i, y, x] = sum_a second[o, a, 1, x] first[a, i, y, 1]. Stride, padding
    (of zeros) and dilation are divided between the two. Input (batch, in_channels, height, width), output (batch,
    out_channels, height', width'). Source: Jaderberg, Vedaldi, Zisserman: Speeding up Convolutional Neural Networks
    with Low Rank Expansions (2014), section 2.1, scheme 2.

    Raises ValueError for sizes below 1, sizes that `groups` does not divide, factors that do not fit, another `first`,
    and another rank or number of channels of the input.

    >>> layer = SpatialConv(8, 12, (3, 3), rank=5, padding=1, first="horizontal")
    >>> x = torch.ones(2, 8, 9, 7)
    >>> torch.allclose(layer(x), layer.merge()(x), atol=1e-6)
    True
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        rank: int,
        *,
        first: str = "vertical",
        groups: int = 1,
        bias: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        if first not in ("vertical", "horizontal"):
            raise fail(self, f"first must be 'vertical' or 'horizontal', but is {first!r}")
        check_positive(self, in_channels=in_channels, out_channels=out_channels, rank=rank, groups=groups)
        _check_groups(self, groups, in_channels, rank, out_channels)
        pairs = {name: _pair(value) for name, value in _checked_options(self, options).items()}
        axis = 0 if first == "vertical" else 1
        self.first = nn.Conv2d(
            in_channels, rank, _only(axis, kernel_size, 1), groups=groups, bias=False, **_one_axis(axis, pairs)
        )
        other = 1 - axis
        self.second = nn.Conv2d(
            rank, out_channels, _only(other, kernel_size, 1), groups=groups, bias=bias, **_one_axis(other, pairs)
        )

    @classmethod
    def from_factors(
        cls, first: Tensor, second: Tensor, bias: Tensor | None = None, *, groups: int = 1, **options: Any
    ) -> Self:
        """The layer with these weights: (rank, i / groups, k, 1) and (o, rank / groups, 1, k), or (1, k) and then (k,
        1).

        `options` are stride, padding and dilation.
        """
        name = cls.__name__
        check_shape(name, "first", first, ("rank", "in_channels / groups", "k", "k"))
        vertical = first.shape[3] == 1 and second.shape[2:3] == (1,)
        check_shape(
            name, "second", second, ("out_channels", first.shape[0] // groups, *((1, "k") if vertical else ("k", 1)))
        )
        if not vertical and first.shape[2] != 1:
            raise fail(
                name, f"first must have shape (rank, in, k, 1) or (rank, in, 1, k), but has {tuple(first.shape)}"
            )
        kernel = (first.shape[2], second.shape[3]) if vertical else (second.shape[2], first.shape[3])
        layer = cls(
            first.shape[1] * groups,
            second.shape[0],
            kernel,
            first.shape[0],
            first="vertical" if vertical else "horizontal",
            groups=groups,
            bias=bias is not None,
            **options,
        )
        give(layer.first, first)
        give(layer.second, second, bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        check_shape(self, "x", x, ("batch", self.first.in_channels, "height", "width"))
        return self.second(self.first(x))

    @torch.no_grad()
    def merge(self) -> nn.Conv2d:
        """One convolution that computes the same."""
        first, second = self.first, self.second
        groups = first.groups
        # One of the two has length 1 along each spatial axis, so that the product of the shapes is the kernel.
        left = second.weight.unflatten(0, (groups, -1))
        right = first.weight.unflatten(0, (groups, -1))
        weight = torch.einsum("goahw,gaiyx->goihywx", left, right).flatten(-4, -3).flatten(-2, -1)
        merged = self._merged(weight.flatten(0, 1))
        assert isinstance(merged, nn.Conv2d)
        return merged


def _by_group(weight: Tensor, groups: int) -> Tensor:
    """(o, i / g, *k) -> (g, o / g, i / g, k)."""
    return weight.flatten(2).unflatten(0, (groups, -1))


def _conv_of(layer: nn.Module, num_axes: int) -> Callable[..., Conv]:
    if num_axes not in _CONVS:
        raise fail(layer, f"kernel_size must have 1 to 3 numbers, one for each axis, but has {num_axes}")
    return _CONVS[num_axes]


def _checked_options(layer: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(options) - {"stride", "padding", "dilation"})
    if unknown:
        raise fail(layer, f"{unknown[0]} is no argument; there are stride, padding and dilation")
    for name, value in options.items():
        if not all(isinstance(n, int) for n in (value if isinstance(value, tuple | list) else (value,))):
            raise fail(layer, f"{name} must be an integer, or one for each axis, but is {value!r}")
    return options


def _check_groups(layer: nn.Module, groups: int, *sizes: int) -> None:
    bad = [size for size in sizes if size % groups]
    if bad:
        raise fail(layer, f"groups must divide all channels and ranks, but {groups} does not divide {bad[0]}")


def _pair(value: Size) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _only(axis: int, pair: tuple[int, int], neutral: int) -> tuple[int, int]:
    """The pair's number at `axis`, and the neutral one at the other."""
    return (pair[0], neutral) if axis == 0 else (neutral, pair[1])


def _one_axis(axis: int, options: dict[str, tuple[int, int]]) -> dict[str, Any]:
    return {name: _only(axis, pair, 0 if name == "padding" else 1) for name, pair in options.items()}
