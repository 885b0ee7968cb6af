"""One attempt at a budget: a channel graph, what a selection from it costs, and whether its removal verifies."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from torch import nn

from compress.budget import Budget
from compress.channels import ChannelGraph
from compress.cost import CostModel, cost_of, relative_latency
from compress.errors import BudgetError, PruneError
from compress.labels import Array
from compress.plan import PrunePlan, make_plan
from compress.removal import Removal
from compress.select import Selection, SelectOptions, select
from compress.speed import meet_latency
from compress.surgery import apply
from compress.timing import TimeTable, good_multiples
from compress.trace import ExampleInputs
from compress.verify import agrees, culprits


class Attempt:
    """One channel graph being pruned: builds plans from selections, prices them, and checks them."""

    def __init__(self, model: nn.Module, example_inputs: ExampleInputs, graph: ChannelGraph) -> None:
        if not len(graph.sizes):
            reasons = list(dict.fromkeys(str(axis) for axis in graph.frozen))
            raise PruneError("nothing can be pruned: " + "; ".join(reasons[:6]) + ("; ..." if len(reasons) > 6 else ""))
        self.model, self.inputs, self.graph = model, example_inputs, graph
        self.before = cost_of(model, graph.trace)
        self.notes: list[str] = []
        self._built: dict[tuple[Any, ...], tuple[nn.Module, PrunePlan]] = {}

    def select(self, removals: Sequence[Removal], budget: Budget, options: SelectOptions) -> Selection:
        """What goes so that the cost, predicted where it is latency, meets the budget."""
        options = replace(options, stepwise=budget.metric == "latency")
        return select(self.graph, removals, self.price(budget.metric), budget.fraction, options)

    def timed(self, removals: Sequence[Removal], budget: Budget, options: SelectOptions) -> Selection:
        """The same with widths that are worth it on this machine, a measured latency, and nothing slower than dense."""
        if budget.fraction >= 1:
            return self.select(removals, budget, options)
        if options.round_to == 1:
            options = replace(options, multiples=good_multiples(self.graph, self.times))
        refused: list[BudgetError] = []
        while True:
            try:
                if budget.metric != "latency":
                    return self._no_slower(removals, budget, options)
                return meet_latency(
                    lambda aim, options=options: self.select(removals, Budget(latency=min(aim, 1.0)), options),  # type: ignore[misc]
                    self.latency,
                    budget.fraction,
                )
            except BudgetError as error:  # what is out of reach in good steps may not be in finer ones
                refused.append(error)
                finer = {index: multiple // 2 for index, multiple in options.multiples.items()}
                if not any(finer.values()):
                    raise min(refused, key=lambda found: found.smallest or np.inf) from None
                options = replace(options, multiples={index: max(1, multiple) for index, multiple in finer.items()})

    def _no_slower(self, removals: Sequence[Removal], budget: Budget, options: SelectOptions) -> Selection:
        """Coarser multiples until the result is measured no slower than the dense model."""
        found: list[tuple[float, Selection]] = []
        for factor in (1, 2, 4, 8):
            coarser = {index: factor * multiple for index, multiple in options.multiples.items()}
            try:
                selection = self.select(removals, budget, replace(options, multiples=coarser))
            except BudgetError:
                if not found:
                    raise
                break
            found.append((self.latency(selection), selection))
            if found[-1][0] <= 1:
                break
        ratio, selection = min(found, key=lambda item: item[0])
        if ratio > 1:
            self.notes.append(f"takes {ratio:.2f} x the dense model's seconds: no widths were found that save any")
        return selection

    @cached_property
    def times(self) -> TimeTable:
        """Seconds of the model's operators by width."""
        return TimeTable(self.graph, self.model)

    def price(self, metric: str) -> Callable[[Array], float]:
        """The part of the dense model's cost that remains when so many units of each group are kept."""
        if metric == "channels":
            return lambda kept: float(kept.sum() / self.graph.sizes.sum())
        if metric == "latency":
            seconds = self.times(self.graph.sizes)
            return lambda kept: self.times(kept) / seconds
        total = self.before.macs if metric == "macs" else self.before.params
        price = CostModel(self.graph, metric, total)
        return lambda kept: price(kept) / max(total, 1)

    def pruned(self, selection: Selection) -> tuple[nn.Module, PrunePlan]:
        """The pruned copy of the model, and its plan."""
        key = *sorted(selection.lumps.items()), *((g, tuple(u.tolist())) for g, u in sorted(selection.units.items()))
        if key not in self._built:
            self._built.clear()  # one at a time: models are large
            plan = self.plan(selection)
            self._built[key] = apply(self.model, plan), plan
        return self._built[key]

    def plan(self, selection: Selection) -> PrunePlan:
        """The plan for a selection."""
        return make_plan(self.graph, selection.units, self.graph.stored_after(selection.lumps))

    def failing_lumps(self, selection: Selection) -> list[int]:
        """Lumps of the selection whose removal breaks the model; none if all is well."""
        lumps = list(selection.lumps)
        exact = [i for i in lumps if all(self.graph.groups[g].exact for g in self.graph.lumps[i].units)]
        for parts in (exact, lumps) if len(exact) < len(lumps) else (lumps,):
            # what is exact is compared by numbers, the rest can only be run; all comes last, as it is what is wanted
            if parts and not self._holds(selection, parts):
                return culprits(parts, lambda some: self._holds(selection, some))
        return []

    def _holds(self, selection: Selection, lumps: Sequence[int]) -> bool:
        part = _restricted(self.graph, selection, lumps)
        try:
            pruned, plan = self.pruned(part)
        except PruneError:
            return False
        return agrees(self.model, plan, pruned, self.inputs, self.graph.trace)

    def latency(self, selection: Selection) -> float:
        """The measured part of the dense model's seconds that a selection leaves."""
        return relative_latency(self.pruned(selection)[0], self.model, self.inputs)


def _restricted(graph: ChannelGraph, selection: Selection, lumps: Sequence[int]) -> Selection:
    """The part of a selection that some lumps make: of a group that several lumps share, the first units."""
    if len(lumps) == len(selection.lumps):
        return selection
    counts: dict[int, int] = {}
    for index in lumps:
        for group, number in graph.lumps[index].units.items():
            counts[group] = counts.get(group, 0) + number * selection.lumps[index]
    units = {group: selection.units[group][:count] for group, count in counts.items()}
    return replace(selection, units=units, lumps={index: selection.lumps[index] for index in lumps})
