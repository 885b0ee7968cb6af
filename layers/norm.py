"""Batch normalisation: the modules of `torch.nn` with checks, and the same written out in numpy, backward included.

For each channel, with the mean m and variance v over all other axes (in training those of the batch, afterwards running
averages): y = weight (x - m) / sqrt(v + eps) + bias. In training running <- (1 - momentum) running + momentum batch,
the variance with n - 1 in place of n. Source: Ioffe and Szegedy: Batch Normalization (2015), algorithms 1 and 2.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from layers._checks import check_shape, fail, is_symbolic

Array = NDArray[np.floating]


class BatchNorm1d(nn.BatchNorm1d):
    """Batch norm of (batch, channels) or (batch, channels, time); the shape stays. Arguments of `torch.nn.BatchNorm1d`.

    Raises ValueError for another rank or number of channels, an empty axis, and one value a channel in training.

    >>> BatchNorm1d(1)(torch.tensor([[1.0], [3.0]])).round().tolist()
    [[-1.0], [1.0]]
    """

    def forward(self, input: Tensor) -> Tensor:
        _check_input(self, input, ("time",) if input.dim() > 2 else ())
        return super().forward(input)


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm of (batch, channels, height, width); the shape stays. Arguments of `torch.nn.BatchNorm2d`.

    Errors as for `BatchNorm1d`.

    >>> BatchNorm2d(3)(torch.ones(2, 3, 4, 5)).shape
    torch.Size([2, 3, 4, 5])
    """

    def forward(self, input: Tensor) -> Tensor:
        _check_input(self, input, ("height", "width"))
        return super().forward(input)


class BatchNorm3d(nn.BatchNorm3d):
    """Batch norm of (batch, channels, depth, height, width); the shape stays. Arguments of `torch.nn.BatchNorm3d`.

    Errors as for `BatchNorm1d`.

    >>> BatchNorm3d(3)(torch.ones(2, 3, 4, 5, 6)).shape
    torch.Size([2, 3, 4, 5, 6])
    """

    def forward(self, input: Tensor) -> Tensor:
        _check_input(self, input, ("depth", "height", "width"))
        return super().forward(input)


def _check_input(norm: nn.modules.batchnorm._BatchNorm, x: Tensor, axes: tuple[str, ...]) -> None:
    check_shape(norm, "input", x, ("batch", norm.num_features, *axes))
    if not is_symbolic(x) and norm.training and x.numel() == x.shape[1]:
        raise fail(norm, f"input needs more than one value a channel in training, but has shape {tuple(x.shape)}")


@dataclass(frozen=True)
class BatchNormStep:
    """What `batch_norm_forward` gives: the output, the running statistics afterwards, and what the backward needs.

    `y` and `normalised` have the shape of x, all others are (channels,).
    """

    y: Array
    running_mean: Array
    running_var: Array
    normalised: Array
    inverse_std: Array
    weight: Array
    training: bool


def batch_norm_forward(
    x: Array,
    weight: Array,
    bias: Array,
    running_mean: Array,
    running_var: Array,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> BatchNormStep:
    """Batch norm in numpy, the specification: x (batch, channels, *), the rest (channels,). Nothing is changed in
    place.

    >>> one, zero = np.ones(1), np.zeros(1)
    >>> step = batch_norm_forward(np.array([[1.0], [3.0]]), one, zero, zero, one, training=True, eps=0.0)
    >>> step.y.ravel().tolist(), step.running_mean.tolist(), step.running_var.tolist()
    ([-1.0, 1.0], [0.2], [1.1])
    """
    mean, var = running_mean, running_var
    if training:
        axes = _other_axes(x)
        mean, var = x.mean(axes), x.var(axes)
        count = x.size // x.shape[1]
        running_mean = (1 - momentum) * running_mean + momentum * mean
        running_var = (1 - momentum) * running_var + momentum * var * count / (count - 1)
    inverse_std = 1 / np.sqrt(var + eps)
    normalised = (x - _spread(mean, x)) * _spread(inverse_std, x)
    y = normalised * _spread(weight, x) + _spread(bias, x)
    return BatchNormStep(y, running_mean, running_var, normalised, inverse_std, weight, training)


def batch_norm_backward(dy: Array, step: BatchNormStep) -> tuple[Array, Array, Array]:
    """Gradients (dx, dweight, dbias) of a loss from its gradient dy with respect to `step.y`, worked out by hand.

    In training the batch's mean and variance depend on x as well. With z the normalised input, s its inverse standard
    deviation and E the mean over a channel: dx = weight s (dy - E[dy] - z E[dy z]); in inference dx = weight s dy.
    """
    axes = _other_axes(dy)
    dweight, dbias = (dy * step.normalised).sum(axes), dy.sum(axes)
    centred = dy
    if step.training:
        count = dy.size // dy.shape[1]
        centred = dy - _spread(dbias / count, dy) - step.normalised * _spread(dweight / count, dy)
    return centred * _spread(step.weight * step.inverse_std, dy), dweight, dbias


def _other_axes(x: Array) -> tuple[int, ...]:
    return (0, *range(2, x.ndim))


def _spread(per_channel: Array, x: Array) -> Array:
    return per_channel.reshape(1, -1, *(1,) * (x.ndim - 2))
