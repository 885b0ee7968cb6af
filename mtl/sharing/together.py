"""The models of all tasks as one stacked computation, for devices that are slow at many small kernels."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from mtl.batch import mode
from mtl.sharing.matching import Matching
from mtl.sharing.slots import Call, Slots


class Together:
    """Runs what the models have in common under ``torch.func.vmap``, and a head of their own one after the other.

    That is possible where the models are alike but for the values of their tensors, up to one module that makes the
    output of the model. Batch norm and dropout do in it what they do in each model by itself.

    Args:
        models: with empty slots where the matched tensors belong
        matched: which those are
        slots: where they are

    Raises:
        ValueError: where that is not possible, with the reason.
    """

    def __init__(self, models: Mapping[str, nn.Module], matched: Matching, slots: Slots) -> None:
        self.models, self.slots = models, slots
        self.head = _common_owner([name for shapes in matched.private.values() for name in shapes])
        if self.head == "":
            raise ValueError("parameters that not all models have are in several places")
        first, *others = models.values()
        for other in others:
            _check_alike(first, other, self.head)
        self.trunk = copy.deepcopy(first)
        if self.head is not None:
            self.trunk.set_submodule(self.head, nn.Identity())
        self.trunk_slots = slots if self.head is None else slots.without(self.head)
        self.head_slots = Slots({}) if self.head is None else slots.within(self.head)
        self.tried = False

    def __call__(self, tensors: Mapping[str, Tensor], calls: Mapping[str, Call]) -> dict[str, Any] | None:
        """``{task: output}``; None where inputs or modes of the tasks are not alike this time.

        Args:
            tensors: stacks of parameters and buffers by name; batch norm changes the buffers in place
            calls: arguments of each task's model

        Raises:
            ValueError: as above, at the first call.
        """
        inputs = _stacked(list(calls.values())) if len(calls) == len(self.models) else None
        if inputs is None or not self._same_modes():
            return None
        if not self.tried:
            self._try(tensors, calls, inputs)
            self.tried = True
        return self._run(tensors, calls, inputs)

    def _run(self, tensors: Mapping[str, Tensor], calls: Mapping[str, Call], inputs: _Inputs) -> dict[str, Any]:
        leaves, axes, structure = inputs

        def one(tensors: dict[str, Tensor], *leaves: Any) -> Any:
            args, kwargs = tree_unflatten(list(leaves), structure)
            return self.trunk_slots.call(self.trunk, tensors, args, kwargs)

        shared = {name: tensors[name] for name in self.trunk_slots.aliases}
        flat, form = tree_flatten(vmap(one, in_dims=(0, *axes), randomness="different")(shared, *leaves))
        features = zip(*(leaf.unbind() for leaf in flat), strict=True)
        own = [tree_unflatten(list(leaves), form) for leaves in features]
        if self.head is None:
            return dict(zip(calls, own, strict=True))
        outputs = {}
        for index, (task, feature) in enumerate(zip(calls, own, strict=True)):
            head = self.models[task].get_submodule(self.head)
            views = {name: tensors[name][index] for name in self.head_slots.aliases}
            outputs[task] = self.head_slots.call(head, views, (feature,), {})
        return outputs

    def _try(self, tensors: Mapping[str, Tensor], calls: Mapping[str, Call], inputs: _Inputs) -> None:
        """Once, on copies of the buffers: does the head make the output, and can vmap run the rest?"""
        copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        with torch.no_grad(), torch.random.fork_rng(devices=_devices(tensors)):
            if self.head is not None:
                self._check_head(copies, *next(iter(calls.items())))
            try:
                self._run(copies, calls, inputs)
            except RuntimeError as error:
                raise ValueError(f"torch.func.vmap cannot run them: {str(error).splitlines()[0]}") from None

    def _check_head(self, tensors: Mapping[str, Tensor], task: str, call: Call) -> None:
        assert self.head is not None
        model = self.models[task]
        seen: list[tuple[Any, Any]] = []
        head = model.get_submodule(self.head)
        handle = head.register_forward_hook(lambda module, args, output: seen.append((args, output)))
        views = {name: tensor[0] for name, tensor in tensors.items()}
        try:
            with mode(model, training=False):
                output = self.slots.call(model, views, *call)
        finally:
            handle.remove()
        if len(seen) != 1 or seen[0][1] is not output or len(seen[0][0]) != 1:
            raise ValueError(f"{self.head} has parameters that not all models have, and does not make the output")

    def _same_modes(self) -> bool:
        """Every model's modules are in the same modes; those of the trunk follow."""
        modes = {
            tuple(module.training for name, module in model.named_modules() if not _within(name, self.head))
            for model in self.models.values()
        }
        if len(modes) > 1:
            return False
        trunk = [module for name, module in self.trunk.named_modules() if not _within(name, self.head)]
        for module, training in zip(trunk, *modes, strict=True):
            module.training = training
        return True


_Inputs = tuple[list[Any], tuple[int | None, ...], Any]


def _stacked(calls: Sequence[Call]) -> _Inputs | None:
    """Leaves of the arguments, the axis of tasks in each (None: the same for all), and how they hang together."""
    if all(call is calls[0] for call in calls):
        shared, structure = tree_flatten(calls[0])
        return shared, (None,) * len(shared), structure
    trees = [tree_flatten(call) for call in calls]
    structure = trees[0][1]
    if any(other != structure for _, other in trees):
        return None
    leaves: list[Any] = []
    axes: list[int | None] = []
    for column in zip(*(leaves for leaves, _ in trees), strict=True):
        if all(isinstance(leaf, Tensor) for leaf in column):
            if len({(leaf.shape, leaf.dtype) for leaf in column}) > 1:
                return None
            leaves.append(torch.stack(column))
            axes.append(0)
        elif all(leaf is column[0] or leaf == column[0] for leaf in column):
            leaves.append(column[0])
            axes.append(None)
        else:
            return None
    return leaves, tuple(axes), structure


def _common_owner(names: Sequence[str]) -> str | None:
    """The smallest module that holds all of these; None where there is no name."""
    if not names:
        return None
    levels = zip(*(name.split(".")[:-1] for name in names), strict=False)
    same = itertools.takewhile(lambda parts: len(set(parts)) == 1, levels)
    return ".".join(parts[0] for parts in same)


def _check_alike(model: nn.Module, other: nn.Module, head: str | None) -> None:
    mine, others = (
        {name: module for name, module in each.named_modules() if not _within(name, head)} for each in (model, other)
    )
    if list(mine) != list(others):
        raise ValueError("the models have different modules")
    for name, module in mine.items():
        if type(module) is not type(others[name]) or _settings(module) != _settings(others[name]):
            raise ValueError(f"module {name or 'at the top'} is set differently in the models")


def _settings(module: nn.Module) -> dict[str, Any]:
    hidden = ("_parameters", "_buffers", "_modules", "training")
    settings = {name: value for name, value in vars(module).items() if name not in hidden}
    return {name: id(value) if isinstance(value, Tensor) else value for name, value in settings.items()}


def _within(name: str, head: str | None) -> bool:
    return head is not None and (name == head or name.startswith(f"{head}."))


def _devices(tensors: Mapping[str, Tensor]) -> list[torch.device]:
    return list({tensor.device for tensor in tensors.values() if tensor.device.type == "cuda"})
