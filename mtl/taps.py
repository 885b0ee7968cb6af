"""Tensors from inside a module: outputs of its parts, or entries of what it gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn


def run_with_taps(
    module: nn.Module, places: set[str | None], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str | None, Tensor]:
    """Call the module once, and take a tensor at each place.

    Args:
        module: to call
        places: names of modules inside it, keys of its output, or None for its output itself
        args: of the call
        kwargs: of the call

    Raises:
        ValueError: for a place that there is not, and for None where the output is not one tensor.
    """
    parts = dict(module.named_modules()) if places != {None} else {}
    inside = {place for place in places if place is not None and place in parts}
    with tapped(module, inside) as seen:
        output = module(*args, **kwargs)
    taken: dict[str | None, Tensor] = {}
    for place in places:
        if place is None or place not in inside:
            taken[place] = _entry(output, place, module)
        elif not seen[place]:
            raise ValueError(
                f"module {place!r} of {type(module).__name__} is not called, so it gives no head its input"
            )
        else:
            taken[place] = seen[place][-1]
    return taken


@contextmanager
def tapped(module: nn.Module, names: Iterable[str]) -> Iterator[dict[str, list[Tensor]]]:
    """What the modules of these names inside ``module`` give within the block: a tensor for each call, by name."""
    taken: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str) -> Callable[..., None]:
        def hook(part: nn.Module, arguments: Any, output: Any) -> None:
            taken[name].append(_entry(output, None, part))

        return hook

    with ExitStack() as stack:
        # Only in here: a hook that stays would be shared with copies of the module.
        for name in taken:
            stack.callback(module.get_submodule(name).register_forward_hook(keep(name)).remove)
        yield taken


def _entry(output: Any, key: str | None, module: nn.Module) -> Tensor:
    if isinstance(output, Tensor) and key is None:
        return output
    if isinstance(output, Mapping):
        entries = {str(name): value for name, value in output.items() if isinstance(value, Tensor)}
    elif isinstance(output, tuple | list):
        entries = {str(index): value for index, value in enumerate(output) if isinstance(value, Tensor)}
    else:
        entries = {}
    if key is None and len(entries) == 1:
        return next(iter(entries.values()))
    if key is None or key not in entries:
        names = [name for name, _ in module.named_modules() if name]
        parts = ", ".join(names[:6]) + (", ..." if names[6:] else "")
        what = "is not one tensor" if key is None else f"has no part and gives nothing named {key!r}"
        raise ValueError(
            f"{type(module).__name__} {what}; say with at={{task: name}} what a head reads: an entry of the output "
            f"({', '.join(entries) or 'it has none'}) or a module ({parts})"
        )
    return entries[key]
