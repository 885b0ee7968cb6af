"""Let an optimiser follow its model through surgery: new parameters in its groups, its state cut like the old ones."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from compress.errors import PruneError

Cut = Callable[[Tensor, tuple[int, ...]], Tensor]
"""``cut(tensor, axes)`` removes from ``tensor`` what its parameter lost along ``axes``."""


def follow(optimizer: Optimizer, replacements: Mapping[Tensor, tuple[nn.Parameter, Cut]]) -> Callable[[], None]:
    """What moves ``optimizer`` from the old parameters to the new ones; nothing changes until it is called.

    State of a parameter's shape (momenta, averages of squares) is cut as the parameter was. So is state that has one
    element for some axes (the rows and columns of Adafactor), along the others. Single numbers stay. Parameters of
    other models, in the same optimiser, are left alone.

    Args:
        replacements: for each old parameter the new one, and how its axes were cut.

    Raises:
        PruneError: the optimiser holds none of the old parameters, or state that does not belong to one parameter.
    """
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if not any(parameter in replacements for parameter in held):
        raise PruneError(
            "the optimizer holds none of the model's parameters: pass the one that was made for this very instance"
        )
    states: dict[Tensor, Any] = {}
    for old in optimizer.state:
        if old in replacements:
            _, cut = replacements[old]
            states[old] = {
                name: _cut_state(value, old, cut, f"{type(optimizer).__name__} keeps {name!r}")
                for name, value in optimizer.state[old].items()
            }

    def move() -> None:
        for group in optimizer.param_groups:
            group["params"] = [replacements[p][0] if p in replacements else p for p in group["params"]]
        for old, state in states.items():
            del optimizer.state[old]
            optimizer.state[replacements[old][0]] = state

    return move


def _cut_state(value: Any, parameter: Tensor, cut: Cut, what: str) -> Any:
    if isinstance(value, list | tuple) and any(isinstance(item, Tensor) for item in value):
        raise PruneError(f"{what}, tensors that do not belong to one parameter: make a new optimizer after pruning")
    if not isinstance(value, Tensor) or value.numel() <= 1:
        return value
    sizes, shape = tuple(value.shape), tuple(parameter.shape)
    if len(sizes) != len(shape) or any(n not in (1, size) for n, size in zip(sizes, shape, strict=True)):
        raise PruneError(
            f"{what} of shape {sizes} for a parameter of shape {shape}, which cannot be cut like it: "
            "make a new optimizer after pruning"
        )
    return cut(value, tuple(axis for axis, n in enumerate(sizes) if n == shape[axis]))
