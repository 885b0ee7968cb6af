"""Models whose parameters and buffers are kept elsewhere: empty slots that are filled for a call."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

Call = tuple[tuple[Any, ...], dict[str, Any]]


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
        self._places = {name: [_place(alias) for alias in names] for name, names in aliases.items()}

    def call(
        self, model: nn.Module, tensors: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The model with these tensors; what it puts in place of a buffer is copied into the one that was given."""
        slots = self._slots(model, tensors)
        _put(model, slots, tensors)
        try:
            output = model(*args, **kwargs)
            for name, place, attribute in slots:
                replaced = place[attribute]
                if replaced is not tensors[name] and replaced is not None:
                    tensors[name].copy_(replaced)
        finally:
            _put(model, slots, dict.fromkeys(tensors))
        return output

    def fill(self, model: nn.Module, tensors: Mapping[str, Tensor | None]) -> None:
        """Put tensors, or nothing, into the slots of a model."""
        _put(model, self._slots(model, tensors), tensors)

    def _slots(self, model: nn.Module, names: Iterable[str]) -> list[tuple[str, dict[str, Any], str]]:
        """Name of each tensor, and where it belongs: a module's dictionary and the key in it."""
        owners = dict(model.named_modules(remove_duplicate=False))
        found = []
        for name in names:
            for path, attribute in self._places[name]:
                owner = owners[path]
                place: dict[str, Any] = owner._parameters if attribute in owner._parameters else owner._buffers
                found.append((name, place, attribute))
        return found

    def filled_copy(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
        """A model of its own, with copies of these tensors as parameters and buffers."""
        model = copy.deepcopy(model)
        copies = {}
        for name, tensor in tensors.items():
            path, attribute = self._places[name][0]
            own = tensor.detach().clone()
            is_parameter = attribute in model.get_submodule(path)._parameters
            copies[name] = nn.Parameter(own, tensor.requires_grad) if is_parameter else own
        self.fill(model, copies)
        return model

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


def forget_counters(module: nn.Module, keys: Any) -> None:
    """Hook after ``load_state_dict``: without version numbers, as in a safetensors file, a batch norm whose slots are
    empty adds a counter of batches to what is loaded, and then finds it unexpected."""
    keys.unexpected_keys[:] = [
        key for key in keys.unexpected_keys if not ("models." in key and key.endswith(".num_batches_tracked"))
    ]


def _put(
    model: nn.Module, slots: Iterable[tuple[str, dict[str, Any], str]], tensors: Mapping[str, Tensor | None]
) -> None:
    for name, place, attribute in slots:
        place[attribute] = tensors[name]
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()


def _place(name: str) -> tuple[str, str]:
    path, _, attribute = name.rpartition(".")
    return path, attribute


def by_task_calls(tasks: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Call]:
    """Arguments of each task's model: the same for all, or taken from one dict by task name.

    Raises:
        ValueError: for a dict with some task names and other keys.
    """
    by_task = args[0] if len(args) == 1 and not kwargs and isinstance(args[0], dict) else None if args else kwargs
    if not by_task or not set(by_task) & set(tasks):
        return dict.fromkeys(tasks, (args, kwargs))
    unknown = sorted(map(str, set(by_task) - set(tasks)))
    if unknown:
        raise ValueError(f"inputs by task: there is no task {unknown[0]!r}; there are {', '.join(tasks)}")
    return {task: _arguments(by_task[task]) for task in tasks if task in by_task}


def _arguments(inputs: Any) -> Call:
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    return ((), dict(inputs)) if isinstance(inputs, dict) else ((inputs,), {})


def task_index(tasks: Sequence[str], name: str) -> int:
    """Where the task is.

    Raises:
        ValueError: if there is no such task.
    """
    if name not in tasks:
        raise ValueError(f"there is no task {name!r}; there are {', '.join(tasks)}")
    return tasks.index(name)
