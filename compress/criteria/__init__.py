"""How important a channel is. A criterion gives one score for each unit of a group; the lowest go first.

>>> sorted(CRITERIA)
['l1', 'l2', 'mean_activation', 'nonzero', 'random', 'reconstruction']

A criterion is any callable ``(group, evidence) -> scores`` of shape (units,). One that looks at data says so with an
attribute ``needs``: ``{"activations"}``, ``{"grams"}`` or both; they are collected over all calibration batches before
it is called. One that knows what it loses when several channels go together returns a :class:`Removal` instead: an
order, and the loss when the first k are gone.
"""

from collections.abc import Callable
from typing import Any

from compress.channels import ChannelGroup
from compress.criteria.activations import mean_activation, nonzero
from compress.criteria.chance import random
from compress.criteria.elimination import reconstruction
from compress.criteria.weights import l1, l2
from compress.errors import PruneError
from compress.evidence import Evidence, Values
from compress.removal import Removal

Criterion = Callable[[ChannelGroup, Evidence], Any]

CRITERIA: dict[str, Criterion] = {
    "l1": l1,
    "l2": l2,
    "mean_activation": mean_activation,
    "nonzero": nonzero,
    "random": random,
    "reconstruction": reconstruction,
}

__all__ = ["CRITERIA", "Criterion", "Evidence", "Removal", "Values", "needs", "resolve"]


def resolve(criterion: str | Criterion) -> Criterion:
    """The criterion of that name, or the callable itself.

    Raises:
        PruneError: no criterion has that name.
    """
    if callable(criterion):
        return criterion
    if criterion not in CRITERIA:
        raise PruneError(f"criterion {criterion!r} is unknown: choose one of {', '.join(CRITERIA)}, or pass a function")
    return CRITERIA[criterion]


def needs(criterion: Criterion) -> frozenset[str]:
    """Which evidence from calibration data the criterion looks at: "activations", "grams", both or none."""
    return frozenset(getattr(criterion, "needs", ()))
