"""Prune one model to many budgets from one look at the data."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from compress.budget import Budget
from compress.calibration import Calibration
from compress.channels import ChannelGroup
from compress.criteria import Criterion, needs, resolve
from compress.errors import BudgetError
from compress.evidence import Evidence
from compress.gram import GramSums
from compress.pruning import PruneResult, prune
from compress.sites import Key
from compress.trace import ExampleInputs

ROUNDING = {"latency": 0.05}  # above the smallest fraction that can be reached: what is measured varies


class Pruner:
    """:func:`compress.prune` of one model; data are read for the first budget only.

    ``sums`` are the Gram matrices of all sites that read what can be removed, once something was pruned.
    """

    def __init__(
        self, model: nn.Module, example_inputs: ExampleInputs, criterion: str | Criterion, calibration: Calibration,
        *, exact_only: bool, protect: Sequence[str], seed: int,
    ) -> None:  # fmt: skip
        self._model, self._inputs = model, example_inputs
        self._memory = _Memory(resolve(criterion))
        self._options = {"calibration": calibration, "exact_only": exact_only, "protect": protect, "seed": seed}

    @property
    def sums(self) -> Mapping[Key, GramSums]:
        """By what names the sites."""
        return self._memory.sums

    def to(self, budget: Budget) -> PruneResult:
        """The pruned model, as it comes out of surgery.

        Raises:
            BudgetError: pruning alone cannot reach it.
        """
        options: dict[str, Any] = dict(self._options)
        result = prune(self._model, self._inputs, budget=budget, criterion=self._memory, **options)
        self._memory.needs = frozenset()
        return result

    def towards(self, budget: Budget) -> PruneResult:
        """As far down to the budget as pruning alone can get."""
        try:
            return self.to(budget)
        except BudgetError as error:
            if error.smallest is None:
                raise
            return self.to(
                Budget(**{budget.metric: min(error.smallest * (1 + ROUNDING.get(budget.metric, 1e-9)), 1.0)})
            )


class _Memory:
    """A criterion that is asked once for each group."""

    def __init__(self, criterion: Criterion) -> None:
        self._criterion = criterion
        self.needs = needs(criterion) | {"grams"}
        self.sums: Mapping[Key, GramSums] = {}
        self._found: dict[tuple[tuple[str, int, bytes], ...], Any] = {}

    def __call__(self, group: ChannelGroup, evidence: Evidence) -> Any:
        key = tuple((member.parameter, member.axis, member.indices.tobytes()) for member in group.members)
        if key not in self._found:
            if evidence.grams is not None:
                self.sums = evidence.grams.sums
            self._found[key] = self._criterion(group, evidence)
        return self._found[key]
