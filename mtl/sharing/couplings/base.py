"""What a coupling is: something that draws the corresponding parameters of several models to each other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import Tensor

Strength = float | Mapping[str, float]


@dataclass(frozen=True)
class Stacked:
    """The corresponding parameters of several models.

    Args:
        tasks: name of each model
        tensors: by the name of the parameter, each (number of tasks, *shape of the parameter)
        step: how many training steps were taken, an integer tensor without axes
    """

    tasks: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    step: Tensor


class Coupling(ABC):
    """A penalty on stacked parameters, a proximal step, or both. ``a + b`` is a coupling that does both."""

    @abstractmethod
    def check(self, stacked: Stacked) -> None:
        """Raise ``ValueError`` if this cannot couple these parameters."""

    @abstractmethod
    def penalty(self, stacked: Stacked) -> Tensor | float:
        """The scalar that is added to the loss; 0.0 where there is nothing to add."""

    def proximal_step(self, stacked: Stacked, lr: float) -> None:  # noqa: B027 - most couplings are penalties alone
        """Change the parameters in place after a step of the optimiser at this learning rate; default: not at all."""

    def __add__(self, other: Coupling) -> Coupling:
        return Sum((self, other))


@dataclass(frozen=True)
class Sum(Coupling):
    """Several couplings at once; their proximal steps are taken one after the other."""

    terms: tuple[Coupling, ...]

    def check(self, stacked: Stacked) -> None:
        for term in self.terms:
            term.check(stacked)

    def penalty(self, stacked: Stacked) -> Tensor | float:
        return sum(term.penalty(stacked) for term in self.terms)

    def proximal_step(self, stacked: Stacked, lr: float) -> None:
        for term in self.terms:
            term.proximal_step(stacked, lr)


@dataclass(frozen=True)
class Scaled(Coupling):
    """What couplings with a strength share.

    Args:
        strength: >= 0, factor of the penalty: one for all parameters, or one per pattern of parameter names such as
            ``{"conv*": 1e-2, "*.bias": 0.0}``, of which the first that matches counts (none: 0)
        warmup: steps over which the strength rises from 0, linearly, >= 0

    Raises:
        ValueError: for a value out of range, and for a pattern that matches no parameter (when the model is built).
    """

    strength: Strength
    warmup: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        values = self.strength.values() if isinstance(self.strength, Mapping) else [self.strength]
        for value in values:
            if not 0 <= value < float("inf"):
                raise ValueError(f"strength is {value!r}, but it must be a number >= 0")
        if self.warmup < 0:
            raise ValueError(f"warmup is {self.warmup!r}, but it must be a number of steps >= 0")

    def check(self, stacked: Stacked) -> None:
        patterns = self.strength if isinstance(self.strength, Mapping) else ()
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in stacked.tensors):
                raise ValueError(
                    f"strength: no matched parameter has a name like {pattern!r}; there are {_shown(stacked.tensors)}"
                )

    def strengths(self, names: Iterable[str]) -> dict[str, float]:
        """Strength of each parameter that is coupled at all."""
        if isinstance(self.strength, Mapping):
            pairs = self.strength.items()
            found = {
                name: next((value for pattern, value in pairs if fnmatchcase(name, pattern)), 0.0) for name in names
            }
        else:
            found = dict.fromkeys(names, self.strength)
        return {name: value for name, value in found.items() if value > 0}

    def warmed(self, step: Tensor) -> Tensor | float:
        """Factor of the strength at this step, in (0, 1]. On the device, so that nothing waits for it."""
        return ((step + 1) / self.warmup).clamp(max=1) if self.warmup else 1.0


def _shown(names: Iterable[str], limit: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
