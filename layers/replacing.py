"""Put modules in the place of others, wherever they stand in a model."""

from collections.abc import Mapping

from torch import nn


def replace_modules(model: nn.Module, made: Mapping[nn.Module, nn.Module]) -> None:
    """Wherever a key of `made` is a child inside `model`, under whatever name, its value takes the place, in place.

    >>> model, norm = nn.Sequential(nn.ReLU()), nn.Tanh()
    >>> replace_modules(model, {model[0]: norm})
    >>> model[0] is norm
    True
    """
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is not None and child in made:
                module._modules[name] = made[child]
