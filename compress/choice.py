"""What goes from one channel graph: judgements of all tasks, combined, and spent on a budget."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from compress.attempt import Attempt
from compress.balance import TaskLosses, balance
from compress.budget import Budget
from compress.combine import Judgement, Weigh, combined, largest, mean, weighted
from compress.plan import PrunePlan
from compress.removal import Values
from compress.select import Selection, SelectOptions
from compress.surgery import copied

COMBINATIONS: Mapping[str, Weigh] = {"mean": mean, "max": largest, "balanced": mean}  # and what balancing starts from

Repair = Callable[[nn.Module, PrunePlan, Values | None], object]  # in place; with the weights of the tasks


@dataclass(frozen=True)
class Choice:
    """What goes, and the scores of the units of each group, shape (units,); ``weights`` of the tasks, if any."""

    selection: Selection
    scores: list[Values]
    weights: Values | None = None


@dataclass(frozen=True)
class Chooser:
    """Judgements by task and then by group, and what they are spent on; ``timed`` as in :meth:`Attempt.timed`."""

    attempt: Attempt
    judged: Sequence[Sequence[Judgement]]
    budget: Budget
    options: SelectOptions
    timed: bool

    def by(self, weigh: Weigh) -> Choice:
        """What goes when the losses of the tasks count by ``weigh``."""
        removals, scores = combined(self.attempt.graph.groups, self.judged, weigh)
        select = self.attempt.timed if self.timed else self.attempt.select
        return Choice(select(removals, self.budget, self.options), scores)

    def balanced(self, losses: TaskLosses, repair: Repair) -> Choice:
        """What goes such that the worst task loses little, in the pruned model after ``repair`` (in place)."""

        def play(weights: Values) -> tuple[Choice, Values]:
            choice = replace(self.by(weighted(weights)), weights=weights)
            pruned, plan = self.attempt.pruned(choice.selection)
            pruned = copied(pruned)  # the attempt keeps its own
            repair(pruned, plan, weights)
            return choice, losses.of(pruned)

        return balance(len(self.judged), play)
