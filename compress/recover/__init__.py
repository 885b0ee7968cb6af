"""Recovery without training: what a pruned model can win back from unlabelled data alone.

In order: ``bias`` gives the mean of what was removed to the next constant, ``least_squares`` refits every layer to the
dense model's outputs, ``last_layer`` does so for those that give the model's outputs alone, and ``batch_norm`` takes
new statistics. Each is kept only where it helps on held-out calibration data.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from compress.calibration import Calibration, batches
from compress.errors import PruneError
from compress.plan import PrunePlan
from compress.recover.batch_norm import reestimate_batch_norm, statistics
from compress.recover.layer import LayerError
from compress.recover.least_squares import Count, refit
from compress.sites import Site
from compress.trial import Trial

METHODS = ("bias", "least_squares", "last_layer", "batch_norm")

__all__ = ["METHODS", "LayerError", "Recovery", "methods_of", "recover", "reestimate_batch_norm"]


@dataclass(frozen=True)
class Recovery:
    """What recovery did: errors of each layer that was refitted and of the outputs, as parts of their variance.

    Outputs are compared with the dense model's on the last calibration batch; nothing is fitted to that where there
    are more.
    """

    layers: tuple[LayerError, ...]
    before: float
    after: float
    notes: tuple[str, ...] = ()


def methods_of(recover: bool | Sequence[str]) -> tuple[str, ...]:
    """The methods that ``recover`` names: all for True, none for False.

    Raises:
        PruneError: a name is unknown.
    """
    if isinstance(recover, bool):
        return METHODS if recover else ()
    names = (recover,) if isinstance(recover, str) else tuple(recover)
    for name in names:
        if name not in METHODS:
            raise PruneError(f"recover={name!r} is unknown: choose among {', '.join(METHODS)}, or pass True for all")
    return names


def recover(
    model: nn.Module,
    dense: nn.Module,
    plan: PrunePlan,
    calibration: Calibration,
    methods: Sequence[str] = METHODS,
    *,
    seed: int = 0,
    origins: Mapping[str, str] | None = None,
    num_held_out: int = 1,
    count: Count | None = None,
) -> Recovery:
    """Improve ``model``, which ``plan`` made of ``dense``, in place.

    Args:
        calibration: batches of inputs; all of them are held in memory, with the activations of the layer at work.
        methods: some of :data:`METHODS`.
        num_held_out: how many of the last batches only tell what helps, where there are more.
        origins: weights of ``model`` that give what another weight of ``dense`` gave, by name, where names differ.
        count: what squared errors count of the layer with a parameter on a batch, by its number; all alike if None.

    Raises:
        CalibrationError: the data do not fit, or give activations that are not finite.
    """
    inputs = [inputs for inputs, _ in batches(calibration, model)]
    fitted = inputs[:-num_held_out] or inputs
    trial = Trial(dense, inputs[-num_held_out:])
    before = trial.error(model)
    layers: list[LayerError] = []
    notes = []

    def choose(site: Site, outputs: Sequence[int]) -> list[str]:
        last = "last_layer" in methods and site.result.id in outputs
        chosen = {name for name in ("bias", "least_squares") if name in methods or last}
        return sorted(chosen)

    if {"bias", "least_squares", "last_layer"} & set(methods):
        kept = {name: value.clone() for name, value in model.state_dict().items()}
        layers = refit(model, dense, plan, fitted, choose, seed=seed, origins=origins or {}, count=count)
        if trial.error(model) > before:
            model.load_state_dict(kept)
            layers = []
            notes.append("refitted layers made the outputs worse on held-out data, and are as before")
    if any(layer.scarce for layer in layers):
        few = [layer.name for layer in layers if layer.scarce]
        notes.append(
            f"too few calibration samples for {len(few)} layers ({few[0]} ...): more damping was used; pass more data"
        )
        warnings.warn(notes[-1], stacklevel=3)
    if "batch_norm" in methods:
        error = trial.error(model)
        with statistics(model) as restore:
            reestimate_batch_norm(model, [(each, None) for each in fitted])  # (a tuple of inputs is no pair)
            if trial.error(model) >= error:
                restore()
    return Recovery(tuple(layers), before, trial.error(model), tuple(notes))
