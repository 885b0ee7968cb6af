"""Pooling: the maximum or the average, over a window, over time, or over everything; and the k largest in order.

Legend: n batch, c channels, t time. Of `torch.nn` where it has the layer.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from layers._checks import Layer, check_choice, check_lengths, check_positive, check_shape, fail, is_symbolic
from layers.padding import padding_mask

_AXES = ("depth", "height", "width")


def _check_window(layer: nn.Module, x: Tensor, num_axes: int) -> None:
    names = ("time",) if num_axes == 1 else _AXES[-num_axes:]
    check_shape(layer, "input", x, ("batch", "channels", *names))
    if is_symbolic(x):
        return
    window = _each_axis(layer.kernel_size, num_axes)
    padding, dilation = (_each_axis(getattr(layer, n, v), num_axes) for n, v in (("padding", 0), ("dilation", 1)))
    sizes = zip(x.shape[2:], window, padding, dilation, strict=True)
    if any(n + 2 * p < d * (k - 1) + 1 for n, k, p, d in sizes):
        raise fail(layer, f"input must be at least as large as the window {window}, but has shape {tuple(x.shape)}")


def _each_axis(value: Any, num_axes: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,) * num_axes


class MaxPool1d(nn.MaxPool1d):
    """Largest value of each window: y[c, t] = max_(u < kernel_size) x[c, stride t + dilation u - padding].

    Input (batch, channels, time), output (batch, channels, time'). Arguments of `torch.nn.MaxPool1d`. Source: Ranzato
    et al.: Unsupervised Learning of Invariant Feature Hierarchies (2007), section 2.

    Raises ValueError for another rank, an empty axis, and an input smaller than the window.

    >>> MaxPool1d(2)(torch.tensor([[[1.0, 3.0, 2.0, 0.0]]]))
    tensor([[[3., 2.]]])
    """

    def forward(self, input: Tensor) -> Tensor:
        _check_window(self, input, 1)
        return super().forward(input)


class MaxPool2d(nn.MaxPool2d):
    """Largest value of each window: input (batch, channels, height, width), output (batch, channels, height', width').

    Arguments of `torch.nn.MaxPool2d`; formula, source and errors as for `MaxPool1d`.

    >>> MaxPool2d(2)(torch.arange(8.0).reshape(1, 1, 2, 4))
    tensor([[[[5., 7.]]]])
    """

    def forward(self, input: Tensor) -> Tensor:
        _check_window(self, input, 2)
        return super().forward(input)


class MaxPool3d(nn.MaxPool3d):
    """Largest value of each window: (batch, channels, depth, height, width) -> (batch, channels, depth', height',
    width').

    Arguments of `torch.nn.MaxPool3d`; formula, source and errors as for `MaxPool1d`.

    >>> MaxPool3d((1, 2, 2))(torch.zeros(1, 1, 2, 4, 4)).shape
    torch.Size([1, 1, 2, 2, 2])
    """

    def forward(self, input: Tensor) -> Tensor:
        _check_window(self, input, 3)
        return super().forward(input)


class AvgPool1d(nn.AvgPool1d):
    """Average of each window: y[c, t] = sum_(u < kernel_size) x[c, stride t + u - padding] / kernel_size.

    Input (batch, channels, time), output (batch, channels, time'). Arguments of `torch.nn.AvgPool1d`. Source: LeCun et
    al.: Gradient-Based Learning Applied to Document Recognition (1998), section II.A.

    Raises ValueError for another rank, an empty axis, and an input smaller than the window.

    >>> AvgPool1d(2)(torch.tensor([[[1.0, 3.0, 2.0, 0.0]]]))
    tensor([[[2., 1.]]])
    """

    def forward(self, input: Tensor) -> Tensor:
        _check_window(self, input, 1)
        return super().forward(input)


class AvgPool2d(nn.AvgPool2d):
    """Average of each window: input (batch, channels, height, width), output (batch, channels, height', width').

    Arguments of `torch.nn.AvgPool2d`; formula, source and errors as for `AvgPool1d`.

    >>> AvgPool2d(2)(torch.arange(8.0).reshape(1, 1, 2, 4))
    tensor([[[[2.5000, 4.5000]]]])
    """

    def forward(self, input: Tensor) -> Tensor:
        _check_window(self, input, 2)
        return super().forward(input)


class AvgPool3d(nn.AvgPool3d):
    """Average of each window: (batch, channels, depth, height, width) -> (batch, channels, depth', height', width').

    Arguments of `torch.nn.AvgPool3d`; formula, source and errors as for `AvgPool1d`.

    >>> AvgPool3d((1, 2, 2))(torch.zeros(1, 1, 2, 4, 4)).shape
    torch.Size([1, 1, 2, 2, 2])
    """

    def forward(self, input: Tensor) -> Tensor:
        _check_window(self, input, 3)
        return super().forward(input)


class GlobalPool(nn.Module):
    """Maximum or average over all axes after the channels: input (batch, channels, *), output (batch, channels).

    `kind` is "average" (source: Lin, Chen, Yan: Network In Network, 2014, section 3.2) or "max".

    Raises ValueError for another kind, fewer than three axes, and an empty axis.

    >>> GlobalPool("max")(torch.arange(8.0).reshape(1, 2, 2, 2))
    tensor([[3., 7.]])
    """

    def __init__(self, kind: str = "average") -> None:
        super().__init__()
        check_choice(self, "kind", kind, ("average", "max"))
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        check_shape(self, "x", x, ("batch", "channels", "*", "..."))
        x = x.flatten(2)
        return x.mean(2) if self.kind == "average" else x.amax(2)

    def extra_repr(self) -> str:
        return repr(self.kind)


class PoolOverTime(nn.Module):
    """Maximum or average of each channel over the steps of its sequence: (batch, channels, time) -> (batch, channels).

    `forward(x, lengths=None)`; steps beyond a length do not count. Source: Collobert et al.: Natural Language
    Processing (Almost) from Scratch (2011), section 3.3.2 ("max over time").

    Raises ValueError for another kind, another rank, and lengths that are not from 1 to time.

    >>> PoolOverTime("average")(torch.tensor([[[1.0, 3.0, 99.0]]]), torch.tensor([2]))
    tensor([[2.]])
    """

    def __init__(self, kind: str = "max") -> None:
        super().__init__()
        check_choice(self, "kind", kind, ("average", "max"))
        self.kind = kind

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        mask = _time_mask(self, x, lengths)
        if self.kind == "max":
            return (x if mask is None else x.masked_fill(~mask, float("-inf"))).amax(2)
        if mask is None or lengths is None:
            return x.mean(2)
        return x.masked_fill(~mask, 0).sum(2) / lengths.to(x.device)[:, None]

    def extra_repr(self) -> str:
        return repr(self.kind)


class KMaxOverTime(nn.Module):
    """The k largest values of each channel, in the order in which they stand: (batch, channels, time) -> (batch,
    channels, k).

    `forward(x, lengths=None)`; steps beyond a length do not count. A sequence of fewer than k steps gives all its
    values, then zeros; of equal values the first count. Source: Kalchbrenner, Grefenstette, Blunsom: A Convolutional
    Neural Network for Modelling Sentences (2014), section 3.2.

    Raises ValueError for k < 1, another rank, and lengths that are not from 1 to time.

    >>> KMaxOverTime(2)(torch.tensor([[[1.0, 5.0, 2.0, 7.0, 9.0]]]), torch.tensor([4]))
    tensor([[[5., 7.]]])
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        check_positive(self, k=k)
        self.k = k

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        _time_mask(self, x, lengths)
        return k_max(x, self.k, lengths)

    def extra_repr(self) -> str:
        return f"k={self.k}"


def k_max(x: Tensor, k: int, lengths: Tensor | None = None) -> Tensor:
    """`KMaxOverTime` as a function: (batch, channels, time) -> (batch, channels, k)."""
    mask = _time_mask("k_max", x, lengths)
    ranked = x if mask is None else x.masked_fill(~mask, float("-inf"))
    # Stable: of equal values (zeros, behind a ReLU) the first are taken, however long the filling is. Steps beyond a
    # length come last in time, so that sorting the positions keeps them behind the values that count.
    order = ranked.sort(dim=2, descending=True, stable=True).indices
    positions = order[:, :, : min(k, x.shape[2])].sort(dim=2).values
    largest = x.gather(2, positions)
    if lengths is not None:
        largest = largest.masked_fill(positions >= lengths.to(x.device)[:, None, None], 0)
    return F.pad(largest, (0, k - largest.shape[2])) if k > x.shape[2] else largest


def _time_mask(layer: Layer, x: Tensor, lengths: Tensor | None) -> Tensor | None:
    """(batch, 1, time), True where a step counts; None where all do."""
    check_shape(layer, "x", x, ("batch", "channels", "time"))
    if lengths is None:
        return None
    check_lengths(layer, lengths, x.shape[0], x.shape[2])
    return padding_mask(lengths.to(x.device), x.shape[2])[:, None]
