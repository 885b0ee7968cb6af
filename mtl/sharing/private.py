"""Copies of a module that share all but what is private."""

from __future__ import annotations

import copy
import glob
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

Pattern = str | type[nn.Module]


def private_tensors(module: nn.Module, patterns: Sequence[Pattern]) -> set[str]:
    """Names of the parameters and buffers that the patterns fit.

    Args:
        module: that has them
        patterns: of names, as on a command line (``*`` fits anything), or classes of modules, all of whose are meant

    Raises:
        ValueError: for a pattern that fits nothing.
    """
    names = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    owners = dict(module.named_modules())
    found: set[str] = set()
    for pattern in patterns:
        if isinstance(pattern, str):
            fitting = [name for name in names if fnmatchcase(name, pattern)]
        else:
            fitting = [name for name in names if isinstance(owners[name.rpartition(".")[0]], pattern)]
        if not fitting:
            shown = f"{pattern!r}" if isinstance(pattern, str) else pattern.__name__
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            raise ValueError(f"private: {shown} fits no parameter of the trunk; there are {', '.join(names[:8])}{more}")
        found.update(fitting)
    return found


def patterns_after(module: nn.Module, num_layers: int | None = None) -> list[str]:
    """Patterns of all parameters and buffers behind the first layers: private, they leave those shared.

    A layer is a module with a weight of two axes or more, such as a convolution, and what follows before the next one,
    such as its batch norm, in the order of definition.

    Args:
        module: that has the layers
        num_layers: how many are not to fit; default: half of all, rounded down

    Raises:
        ValueError: unless ``num_layers`` is at least 1 and leaves one.

    Example:
        >>> trunk = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8, bias=False))
        >>> patterns_after(trunk, 1)
        ['3.weight']
    """
    layer_of: dict[str, int] = {}  # by the path of the module
    number = 0
    for path, part in module.named_modules():
        number += any(parameter.dim() > 1 for parameter in part.parameters(recurse=False))
        layer_of[path] = number
    wanted = number // 2 if num_layers is None else num_layers
    if not 1 <= wanted < number:
        raise ValueError(f"{wanted} first layers are to be shared, but the trunk has {number}: share 1 to {number - 1}")
    names = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    return [glob.escape(name) for name in names if layer_of[name.rpartition(".")[0]] > wanted]


def own_copy(module: nn.Module, patterns: Sequence[Pattern]) -> nn.Module:
    """A copy with private tensors of its own, in which every other tensor is the same object.

    So is every part without private tensors: moving the model to another device replaces buffers, part by part.
    """
    private = private_tensors(module, patterns)
    shared: dict[int, object] = {
        id(part): part
        for path, part in module.named_modules()
        if not any(name == path or name.startswith(f"{path}.") for name in private) and path
    }
    tensors = (*module.named_parameters(), *module.named_buffers())
    shared |= {id(tensor): tensor for name, tensor in tensors if name not in private}
    return copy.deepcopy(module, shared)


def split_stem(module: nn.Module, private: set[str]) -> tuple[nn.Module | None, nn.Module]:
    """The first children of an ``nn.Sequential`` that have nothing private, and the rest; None where there are none."""
    if not isinstance(module, nn.Sequential):
        return None, module
    children = [name for name, _ in module.named_children()]
    private_children = {name.partition(".")[0] for name in private}
    length = next(index for index, name in enumerate(children) if name in private_children)
    return (module[:length], module[length:]) if length else (None, module)
