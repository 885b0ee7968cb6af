"""Dense layers against numpy, and how many layers an MLP has."""

import numpy as np
import pytest
import torch
from torch import nn

import layers


def affine(x: np.ndarray, linear: nn.Module) -> np.ndarray:
    return x @ linear.weight.detach().numpy().T + linear.bias.detach().numpy()


def test_dense_is_its_formula() -> None:
    layer = layers.Dense(5, 3, activation="tanh").double()
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    expected = np.tanh(affine(x.numpy(), layer.linear))
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-12, atol=1e-14)


def test_mlp_is_its_formula() -> None:
    model = layers.MLP(5, (7, 6), 3, dropout=0.5).double().eval()
    x = torch.randn(4, 5, dtype=torch.float64)
    y = x.numpy()
    for layer in model.hidden:
        y = np.maximum(affine(y, layer.linear), 0) if isinstance(layer, layers.Dense) else y
    expected = affine(y, model.output.linear)
    np.testing.assert_allclose(model(x).detach().numpy(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("hidden", [(), (7,), (7, 6, 5)])
def test_number_of_layers_is_hidden_plus_output(hidden: tuple[int, ...]) -> None:
    model = layers.MLP(4, hidden, 3)
    assert f"{len(hidden) + 1} layers = {len(hidden)} hidden + 1 output, input 4" in repr(model)
    assert sum(isinstance(m, nn.Linear) for m in model.modules()) == len(hidden) + 1
    assert model(torch.zeros(2, 4)).shape == (2, 3)


def test_the_linear_layer_may_be_replaced() -> None:
    layer = layers.Dense(5, 3, activation="relu")
    layer.linear = layers.LowRankLinear(5, 3, 2)
    assert (layer(torch.randn(4, 5)) >= 0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layers.Dense(0, 3), "Dense: in_features must be an integer of at least 1, but is 0"),
        (lambda: layers.Dense(3, 3, activation="swish"), "Dense: activation is 'swish'; give one of"),
        (lambda: layers.Dense(3, 3)(torch.zeros(2, 4)), r"Dense: x must have shape \(\.\.\., 3\).*has shape \(2, 4\)"),
        (lambda: layers.MLP(3, (), 3)(torch.zeros(2, 4)), r"MLP: x must have shape \(\.\.\., 3\)"),
        (lambda: layers.MLP(3, (4, 0), 3), "out_features must be an integer of at least 1, but is 0"),
    ],
)
def test_bad_arguments(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
