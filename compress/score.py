"""What a criterion makes of a model: the evidence that it asks for, and in which order the units of each group go."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from compress.activations import ActivationCollector
from compress.calibration import Calibration, batches, check_calibration, num_batches_of
from compress.channels import ChannelGraph
from compress.criteria import Criterion, needs
from compress.errors import PruneError
from compress.evidence import Evidence, Values
from compress.gradients import collect_gradients
from compress.gram import GramCollector, Grams, removable_sites
from compress.removal import Removal, by_score
from compress.trial import Trial, first_samples
from compress.watch import Collector, gather

TRIAL_PASSES = 3  # passes over the calibration data that trying out all groups may cost


def check_needs(criteria: Sequence[Criterion], calibration: Calibration | None) -> None:
    """Raises :class:`CalibrationError` where a criterion needs data and there are none, before anything is done."""
    asking = next((criterion for criterion in criteria if needs(criterion)), None)
    if asking is not None:
        check_calibration(calibration, f"criterion {getattr(asking, '__name__', asking)!r}")


def collect_evidence(
    model: nn.Module,
    graph: ChannelGraph,
    criteria: Sequence[Criterion],
    calibration: Calibration | None,
    loss: Callable[..., Any] | None,
    seed: int,
) -> Evidence:
    """What ``criteria`` look at, collected in one pass for all of them (gradients in another).

    ``calibration`` was checked by :func:`check_needs`. A warning says where it has too few samples
    for a Gram matrix.
    """
    evidence = Evidence(model, graph, loss=loss, seed=seed)
    wanted = {kind for criterion in criteria for kind in needs(criterion)}
    if not wanted or calibration is None:
        return evidence
    makers: dict[str, Callable[[], Collector]] = {
        "activations": lambda: ActivationCollector(graph),
        "grams": lambda: GramCollector(removable_sites(graph), num_batches_of(calibration), seed=seed),
    }
    if kinds := [kind for kind in makers if kind in wanted]:
        found = gather(model, graph.trace, calibration, [makers[kind] for kind in kinds])
        evidence = replace(evidence, **dict(zip(kinds, found, strict=True)))
    if "gradients" in wanted:
        evidence = replace(evidence, gradients=collect_gradients(model, graph, calibration, loss))
    if (grams := evidence.grams) is not None:
        _warn_of_few(grams)
        # criteria that know what a removal does to consumers ask what that does to the outputs
        number = max(TRIAL_PASSES * grams.num_samples // max(len(graph.sizes), 1), 16)
        inputs = first_samples((inputs for inputs, _ in batches(calibration, model)), min(number, grams.num_samples))
        evidence = replace(evidence, trial=Trial(model, inputs))
    return evidence


def _warn_of_few(grams: Grams) -> None:
    few = [known for known in grams.sums.values() if known.scarce]
    if few:
        most = max(few, key=lambda known: known.site.num_inputs)
        warnings.warn(
            f"too few calibration samples for {len(few)} layers ({most.site.parameter.removesuffix('.weight')} has "
            f"{most.site.num_inputs} inputs and saw {most.num_rows} rows): more damping was used; pass more data",
            stacklevel=3,
        )


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
