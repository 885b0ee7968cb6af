"""A network from a list of layers described as data."""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layers._checks import check_positive, check_shape, fail

Spec = Mapping[str, Any] | nn.Module

# What layers call the number of their input's channels or features, and the axis that has it.
_WIDTHS = {
    "in_channels": 1,
    "channels": 1,
    "num_features": 1,
    "in_features": -1,
    "features": -1,
    "input_size": -1,
}


class Network(nn.Module):
    """Layers in a row, each given by its name and arguments: (batch, *input_shape) -> what the last layer gives.

    A spec is a mapping with the name of a layer of `layers` or `torch.nn` under "layer" and its arguments beside it, so
    that a network can be read from YAML or JSON; a built module serves as well. The width of a layer's input
    (`in_channels`, `in_features`, ...) need not be given: it is that of the layer before. Of a layer that returns a
    tuple the first element goes on.

    The last layer that has a matrix of weights is the output layer, those before it are hidden; what has none (pooling,
    dropout, norms) is no layer (Goodfellow, Bengio, Courville: Deep Learning, 2016, section 6.4). The input is not one
    either. `repr` shows the count. `input_dtype` is that of the input, `torch.long` for indices into an embedding.

    Raises ValueError naming the number of the spec, for a name that nobody has, arguments that a layer does not take,
    and layers that do not fit each other; and where no layer has weights.

    >>> network = Network((1, 8, 8), [
    ...     {"layer": "ConvBNAct", "out_channels": 16, "kernel_size": 3},
    ...     {"layer": "GlobalPool", "kind": "max"},
    ...     {"layer": "Dense", "out_features": 32, "activation": "tanh"},
    ...     {"layer": "Dense", "out_features": 10},
    ... ])
    >>> network.extra_repr()
    '3 layers = 2 hidden + 1 output, input (1, 8, 8)'
    >>> network(torch.zeros(5, 1, 8, 8)).shape
    torch.Size([5, 10])
    """

    def __init__(
        self, input_shape: Sequence[int], specs: Sequence[Spec], *, input_dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        check_positive(self, **{f"input_shape[{axis}]": length for axis, length in enumerate(input_shape)})
        self.input_shape = tuple(input_shape)
        x = torch.zeros(2, *input_shape, dtype=input_dtype, device="meta")
        modules: list[nn.Module] = []
        for number, spec in enumerate(specs):
            try:
                modules.append(spec if isinstance(spec, nn.Module) else _build(spec, x))
                x = _first(copy.deepcopy(modules[-1]).to("meta").eval()(x))
            except (TypeError, ValueError, RuntimeError, IndexError) as error:
                described = spec if isinstance(spec, nn.Module) else dict(spec)
                what = f"spec {number}, {described}, does not fit an input of shape (batch"
                lengths = "".join(f", {n}" for n in x.shape[1:])
                raise fail(self, f"{what}{lengths}): {error}") from error
        layers = [i for i, module in enumerate(modules) if any(p.dim() > 1 for p in module.parameters())]
        if not layers:
            raise fail(self, "specs must hold a layer with weights to be the output layer, but hold none")
        self.num_layers = len(layers)
        self.hidden = nn.Sequential(*modules[: layers[-1]])
        self.output = nn.Sequential(*modules[layers[-1] :])

    def forward(self, x: Tensor) -> Tensor:
        check_shape(self, "x", x, ("batch", *map(str, self.input_shape)))  # other sizes may fit: the layers know
        for module in (*self.hidden, *self.output):
            x = _first(module(x))
        return x

    def extra_repr(self) -> str:
        return f"{self.num_layers} layers = {self.num_layers - 1} hidden + 1 output, input {self.input_shape}"


def _build(spec: Mapping[str, Any], x: Tensor) -> nn.Module:
    """The module that `spec` describes, for inputs like `x`."""
    arguments = dict(spec)
    name = arguments.pop("layer", None)
    make = _constructor(name)
    taken = inspect.signature(make).parameters
    width = next((p for p in taken if p in _WIDTHS), None)
    if width is not None and width not in arguments and taken[width].default is inspect.Parameter.empty:
        arguments[width] = x.shape[_WIDTHS[width]]
    return make(**arguments)


def _constructor(name: object) -> Callable[..., nn.Module]:
    import layers

    for package, names in ((layers, layers.__all__), (nn, dir(nn))):
        found = getattr(package, name) if isinstance(name, str) and name in names else None
        if isinstance(found, type) and issubclass(found, nn.Module):
            return found
    raise ValueError(f'"layer" is {name!r}, which is no layer of `layers` or `torch.nn`')


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result
