"""Values inside values: what modules keep in lists, tuples, dicts and configuration objects."""

import copy
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any

import torch
from torch import Tensor

Step = int | str
Path = tuple[Step, ...]


def parts(value: Any) -> Iterator[tuple[Step, Any]]:
    """What ``value`` holds, each with the step that leads there: an index, a key, or the name of an attribute."""
    if type(value) in (list, tuple):
        yield from enumerate(value)
    elif type(value) is dict:
        yield from ((key, item) for key, item in value.items() if type(key) in (int, str))
    elif _is_record(value):
        yield from vars(value).items()


def part(value: Any, step: Step) -> Any:
    """What lies at ``step``.

    Raises:
        LookupError: nothing does.
    """
    for known, item in parts(value):
        if known == step:
            return item
    raise LookupError(f"{type(value).__name__} has no {step!r}")


def changed(value: Any, change: Callable[[Step, Any], Any]) -> Any:
    """A copy of ``value`` (of one level) in which ``change(step, part)`` is in the place of each part.

    ``value`` itself where nothing changes: what is shared stays shared.
    """
    new = {step: change(step, item) for step, item in parts(value)}
    if all(new[step] is item for step, item in parts(value)):
        return value
    if type(value) is dict:
        return {**value, **new}
    if type(value) in (list, tuple):
        return type(value)(new.values())
    copied = copy.copy(value)
    for name, item in new.items():
        object.__setattr__(copied, str(name), item)  # frozen dataclasses too
    return copied


def _is_record(value: Any) -> bool:
    """Whether the value is a configuration: an object of plain data alone, so that a copy of it means the same."""
    return (
        not isinstance(value, type) and not callable(value) and hasattr(value, "__dict__") and _is_plain(value, DEPTH)
    )


DEPTH = 4  # configurations inside configurations; anything deeper refers to itself or is no configuration


def _is_plain(value: Any, depth: int) -> bool:
    if isinstance(value, bool | int | float | str | torch.dtype | torch.device | Enum | None):
        return True
    if depth == 0 or isinstance(value, Tensor):
        return False
    if isinstance(value, list | tuple | set | frozenset):
        return all(_is_plain(item, depth - 1) for item in value)
    if isinstance(value, dict):
        return all(_is_plain(item, depth - 1) for item in value.values())
    return hasattr(value, "__dict__") and all(_is_plain(item, depth - 1) for item in vars(value).values())
