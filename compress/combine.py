"""One order of removal from what each task would lose, such that none of them is sacrificed."""

from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import isotonic_regression

from compress.channels import ChannelGroup
from compress.removal import Removal, Values, by_score, losses_of, parts_of

Judgement = Removal | Values | None  # of a group: a removal, scores of its units, or nothing where it does not matter
Weigh = Callable[[Values], Values]  # what tasks lose, (tasks, n), as one number each, (n,)


def mean(losses: Values) -> Values:
    """Every task counts alike."""
    return np.asarray(losses.mean(axis=0))


def largest(losses: Values) -> Values:
    """The task that loses most counts."""
    return np.asarray(losses.max(axis=0))


def weighted(weights: Values) -> Weigh:
    """Tasks count as much as their ``weights``, shape (tasks,)."""
    return lambda losses: weights @ losses


def combined(
    groups: Sequence[ChannelGroup], judgements: Sequence[Sequence[Judgement]], weigh: Weigh
) -> tuple[list[Removal], list[Values]]:
    """The removal of each group, and a score for each of its units, shape (units,).

    Args:
        judgements: by task, then by group.
        weigh: what a loss of each task counts. Losses are relative to the task: parts of the sum of its scores in the
            group, or of the variance of its output.
    """
    removals, scores = [], []
    for group, *found in zip(groups, *judgements, strict=True):
        removal = _removal(group, found, weigh)
        removals.append(removal)
        alone = found[0] if len(found) == 1 else None
        scores.append(alone if isinstance(alone, np.ndarray) else removal.scores)
    return removals, scores


def _removal(group: ChannelGroup, found: Sequence[Judgement], weigh: Weigh) -> Removal:
    known = [judgement for judgement in found if judgement is not None]
    if len(found) == 1 and len(known) == 1:
        return known[0] if isinstance(known[0], Removal) else by_score(group, known[0])
    none, num_units = np.zeros(group.num_units), group.num_units
    if not any(isinstance(judgement, Removal) for judgement in known):
        parts = np.stack([none if scores is None else parts_of(scores) for scores in found])  # type: ignore[arg-type]
        order = np.argsort(weigh(parts), kind="stable")
        if not parts.any():
            return by_score(group, none)
        return Removal(order, weigh(np.stack([losses_of(group, own[order]) for own in parts])), relative=True)
    removals = [by_score(group, each) if isinstance(each, np.ndarray) else each for each in found]
    parts = np.stack([none if removal is None else _marginal(removal) for removal in removals])
    places = np.mean([np.argsort(removal.order) for removal in removals if removal is not None], axis=0)
    order = np.lexsort((places, weigh(parts)))
    losses = np.concatenate([np.zeros((len(parts), 1)), np.cumsum(parts[:, order], axis=1)], axis=1)
    assert losses.shape[1] == num_units + 1
    return Removal(order, weigh(losses), all(removal.relative for removal in removals if removal is not None))


def _marginal(removal: Removal) -> Values:
    """What each unit adds to the loss when its turn comes, shape (units,); never less than the one before.

    Where it would be, neighbours share their mean, so that units of equal orders stay in order. In the order of another
    task a unit adds something else; that it adds what it did in its own keeps the sum simple.
    """
    steps = np.diff(removal.losses)
    rising = steps if (np.diff(steps) >= 0).all() else np.asarray(isotonic_regression(steps).x)
    marginal = np.empty_like(rising)
    marginal[removal.order] = rising
    return marginal
