"""Activations, and the losses that belong to them at the output of a network.

| name | f(x) | range |
|---|---|---|
| `Sigmoid` | 1 / (1 + exp(-x)) | (0, 1) |
| `Tanh` | (exp(x) - exp(-x)) / (exp(x) + exp(-x)) | (-1, 1) |
| `ReLU` | max(0, x) | [0, inf) |
| `ReLU6` | min(max(0, x), 6) | [0, 6] |
| `LeakyReLU` | x for x >= 0, else slope x | (-inf, inf) |
| `Softmax` | exp(x_i) / sum_j exp(x_j) along `dim` | (0, 1), sum 1 |

These are the modules of `torch.nn`, for tensors of any shape. Networks put out what comes *before* the last activation
(logits), and the loss applies it, which is exact where the probabilities round to 0 or 1: `MultiClassLoss` for softmax,
`BinaryLoss` for sigmoid, `RegressionLoss` for none.

Source: Goodfellow, Bengio, Courville: Deep Learning (2016), sections 6.2.2 and 6.3; ReLU6: Krizhevsky, Convolutional
Deep Belief Networks on CIFAR-10 (2010); leaky ReLU: Maas et al., Rectifier Nonlinearities Improve Neural Network
Acoustic Models (2013), equation 2.

>>> Softmax(dim=-1)(torch.tensor([0.0, 0.0]))
tensor([0.5000, 0.5000])
"""

from collections.abc import Callable, Mapping
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import LeakyReLU, ReLU, ReLU6, Sigmoid, Softmax, Tanh

from layers._checks import Layer, check_choice, check_range, check_shape, fail, readable

__all__ = [
    "ACTIVATIONS",
    "BinaryLoss",
    "LeakyReLU",
    "MultiClassLoss",
    "ReLU",
    "ReLU6",
    "RegressionLoss",
    "Sigmoid",
    "Softmax",
    "Tanh",
    "activation_module",
]

ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    # In place, as the layers here that take an activation do not need what it overwrites for their gradients.
    "relu": lambda: ReLU(inplace=True),
    "relu6": lambda: ReLU6(inplace=True),
    "leaky_relu": lambda: LeakyReLU(inplace=True),
    "sigmoid": Sigmoid,
    "tanh": Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}


def activation_module(layer: Layer, activation: str | nn.Module | None) -> nn.Module | None:
    """The module that `activation` names; a module and None stay what they are.

    Raises ValueError for a name that is not in `ACTIVATIONS`.

    >>> activation_module("example", "tanh")
    Tanh()
    """
    if activation is None or isinstance(activation, nn.Module):
        return activation
    if activation not in ACTIVATIONS:
        names = ", ".join(map(repr, ACTIVATIONS))
        raise fail(layer, f"activation is {activation!r}; give one of {names}, None or a torch.nn.Module")
    return ACTIVATIONS[activation]()


class MultiClassLoss(nn.CrossEntropyLoss):
    """Cross-entropy of softmax: mean over the targets of -log softmax(x)[target].

    Input logits (batch, num_classes, *) and targets (batch, *), integers in [0, num_classes) or `ignore_index`, which
    does not count. Takes the arguments of `torch.nn.CrossEntropyLoss`.

    Raises ValueError for shapes that do not fit, and for targets out of range (which would stop a CUDA device for
    good).

    >>> MultiClassLoss()(torch.zeros(2, 4), torch.tensor([0, 3]))  # log 4
    tensor(1.3863)
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        check_shape(self, "input", input, ("batch", "num_classes", "..."))
        check_shape(self, "target", target, (input.shape[0], *input.shape[2:]))
        if readable(target):
            counted = target[target != self.ignore_index]
            if counted.numel() > 0:
                check_range(self, "target", counted, 0, input.shape[1] - 1)
        return super().forward(input, target)


class BinaryLoss(nn.BCEWithLogitsLoss):
    """Cross-entropy of the sigmoid: mean of -t log s(x) - (1 - t) log(1 - s(x)), s the sigmoid.

    Input logits and targets of one shape (*); targets from 0 to 1, of any number type. For several labels at once too.
    Takes the arguments of `torch.nn.BCEWithLogitsLoss`.

    Raises ValueError for shapes that differ, and for targets out of range.

    >>> BinaryLoss()(torch.zeros(3), torch.tensor([0, 1, 1]))  # log 2
    tensor(0.6931)
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        check_shape(self, "target", target, tuple(input.shape))
        if readable(target) and not bool(((target >= 0) & (target <= 1)).all()):
            raise fail(self, f"target must be from 0 to 1, but has {float(target.min())} to {float(target.max())}")
        return super().forward(input, target.to(input.dtype))


class RegressionLoss(nn.Module):
    """Mean over all elements of a function of the error e = x - t.

    `kind` "squared": e^2; "absolute": |e|; "huber": e^2 / 2 up to |e| = delta, delta (|e| - delta / 2) beyond (Huber:
    Robust Estimation of a Location Parameter, 1964). Input and target of one shape (*).

    Raises ValueError for shapes that differ: broadcasting them is the classical silent error.

    >>> RegressionLoss("absolute")(torch.tensor([1.0, 4.0]), torch.tensor([2.0, 2.0]))
    tensor(1.5000)
    """

    def __init__(self, kind: Literal["squared", "absolute", "huber"] = "squared", *, delta: float = 1.0) -> None:
        super().__init__()
        check_choice(self, "kind", kind, ("squared", "absolute", "huber"))
        if delta <= 0:
            raise fail(self, f"delta must be positive, but is {delta}")
        self.kind, self.delta = kind, delta

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        check_shape(self, "target", target, tuple(input.shape))
        if self.kind == "squared":
            return F.mse_loss(input, target)
        if self.kind == "absolute":
            return F.l1_loss(input, target)
        return F.huber_loss(input, target, delta=self.delta)

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}" + (f", delta={self.delta}" if self.kind == "huber" else "")
