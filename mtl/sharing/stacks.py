"""Tensors of several models, stacked along a task axis and kept under the names that they have in one model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn


class Stacks(nn.Module):
    """Parameters and buffers under dotted names, each with the task axis in front.

    The names live in a tree of modules, so that ``state_dict`` and ``named_parameters`` show them as they are:
    ``stacks.conv1.weight`` holds ``conv1.weight`` of all tasks.

    Args:
        parameters: by name, (number of tasks, *shape)
        buffers: by name, likewise
        transient: names of buffers that ``state_dict`` leaves out
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        buffers: Mapping[str, Tensor],
        transient: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__()
        for name, parameter in parameters.items():
            owner, attribute = self._owner(name)
            owner.register_parameter(attribute, parameter)
        for name, buffer in buffers.items():
            owner, attribute = self._owner(name)
            owner.register_buffer(attribute, buffer, persistent=name not in transient)

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        *path, attribute = name.split(".")
        module: nn.Module = self
        for part in path:
            if part not in module._modules:
                module.add_module(part, Stacks({}, {}))
            module = module.get_submodule(part)
        return module, attribute


def weight_axes(model: nn.Module) -> Iterator[tuple[nn.Parameter, int]]:
    """Each parameter with its number of axes, that of tasks not counted: a stack of biases is biases."""
    seen = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter not in seen:
                seen.add(parameter)
                yield parameter, parameter.dim() - isinstance(module, Stacks)
