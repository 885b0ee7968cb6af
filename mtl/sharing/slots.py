"""Models whose parameters and buffers are kept elsewhere: empty slots that are filled for a call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn


class Slots:
    """The places of some tensors in models of one kind.

    A slot is an entry None of a module's parameters or buffers, as ``register_parameter(name, None)`` makes it: the
    model does not list it, save it or move it. (``torch.func.functional_call`` does the same, but not for recurrent
    layers, which keep a second list of their weights.)

    Args:
        aliases: all dotted names of each tensor, by the first of them
    """

    def __init__(self, aliases: Mapping[str, Sequence[str]]) -> None:
        self.aliases = aliases

    def call(self, model: nn.Module, tensors: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model with these tensors; a buffer that it replaced is replaced in ``tensors``."""
        self.fill(model, tensors)
        try:
            return model(*args, **kwargs)
        finally:
            for name in tensors:
                owner, attribute = _owner(model, self.aliases[name][0])
                tensors[name] = owner._buffers.get(attribute, tensors[name])  # type: ignore[assignment]
            self.fill(model, dict.fromkeys(tensors))

    def fill(self, model: nn.Module, tensors: Mapping[str, Tensor | None]) -> None:
        """Put tensors, or nothing, into the slots of a model."""
        for name, tensor in tensors.items():
            for alias in self.aliases[name]:
                owner, attribute = _owner(model, alias)
                place: dict[str, Any] = owner._parameters if attribute in owner._parameters else owner._buffers
                place[attribute] = tensor
        for module in model.modules():
            if isinstance(module, nn.RNNBase):
                module._init_flat_weights()

    def within(self, path: str) -> Slots:
        """Those of a submodule, under the names that they have in it."""
        inside = f"{path}."
        found = {
            name: tuple(alias.removeprefix(inside) for alias in aliases if alias.startswith(inside))
            for name, aliases in self.aliases.items()
        }
        return Slots({name: aliases for name, aliases in found.items() if aliases})

    def without(self, path: str) -> Slots:
        """Those outside of a submodule."""
        inside = self.within(path).aliases
        return Slots({name: aliases for name, aliases in self.aliases.items() if name not in inside})


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute
