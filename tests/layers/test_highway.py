"""Highway blocks against the equations of the paper."""

import numpy as np
import pytest
import scipy.special
import torch
from torch import nn

import layers

BLOCKS = {
    "dense": (lambda carry: layers.Highway(5, carry=carry, activation="tanh"), (4, 5)),
    "conv1d": (lambda carry: layers.HighwayConv1d(5, 3, carry=carry, activation="tanh"), (2, 5, 7)),
    "conv2d": (lambda carry: layers.HighwayConv2d(5, 3, carry=carry, activation="tanh"), (2, 5, 7, 6)),
}


@pytest.mark.parametrize("carry", ["coupled", "free"])
@pytest.mark.parametrize("name", BLOCKS)
def test_is_its_formula(name: str, carry: str) -> None:
    make, shape = BLOCKS[name]
    block = make(carry).double()
    x = torch.randn(shape, dtype=torch.float64)
    part = {child: module(x).detach().numpy() for child, module in block.named_children() if child != "activation"}
    t = scipy.special.expit(part["transform_gate"])
    c = 1 - t if carry == "coupled" else scipy.special.expit(part["carry_gate"])
    expected = np.tanh(part["transform"]) * t + x.numpy() * c
    np.testing.assert_allclose(block(x).detach().numpy(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("carry", ["coupled", "free"])
def test_the_bias_decides_what_it_begins_with(carry: str) -> None:
    x = torch.randn(4, 5)
    carrying = layers.Highway(5, carry=carry, gate_bias=-50)
    torch.testing.assert_close(carrying(x), x)
    transforming = layers.Highway(5, carry=carry, gate_bias=50)
    torch.testing.assert_close(transforming(x), transforming.transform(x).relu())


def test_sizes_stay_with_a_wide_kernel() -> None:
    assert layers.HighwayConv1d(4, 7)(torch.zeros(2, 4, 3)).shape == (2, 4, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layers.Highway(5, carry="none"), "Highway: carry must be one of 'coupled', 'free', but is 'none'"),
        (lambda: layers.Highway(0), "Highway: features must be an integer of at least 1"),
        (lambda: layers.HighwayConv2d(5, 4), "HighwayConv2d: kernel_size must be odd .* but is 4"),
        (
            lambda: layers.HighwayConv1d(5, 3)(torch.zeros(2, 4, 7)),
            r"Conv1d: x must have shape \(batch, 5, time\)",
        ),
        (lambda: layers.Highway(5)(torch.zeros(2, 4)), r"Highway: x must have shape \(\.\.\., 5\)"),
    ],
)
def test_bad_arguments(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_deep_stacks_train_at_first() -> None:
    """What the block is for: through thirty of them a gradient arrives that thirty plain layers lose."""
    x = torch.randn(4, 8)
    norms = []
    for make in (lambda: layers.Highway(8), lambda: layers.Dense(8, 8, activation="relu")):
        model = nn.Sequential(*(make() for _ in range(30)))
        (gradient,) = torch.autograd.grad(model(x.requires_grad_()).sum(), x)
        norms.append(float(gradient.norm()))
    assert norms[0] > 100 * norms[1]
