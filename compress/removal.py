"""In which order the units of a group go, and what that loses: what a criterion decides, and a selection spends."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from compress.channels import ChannelGroup
from compress.labels import Array

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Removal:
    """The units of a group in the ``order`` in which they go, and the loss when the first k are gone.

    ``losses`` has shape (units + 1,), begins with 0 and never falls. Losses of different groups are compared with each
    other, so a criterion gives all of them in one unit. ``relative``: they are parts of what the dense group has, and
    are weighed against what a channel saves in the dense model; else against what it saves when its turn comes.
    """

    order: Array
    losses: Values
    relative: bool = False

    @property
    def scores(self) -> Values:
        """The loss at which each unit is gone, shape (units,)."""
        scores = np.empty(len(self.order))
        scores[self.order] = self.losses[1:]
        return scores


def by_score(group: ChannelGroup, scores: Values) -> Removal:
    """Lowest scores first; what is lost when the first k go is ``-log`` of the part of the scores that stays.

    The logarithm makes each further channel of a layer dearer, so that no layer empties while another is untouched.
    It counts once for each layer that writes the channel: one of a residual stream takes its part from every block.
    """
    order, parts = np.argsort(scores, kind="stable"), parts_of(scores)
    parts = parts if parts.any() else np.full(len(parts), 1 / len(parts))  # all alike
    return Removal(order, losses_of(group, parts[order]), relative=True)


def parts_of(scores: Values) -> Values:
    """The part that each unit has in the sum of the scores, which are shifted to 0 where some are below; zeros of 0."""
    shifted = scores - min(float(scores.min()), 0.0)
    total = float(shifted.sum())
    return shifted / total if total > 0 else np.zeros_like(shifted)


def losses_of(group: ChannelGroup, parts: Values) -> Values:
    """What is lost when the first k units go that have these ``parts``; see :func:`by_score`. Shape (units + 1,)."""
    num_layers = sum(member.role == "producer" for member in group.members)
    stays = 1.0 - np.concatenate([[0.0], np.cumsum(parts)])
    losses: Values = -np.log(np.maximum(stays, np.finfo(float).tiny)) * max(num_layers, 1)
    return losses
