"""How important a channel is. A criterion gives one score for each unit of a group; the lowest go first.

>>> sorted(CRITERIA)
['bn_scale', 'fpgm', 'l1', 'l2', 'lamp', 'mean_activation', 'nonzero', 'random', 'reconstruction', 'taylor']

A criterion is any callable ``(group, evidence) -> scores`` of shape (units,). One that looks at data says so with an
attribute ``needs``, a set of ``"activations"``, ``"gradients"`` and ``"grams"``; they are collected over all batches of
calibration data before it is called. One that knows what it loses when several channels go together returns a
:class:`Removal` instead: an order, and the loss when the first k are gone.
"""

from collections.abc import Callable
from typing import Any

from compress.channels import ChannelGroup
from compress.criteria.activations import mean_activation, nonzero
from compress.criteria.batch_norm import bn_scale
from compress.criteria.chance import random
from compress.criteria.elimination import reconstruction
from compress.criteria.lamp import lamp
from compress.criteria.median import fpgm
from compress.criteria.taylor import taylor
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
    "taylor": taylor,
    "bn_scale": bn_scale,
    "fpgm": fpgm,
    "lamp": lamp,
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
    """Which evidence from calibration data the criterion looks at: of "activations", "gradients" and "grams"."""
    return frozenset(getattr(criterion, "needs", ()))
