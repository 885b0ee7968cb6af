"""What a criterion makes of a model: the evidence that it asks for, and in which order the units of each group go."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from compress.activations import ActivationCollector
from compress.calibration import Calibration, batches, check_calibration
from compress.channels import ChannelGraph
from compress.criteria import Criterion, needs
from compress.errors import PruneError
from compress.evidence import Evidence, Values
from compress.gradients import collect_gradients
from compress.gram import GramCollector
from compress.removal import Removal, by_score
from compress.trial import Trial, first_samples
from compress.watch import Collector, gather

TRIAL_PASSES = 3  # passes over the calibration data that trying out all groups may cost


def collect_evidence(
    model: nn.Module,
    graph: ChannelGraph,
    criteria: Sequence[Criterion],
    calibration: Calibration | None,
    loss: Callable[..., Any] | None,
    seed: int,
) -> Evidence:
    """What ``criteria`` look at, collected once for all of them; :class:`CalibrationError` where data are missing."""
    evidence = Evidence(model, graph, loss=loss, seed=seed)
    asking = [criterion for criterion in criteria if needs(criterion)]
    if not asking:
        return evidence
    given = check_calibration(calibration, f"criterion {getattr(asking[0], '__name__', asking[0])!r}")
    wanted = {kind for criterion in asking for kind in needs(criterion)}
    makers: dict[str, Callable[[], Collector]] = {
        "activations": lambda: ActivationCollector(graph),
        "grams": lambda: GramCollector(graph, seed=seed),
    }
    if kinds := [kind for kind in makers if kind in wanted]:
        found = gather(model, graph.trace, given, [makers[kind] for kind in kinds])
        evidence = replace(evidence, **dict(zip(kinds, found, strict=True)))
    if "gradients" in wanted:
        evidence = replace(evidence, gradients=collect_gradients(model, graph, given, loss))
    if (
        grams := evidence.grams
    ) is not None:  # criteria that know what a removal does to consumers ask what that does to the outputs
        number = max(TRIAL_PASSES * grams.num_samples // max(len(graph.sizes), 1), 16)
        inputs = first_samples((inputs for inputs, _ in batches(given, model)), min(number, grams.num_samples))
        evidence = replace(evidence, trial=Trial(model, inputs))
    return evidence


def removals_of(criterion: Criterion, evidence: Evidence) -> tuple[list[Removal], list[Values]]:
    """In which order each group's units go and what that loses, and a score for each unit, shape (units,).

    Raises:
        PruneError: what the criterion gave are no finite scores, one a unit.
    """
    removals, scores = [], []
    for group in evidence.graph.groups:
        found = criterion(group, evidence)
        values = found.scores if isinstance(found, Removal) else np.asarray(found, dtype=np.float64)
        if values.shape != (group.num_units,):
            raise PruneError(
                f"the criterion gave scores of shape {values.shape} for group {group.name!r}, which has "
                f"{group.num_units} units: return one score a unit"
            )
        if not np.isfinite(values).all():
            raise PruneError(
                f"the criterion gave scores that are not finite for group {group.name!r}: check the weights"
            )
        removals.append(found if isinstance(found, Removal) else by_score(group, values))
        scores.append(values)
    return removals, scores
