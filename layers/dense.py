"""Fully connected layers, and the classical network made of them."""

from collections.abc import Sequence

from torch import Tensor, nn

from layers._checks import check_positive, check_shape
from layers.activation import activation_module
from layers.dropout import Dropout


class Dense(nn.Module):
    """Linear layer and activation: y = f(W x + b).

    Input (*, in_features), output (*, out_features). `activation` is a name of `layers.ACTIVATIONS`, None or a module.
    The steps are the children `linear` and `activation`. Source: Rumelhart, Hinton, Williams: Learning Representations
    by Back-Propagating Errors (1986), equations 1 and 2.

    Raises ValueError for sizes below 1, an unknown activation, and an input whose last axis is not in_features.

    >>> Dense(3, 5, activation="relu")(torch.zeros(2, 3)).shape
    torch.Size([2, 5])
    """

    def __init__(
        self, in_features: int, out_features: int, *, activation: str | nn.Module | None = None, bias: bool = True
    ) -> None:
        super().__init__()
        check_positive(self, in_features=in_features, out_features=out_features)
        self.linear: nn.Module = nn.Linear(in_features, out_features, bias=bias)
        self.activation = activation_module(self, activation)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.linear, nn.Linear):  # it may have been replaced, for example by a factorisation
            check_shape(self, "x", x, ("...", self.linear.in_features))
        y = self.linear(x)
        return y if self.activation is None else self.activation(y)


class MLP(nn.Module):
    """Multi-layer perceptron: hidden layers with an activation, then an output layer without: (*, in) -> (*, out).

    The number of layers, as `repr` shows, is that of the hidden layers and the output layer; the input is not a layer.
    `dropout` is the probability for the values between layers. Source: Goodfellow, Bengio, Courville: Deep Learning
    (2016), section 6.4.

    Raises ValueError for sizes below 1, an unknown activation, and an input whose last axis is not in_features.

    >>> MLP(8, (16, 16), 3)
    MLP(
      3 layers = 2 hidden + 1 output, input 8
      (hidden): Sequential(
        (0): Dense(
          (linear): Linear(in_features=8, out_features=16, bias=True)
          (activation): ReLU(inplace=True)
        )
        (1): Dense(
          (linear): Linear(in_features=16, out_features=16, bias=True)
          (activation): ReLU(inplace=True)
        )
      )
      (output): Dense(
        (linear): Linear(in_features=16, out_features=3, bias=True)
      )
    )
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int],
        out_features: int,
        *,
        activation: str | nn.Module = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.in_features, self.num_layers = in_features, len(hidden) + 1
        widths = (in_features, *hidden)
        modules: list[nn.Module] = []
        for i, width in enumerate(hidden):
            modules.append(Dense(widths[i], width, activation=activation))
            if dropout:
                modules.append(Dropout(dropout))
        self.hidden = nn.Sequential(*modules)
        self.output = Dense(widths[-1], out_features)

    def forward(self, x: Tensor) -> Tensor:
        check_shape(self, "x", x, ("...", self.in_features))
        return self.output(self.hidden(x))

    def extra_repr(self) -> str:
        return f"{self.num_layers} layers = {self.num_layers - 1} hidden + 1 output, input {self.in_features}"
