"""Activations and losses against numpy and scipy."""

import numpy as np
import pytest
import scipy.special
import torch
from torch import nn

import layers
from layers.activation import ACTIVATIONS, activation_module

X = np.array([-30.0, -2.0, -0.5, 0.0, 0.3, 5.0, 7.5, 40.0])
FORMULAS = {
    "sigmoid": scipy.special.expit(X),
    "tanh": np.tanh(X),
    "relu": np.maximum(X, 0),
    "relu6": np.clip(X, 0, 6),
    "leaky_relu": np.where(X >= 0, X, 0.01 * X),
    "gelu": X * scipy.special.ndtr(X),
    "silu": X * scipy.special.expit(X),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_their_formulas(name: str) -> None:
    module = activation_module("test", name)
    assert module is not None
    np.testing.assert_allclose(module(torch.tensor(X)).numpy(), FORMULAS[name], rtol=1e-12, atol=1e-14)


def test_softmax() -> None:
    x = np.random.default_rng(0).normal(size=(3, 4, 5)) * 50
    np.testing.assert_allclose(layers.Softmax(1)(torch.tensor(x)).numpy(), scipy.special.softmax(x, 1), rtol=1e-12)


def test_modules_and_none_stay() -> None:
    module = nn.SELU()
    assert activation_module("test", module) is module
    assert activation_module("test", None) is None
    with pytest.raises(ValueError, match="test: activation is 'swish'; give one of 'relu'.*torch.nn.Module"):
        activation_module("test", "swish")


def test_multi_class_loss() -> None:
    x = np.random.default_rng(1).normal(size=(4, 3, 5)) * 30
    target = np.random.default_rng(2).integers(0, 3, (4, 5))
    target[0, :2] = -100
    scores = np.take_along_axis(scipy.special.log_softmax(x, 1), np.maximum(target, 0)[:, None], 1)[:, 0]
    expected = -scores[target != -100].mean()
    assert float(layers.MultiClassLoss()(torch.tensor(x), torch.tensor(target))) == pytest.approx(expected, rel=1e-12)


def test_binary_loss_is_exact_where_probabilities_round() -> None:
    x, target = np.array([-800.0, 800.0, 0.3]), np.array([1, 1, 0])
    expected = -(target * scipy.special.log_expit(x) + (1 - target) * scipy.special.log_expit(-x)).mean()
    assert float(layers.BinaryLoss()(torch.tensor(x), torch.tensor(target))) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", ["squared", "absolute", "huber"])
def test_regression_loss(kind: str) -> None:
    x, t = np.random.default_rng(3).normal(size=(2, 7, 3)) * 2
    e = x - t
    huber = scipy.special.huber(0.7, e)
    expected = {"squared": e**2, "absolute": np.abs(e), "huber": huber}[kind].mean()
    found = layers.RegressionLoss(kind, delta=0.7)(torch.tensor(x), torch.tensor(t))
    assert float(found) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("loss", "x", "target", "message"),
    [
        (layers.MultiClassLoss, (4, 3), torch.tensor([0, 1, 3, 2]), "MultiClassLoss: target must be from 0 to 2, but"),
        (layers.MultiClassLoss, (4, 3), torch.tensor([0, 1]), r"target must have shape \(4,\).*has shape \(2,\)"),
        (layers.MultiClassLoss, (4, 3), torch.zeros(4), "target must be a tensor of integers"),
        (
            layers.BinaryLoss,
            (4,),
            torch.tensor([0, 1, 2, 0]),
            "BinaryLoss: target must be from 0 to 1, .* to 2",
        ),
        (layers.BinaryLoss, (4,), torch.zeros(4, 1), r"target must have shape \(4,\)"),
        (layers.RegressionLoss, (4, 1), torch.zeros(4), r"RegressionLoss: target must have shape \(4, 1\)"),
        (layers.RegressionLoss, (0,), torch.zeros(0), "no axis empty"),
    ],
)
def test_bad_targets(loss, x, target, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss()(torch.zeros(x), target)


def test_bad_kind() -> None:
    with pytest.raises(ValueError, match="RegressionLoss: kind must be one of 'squared', .* but is 'l2'"):
        layers.RegressionLoss("l2")
    with pytest.raises(ValueError, match="RegressionLoss: delta must be positive, but is 0"):
        layers.RegressionLoss("huber", delta=0)
