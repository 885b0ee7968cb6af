"""What a backend makes of a captured graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, fx

Runner = Callable[..., Sequence[Tensor]]  # of the tensors among a call's leaves; returns those among the outputs'


class BackendError(Exception):
    """Why a backend cannot run a graph."""


@dataclass(frozen=True)
class Program:
    """``run`` takes what the graph takes. With ``any_batch`` it does so for the other batch sizes of the graph too."""

    name: str
    run: Runner
    any_batch: bool = True
    notes: tuple[str, ...] = field(default=())


Backend = Callable[[fx.GraphModule, list[Tensor]], Program]  # of a graph and an example; raises BackendError
