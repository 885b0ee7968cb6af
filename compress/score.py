"""What a criterion makes of a model: the evidence that it asks for, and in which order the units of each group go."""

import warnings
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from compress.activations import ActivationCollector
from compress.calibration import Calibration, batches, check_calibration, num_batches_of
from compress.channels import ChannelGraph
from compress.combine import Judgement, combined, mean
from compress.criteria import Criterion, needs
from compress.curvature import output_curvature, weighed
from compress.errors import PruneError
from compress.evidence import Evidence, Values
from compress.gradients import collect_gradients
from compress.gram import GramCollector, Grams, removable_sites
from compress.removal import Removal
from compress.tasks import ByTask, View, is_by_task
from compress.trial import Trial, first_samples
from compress.watch import Collector, gather

TRIAL_PASSES = 3  # passes over the calibration data that trying out all groups may cost


def check_needs(criteria: Sequence[Criterion], calibration: Any) -> None:
    """Raises :class:`CalibrationError` where a criterion needs data and there are none, before anything is done."""
    asking = next((criterion for criterion in criteria if needs(criterion)), None)
    if asking is not None and not is_by_task(calibration):  # (those of each task are looked at with the tasks)
        check_calibration(calibration, f"criterion {getattr(asking, '__name__', asking)!r}")


def collect_evidence(
    model: nn.Module, graph: ChannelGraph, criteria: Sequence[Criterion], views: Sequence[View], seed: int
) -> list[Evidence]:
    """What ``criteria`` look at, for each of ``views``: collected in one pass for all criteria (gradients in another).

    Activations are those on the view's own data. Gram matrices are of the data of all views together: which channels
    can stand in for which takes many rows to know, and only where all agree on it do their losses add up. What it
    costs each view is tried on its own data.

    Calibration data were checked by :func:`check_needs`. A warning says where they have too few samples
    for a Gram matrix.
    """
    wanted = {kind for criterion in criteria for kind in needs(criterion)}
    first = views[0].calibration
    alike = all(view.calibration is first for view in views)
    pooled = first if alike else ByTask({str(view.task): view.calibration or () for view in views})
    base = _gathered(Evidence(model, graph, seed=seed), wanted if alike else wanted - {"activations"}, pooled)
    own = set() if alike else wanted & {"activations"}
    return [_of_view(_gathered(base, own, view.calibration), wanted, view) for view in views]


def _gathered(evidence: Evidence, wanted: AbstractSet[str], calibration: Calibration | None) -> Evidence:
    """With what is to be known of activations."""
    graph = evidence.graph
    makers: dict[str, Callable[[], Collector]] = {
        "activations": lambda: ActivationCollector(graph),
        "grams": lambda: GramCollector(removable_sites(graph), num_batches_of(calibration or ()), seed=evidence.seed),
    }
    kinds = [kind for kind in makers if kind in wanted]
    if not kinds or calibration is None:
        return evidence
    found = dict(zip(kinds, gather(evidence.model, graph.trace, calibration, [makers[k] for k in kinds]), strict=True))
    if "grams" in found:
        sums = found["grams"].sums
        curvature = output_curvature(
            evidence.model, calibration, [known.site for known in sums.values()], seed=evidence.seed
        )
        found["grams"] = replace(found["grams"], sums=weighed(sums, curvature))
    return replace(evidence, **found)


def _of_view(evidence: Evidence, wanted: AbstractSet[str], view: View) -> Evidence:
    """With what is to be known of the outputs that the view sees."""
    model, graph, calibration = evidence.model, evidence.graph, view.calibration
    evidence = replace(evidence, loss=view.loss)
    if calibration is None:
        return evidence
    if "gradients" in wanted:
        evidence = replace(evidence, gradients=collect_gradients(model, graph, calibration, view.loss, view))
    if (grams := evidence.grams) is not None:
        grams = replace(grams, sums={key: own for key, own in grams.sums.items() if view.reaches(own.site.op)})
        _warn_of_few(grams)
        # criteria that know what a removal does to consumers ask what that does to the outputs
        number = max(TRIAL_PASSES * grams.num_samples // max(len(graph.sizes), 1), 16)
        inputs = first_samples((inputs for inputs, _ in batches(calibration, model)), min(number, grams.num_samples))
        evidence = replace(evidence, grams=grams, trial=Trial(model, inputs, view))
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


def judge(criterion: Criterion, evidence: Evidence, view: View | None = None) -> list[Judgement]:
    """What the criterion says of each group: scores of its units, shape (units,), or a removal; None where the view
    does not see the group.

    Raises:
        PruneError: what the criterion gave are no finite scores, one a unit.
    """
    judgements: list[Judgement] = []
    for group in evidence.graph.groups:
        if view is not None and not view.sees(group):
            judgements.append(None)
            continue
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
        judgements.append(found if isinstance(found, Removal) else values)
    return judgements


def removals_of(criterion: Criterion, evidence: Evidence) -> tuple[list[Removal], list[Values]]:
    """In which order each group's units go and what that loses, and a score for each unit, shape (units,)."""
    found = judge(criterion, evidence)
    return combined(evidence.graph.groups, [found], mean)
