"""Gated units against their formulas."""

import numpy as np
import pytest
import scipy.special
import torch

import layers

GATES = {
    "sigmoid": scipy.special.expit,
    "relu": lambda v: np.maximum(v, 0),
    "silu": lambda v: v * scipy.special.expit(v),
    "gelu": lambda v: v * scipy.special.ndtr(v),
}


@pytest.mark.parametrize("gate", GATES)
def test_gated_linear(gate: str) -> None:
    layer = layers.GatedLinear(5, 3, gate=gate).double()
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    values, gates = np.split(layer.linear(x).detach().numpy(), 2, axis=-1)
    np.testing.assert_allclose(layer(x).detach().numpy(), values * GATES[gate](gates), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dim", [1, -1])
def test_glu(dim: int) -> None:
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    values, gates = np.split(x.numpy(), 2, axis=dim)
    np.testing.assert_allclose(layers.GLU(dim)(x).numpy(), values * scipy.special.expit(gates), rtol=1e-12)


def test_gated_convolution() -> None:
    layer = layers.GatedConv2d(3, 5, 3, stride=2).double()
    x = torch.randn(2, 3, 9, 7, dtype=torch.float64)
    values, gates = np.split(layer.conv(x).detach().numpy(), 2, axis=1)
    np.testing.assert_allclose(layer(x).detach().numpy(), values * scipy.special.expit(gates), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("kernel_size", "dilation"), [(2, 1), (3, 2), (4, 3)])
def test_causal_convolution_does_not_look_ahead(kernel_size: int, dilation: int) -> None:
    layer = layers.GatedConv1d(3, 5, kernel_size, dilation=dilation, causal=True)
    x = torch.randn(1, 3, 12, requires_grad=True)
    y = layer(x)
    assert y.shape == (1, 5, 12)
    (gradient,) = torch.autograd.grad(y[:, :, 6].sum(), x)
    seen = gradient.abs().sum((0, 1)).nonzero().flatten().tolist()
    assert seen == [t for t in range(6 - dilation * (kernel_size - 1), 7, dilation) if t >= 0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layers.GLU(1)(torch.zeros(2, 5)), r"GLU: input must be of even length along axis 1, .*\(2, 5\)"),
        (lambda: layers.GLU(2)(torch.zeros(2, 4)), "GLU: input must be of even length along axis 2"),
        (lambda: layers.GatedConv1d(3, 5, 4), "GatedConv1d: kernel_size must be odd"),
        (lambda: layers.GatedConv2d(3, 5, 2), "GatedConv2d: kernel_size must be odd"),
        (lambda: layers.GatedLinear(3, 5, gate="swish"), "GatedLinear: activation is 'swish'"),
        (
            lambda: layers.GatedConv1d(3, 5, 3)(torch.zeros(2, 4, 9)),
            r"Conv1d: x must have shape \(batch, 3, time\)",
        ),
    ],
)
def test_bad_arguments(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
