"""Prune / Train / Repeat: towards a budget in rounds, resumable after a crash at any moment."""

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn
from torch.utils._pytree import tree_map

from compress.budget import Budget
from compress.errors import PruneError
from compress.folder import claim, write_file
from compress.plans import Plan
from compress.report import CURVE, HISTORY, TABLE, RoundRecord, several, write_events, write_history
from compress.rounds import MODEL, Evaluate, PruneOptions, Recipe, Rounds
from compress.schedule import Schedule
from compress.seeding import preserved_random_state

RUN, ROUNDS, SMALL = "run.json", "rounds", "small.safetensors"


@dataclass(frozen=True)
class StopRule:
    """Ends a run at the first round that lost more than ``max_drop`` (a fraction, such as 0.02) of the dense accuracy.

    Where ``evaluate`` returns several metrics, the one that dropped most counts: every task stays alive. Raises
    :class:`PruneError` for a ``max_drop`` below 0.
    """

    max_drop: float

    def __post_init__(self) -> None:
        if not self.max_drop >= 0:
            raise PruneError(
                f"max_drop is {self.max_drop}; give the accuracy that may be lost, as a fraction such as 0.02"
            )

    def allows(self, dense: RoundRecord, now: RoundRecord) -> bool:
        """Whether the round is still good enough."""
        return self.worst(dense, now)[1] <= self.max_drop

    @staticmethod
    def worst(dense: RoundRecord, now: RoundRecord) -> tuple[str, float]:
        """The metric that dropped most, and by how much."""
        drops = {name: dense.metrics[name] - now.metrics[name] for name in dense.metrics}
        name = max(drops, key=lambda name: drops[name])
        return name, drops[name]


@dataclass(frozen=True)
class RunResult:
    """The smallest model that was good enough, its plan against the dense model, and what every round measured.

    ``model`` is in evaluation mode. ``before`` is the dense model's record and ``after`` that of ``model``. ``stopped``
    says why the run ended before the budget, and is None where it did not.
    """

    model: nn.Module
    plan: Plan
    rounds: tuple[RoundRecord, ...]
    before: RoundRecord
    after: RoundRecord
    stopped: str | None

    def summary(self) -> str:
        """Before and after, one quantity a line."""
        quantities = {"accuracy": ",.4f", "macs": ",", "params": ",", "bytes": ",", "latency_seconds": ".6f"}
        lines = []
        for name, form in quantities.items():
            before, after = getattr(self.before, name), getattr(self.after, name)
            share = f"{after / before:.1%}" if before else "-"
            lines.append(f"{name:<16}{before:>16{form}} -> {after:>16{form}}  {share:>7}")
            if name == "accuracy":  # and below it that of each task
                for task, old in several(self.before).items():
                    lines.append(f"  {task:<14}{old:>16{form}} -> {self.after.metrics[task]:>16{form}}")
        return "\n".join([*lines, self.stopped] if self.stopped else lines)


@preserved_random_state()
def iterate(
    model: nn.Module,
    example_inputs: Any,
    *,
    train: Callable[..., object],
    evaluate: Evaluate,
    budget: Budget,
    rounds: int,
    folder: str | Path,
    schedule: str | Schedule = "cubic",
    criterion: Any = None,
    methods: Sequence[str] = ("prune",),
    stop: StopRule | None = None,
    seed: int = 0,
    on_round: Callable[[RoundRecord], object] | None = None,
    test: Evaluate | None = None,
    **options: Unpack[PruneOptions],
) -> RunResult:
    """Prunes ``model`` to ``budget`` in ``rounds`` steps, each followed by training, and returns the last good model.

    ``train(model)`` trains in place; where its second parameter has no default it gets a :class:`RoundContext` too.
    ``evaluate(model)`` returns an accuracy, or several by name; higher is better. It decides (see :class:`StopRule`),
    so it should look at validation data. What ``test(model)`` returns is recorded and decides nothing. Randomness in
    them must come from the global generators of Python, NumPy and PyTorch, or from the context's seed. ``schedule``
    says how much of the dense model each round keeps. ``on_round`` sees the record of every round, those of earlier
    calls included. ``criterion`` is "l2" unless it is given. The given model is not changed.

    ``methods=("prune", "factorize")`` spends each round's budget on channels and on ranks (:func:`compress.shrink`, by
    the criterion "reconstruction"); thin layers are pruned further in the next round, and optimisers start afresh.
    ``options`` go to :func:`compress.prune`, or those that it has to ``shrink``.

    ``folder`` gets ``rounds/NN`` (model, plan, scores, record), ``history.json``, ``history.csv``, ``curve.png``,
    TensorBoard events and, at the end, ``small.safetensors`` for :func:`compress.load`. The same call on the same
    folder goes on where the last one was interrupted, and returns at once where that one had ended.

    Raises :class:`BudgetError` for a budget that cannot be reached and :class:`PruneError` for a folder of another run,
    both before anything is written.
    """
    folder = Path(folder)
    methods = tuple(methods)
    criterion = criterion or ("l2" if methods == ("prune",) else "reconstruction")
    recipe = Recipe(budget, rounds, schedule, criterion, seed, options, methods)
    if not (folder / RUN).exists():  # bad options fail here, before anything is written and before hours of training
        (recipe.shrink if recipe.shrinks else recipe.prune)(model, example_inputs, budget.fraction, 0)
    claim(folder / RUN, _describe(model, example_inputs, recipe, stop), (ROUNDS, HISTORY, TABLE, CURVE, SMALL))
    played = Rounds(model, example_inputs, recipe, folder / ROUNDS)
    records: list[RoundRecord] = []
    stopped = None
    while len(records) <= rounds and stopped is None:
        index = len(records)
        if not played.path(index).exists():
            played.play(index, train, evaluate, test)
        records.append(played.record(index))
        write_events(folder, records[-1], played.scores(index))
        stopped = _reason_to_stop(records, stop)
        if not played.path(index + 1).exists():  # else this is an earlier call's round, and more are coming
            write_history(folder, records)
        if on_round is not None:
            on_round(records[-1])
    best = records[-2] if stopped else records[-1]
    write_file(folder / SMALL, lambda partial: shutil.copyfile(played.path(best.round) / MODEL, partial))
    return RunResult(*played.result(best.round), tuple(records), records[0], best, stopped)


def _reason_to_stop(records: Sequence[RoundRecord], stop: StopRule | None) -> str | None:
    dense, now = records[0], records[-1]
    if stop is None or stop.allows(dense, now):
        return None
    name, drop = stop.worst(dense, now)
    of = f"task {name!r}" if several(now) else "accuracy"
    return (
        f"stopped at round {now.round}, which lost {drop:.4f} of {of} "
        f"(allowed: {stop.max_drop:g}); the result is round {now.round - 1}"
    )


def digests(model: nn.Module) -> dict[str, object]:
    """What tells one model from another: its class, and digests of the names and of the values of its tensors."""
    names, weights = hashlib.sha256(), hashlib.sha256()
    for name, value in model.state_dict().items():
        if isinstance(value, torch.Tensor):
            names.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
            weights.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return {
        "model": type(model).__name__,
        "parameters": names.hexdigest()[:12],
        "weights": weights.hexdigest()[:12],
    }


def _describe(model: nn.Module, example_inputs: Any, recipe: Recipe, stop: StopRule | None) -> dict[str, object]:
    """What must be equal for a folder to be of the same run. Functions count by name, calibration data not at all."""
    options = {name: _name(value) for name, value in recipe.options.items() if name != "calibration"}
    shapes = tree_map(lambda leaf: tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else repr(leaf), example_inputs)
    return {
        **digests(model),
        "example_inputs": shapes,
        "budget": {recipe.budget.metric: recipe.budget.fraction},
        "rounds": recipe.rounds,
        "schedule": _name(recipe.schedule),
        "criterion": _name(recipe.criterion),
        "max_drop": stop and stop.max_drop,
        "seed": recipe.seed,
        **({"methods": list(recipe.methods)} if recipe.shrinks else {}),
        **options,
    }


def _name(value: object) -> object:
    """Plain data as they are; a function or object by its name."""
    plain = (str, int, float, bool, type(None), tuple, list)
    if isinstance(value, Mapping):
        return {key: _name(item) for key, item in value.items()}
    return value if isinstance(value, plain) else getattr(value, "__qualname__", type(value).__qualname__)
