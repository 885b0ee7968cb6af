"""conv_bn_act against numpy loops, and its gradients against finite differences."""

import numpy as np
import pytest
import torch
from torch import Tensor

from layers.functional import ConvArguments, NormArguments, conv_bn_act


def numpy_conv(x: np.ndarray, conv: ConvArguments) -> np.ndarray:
    """Convolution written out from its definition, for one stride, padding and dilation on both axes."""
    weight, stride, padding, dilation = conv.weight.numpy(), conv.stride, conv.padding, conv.dilation
    out, per_group, kernel, _ = weight.shape
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    reach = dilation * (kernel - 1) + 1
    rows, columns = (x.shape[2] - reach) // stride + 1, (x.shape[3] - reach) // stride + 1
    y = np.zeros((len(x), out, rows, columns))
    for o in range(out):
        first = o // (out // conv.groups) * per_group
        for i in range(rows):
            for j in range(columns):
                patch = x[:, first : first + per_group, i * stride :, j * stride :][
                    :, :, :reach:dilation, :reach:dilation
                ]
                y[:, o, i, j] = (patch * weight[o]).sum((1, 2, 3))
    return y if conv.bias is None else y + conv.bias.numpy()[:, None, None]


def norm_arguments(channels: int, *, training: bool = False) -> NormArguments:
    mean, weight, bias = torch.randn(3, channels, dtype=torch.float64)
    var = torch.rand(channels, dtype=torch.float64) + 0.1
    return NormArguments(mean, var, weight, bias, training=training, momentum=0.3, eps=1e-3)


@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "groups", "bias"),
    [(1, 0, 1, 1, False), (2, 1, 1, 1, True), (1, 2, 2, 3, False), (3, 1, 1, 3, True)],
)
def test_is_the_definition(stride: int, padding: int, dilation: int, groups: int, bias: bool) -> None:
    x = torch.randn(2, 3, 9, 7, dtype=torch.float64)
    weight = torch.randn(6, 3 // groups, 3, 3, dtype=torch.float64)
    conv = ConvArguments(
        weight, torch.randn(6, dtype=torch.float64) if bias else None, stride, padding, dilation, groups
    )
    norm = norm_arguments(6)
    y = numpy_conv(x.numpy(), conv)
    mean, var, gamma, beta = (
        t.numpy()[:, None, None] for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    expected = np.maximum((y - mean) / np.sqrt(var + norm.eps) * gamma + beta, 0)
    np.testing.assert_allclose(conv_bn_act(x, conv, norm, torch.relu).numpy(), expected, rtol=1e-12, atol=1e-12)


def test_training_uses_and_moves_statistics() -> None:
    x = torch.randn(5, 2, 4, 3, dtype=torch.float64)
    conv = ConvArguments(torch.randn(3, 2, 1, 1, dtype=torch.float64))
    norm = norm_arguments(3, training=True)
    old_mean, old_var = norm.running_mean.numpy().copy(), norm.running_var.numpy().copy()
    y = numpy_conv(x.numpy(), conv)
    actual = conv_bn_act(x, conv, norm)
    mean, var = y.mean((0, 2, 3)), y.var((0, 2, 3))
    gamma, beta = norm.weight.numpy()[:, None, None], norm.bias.numpy()[:, None, None]
    expected = (y - mean[:, None, None]) / np.sqrt(var[:, None, None] + norm.eps) * gamma + beta
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-10)
    np.testing.assert_allclose(norm.running_mean, 0.7 * old_mean + 0.3 * mean, rtol=1e-12)
    unbiased = y.var((0, 2, 3), ddof=1)
    np.testing.assert_allclose(norm.running_var, 0.7 * old_var + 0.3 * unbiased, rtol=1e-12)


def test_norm_and_activation_may_be_left_out() -> None:
    x, weight = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3)
    expected = torch.nn.functional.conv2d(x, weight)
    assert torch.equal(conv_bn_act(x, ConvArguments(weight)), expected)


@pytest.mark.parametrize("training", [False, True])
def test_gradients(training: bool) -> None:
    x = torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    gamma = torch.randn(2, dtype=torch.float64, requires_grad=True)
    mean, var = torch.randn(2, dtype=torch.float64), torch.rand(2, dtype=torch.float64) + 0.5

    def function(x: Tensor, weight: Tensor, gamma: Tensor) -> Tensor:
        norm = NormArguments(mean.clone(), var.clone(), gamma, training=training)
        return conv_bn_act(x, ConvArguments(weight), norm, torch.tanh)

    assert torch.autograd.gradcheck(function, (x, weight, gamma))
