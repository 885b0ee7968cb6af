"""Which parameters and buffers of several models correspond to each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_SHOWN = 6


@dataclass(frozen=True)
class Tensors:
    """Parameters and buffers of one model by name; one that has several names comes under its first."""

    parameters: Mapping[str, nn.Parameter]
    buffers: Mapping[str, Tensor]
    aliases: Mapping[str, tuple[str, ...]]
    transient: frozenset[str]

    @classmethod
    def of(cls, model: nn.Module) -> Tensors:
        """Those of a model; ``aliases`` has all names of each tensor, ``transient`` those of non-persistent buffers."""
        names: dict[Tensor, list[str]] = {}
        for name, tensor in (
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ):
            names.setdefault(tensor, []).append(name)
        return cls(
            parameters=dict(model.named_parameters()),
            buffers=dict(model.named_buffers()),
            aliases={first: (first, *others) for first, *others in names.values()},
            transient=frozenset(
                f"{path}.{name}".lstrip(".")
                for path, module in model.named_modules()
                for name in module._non_persistent_buffers_set
            ),
        )


@dataclass(frozen=True)
class Matching:
    """What the models of several tasks have in common.

    Args:
        parameters: shape of each matched parameter by name: all models have it, with the same shape, dtype and
            ``requires_grad``
        buffers: the same of buffers
        private: by task, shape of what only its own model has
    """

    parameters: Mapping[str, torch.Size]
    buffers: Mapping[str, torch.Size]
    private: Mapping[str, Mapping[str, torch.Size]]

    def __str__(self) -> str:
        size = sum(shape.numel() for shape in self.parameters.values())
        lines = [f"matched over {len(self.private)} tasks: {len(self.parameters)} parameters of {size:,} numbers each"]
        for task, shapes in self.private.items():
            named = [f"{name} {tuple(shape)}" for name, shape in shapes.items()]
            more = f" and {len(named) - _SHOWN} more" if len(named) > _SHOWN else ""
            if named:
                lines.append(f"only in {task!r}: {', '.join(named[:_SHOWN])}{more}")
        return "\n".join(lines)


def match(models: Mapping[str, Tensors]) -> Matching:
    """Compare the models of all tasks.

    Raises:
        ValueError: if several models have no parameter in common, with the parameters of the first two.
    """
    parameters = _common([tensors.parameters for tensors in models.values()], models)
    buffers = _common([tensors.buffers for tensors in models.values()], models)
    if not parameters:
        shown = "; ".join(f"{task!r} has {_described(tensors)}" for task, tensors in list(models.items())[:2])
        raise ValueError(
            f"the models of the tasks have no parameter of the same name and shape, so nothing to share: {shown}. "
            "Build them from the same class, with names and sizes that agree up to the heads"
        )
    private = {
        task: {
            name: tensor.shape
            for name, tensor in (*tensors.parameters.items(), *tensors.buffers.items())
            if name not in parameters and name not in buffers
        }
        for task, tensors in models.items()
    }
    return Matching(parameters, buffers, private)


def _common(tensors: Sequence[Mapping[str, Tensor]], models: Mapping[str, Tensors]) -> dict[str, torch.Size]:
    """Shapes of the tensors that are the same in all models but for their values, and go by the same names."""
    kinds = [
        {name: (tensor.shape, tensor.dtype, tensor.requires_grad, model.aliases[name]) for name, tensor in own.items()}
        for own, model in zip(tensors, models.values(), strict=True)
    ]
    return {name: kind[0] for name, kind in kinds[0].items() if all(other.get(name) == kind for other in kinds)}


def _described(tensors: Tensors) -> str:
    named = [f"{name} {tuple(parameter.shape)}" for name, parameter in list(tensors.parameters.items())[:3]]
    return ", ".join(named) + (", ..." if len(tensors.parameters) > len(named) else "") or "no parameter"
