"""One round of Prune / Train / Repeat: from the last committed round to the next.

A round starts from what is committed on the disk and from random states that follow from (seed, round, phase), never
from what happens to be in memory. A resumed run therefore takes exactly the path of an undisturbed one.
"""

import inspect
import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import nn
from torch.optim import Optimizer

from compress.artifact import load, save
from compress.budget import Budget
from compress.carry import Carry, OptimizerState, read_state
from compress.cost import latencies, latency, measure
from compress.errors import PruneError
from compress.folder import commit_folder
from compress.plan import PrunePlan
from compress.plans import Plan, read_plan
from compress.pruning import PruneResult, prune
from compress.report import RoundRecord
from compress.schedule import Schedule, kept_fraction
from compress.seeding import seed_everything
from compress.shrink import ShrinkResult, shrink
from compress.shrink.plan import joined

MODEL, PLAN, SCORES, KEPT, RECORD = "model.safetensors", "plan.json", "scores.safetensors", "kept.json", "record.json"
OPTIMIZER = "optimizer.safetensors"
SHRINK_OPTIONS = {"calibration", "recover", "exact_only", "protect"}

Evaluate = Callable[[nn.Module], float | Mapping[str, float]]


class PruneOptions(TypedDict, total=False):
    """What a run hands on to :func:`compress.prune` in every round, or to :func:`compress.shrink`; see there."""

    scope: str
    combine: str | None
    calibration: Iterable[Any] | Mapping[str, Iterable[Any]] | None
    loss: Callable[..., torch.Tensor] | Mapping[str, Callable[..., torch.Tensor]] | None
    recover: bool | Sequence[str]
    exact_only: bool
    protect: Sequence[str]
    round_to: int | str
    min_channels: int


@dataclass(frozen=True)
class RoundContext:
    """What a ``train`` function may know: the round (from 1), a folder for its own checkpoints, and a seed.

    The folder outlives a crash: a ``train`` that checkpoints in it goes on in the middle of a round. ``rounds`` is how
    many there are. ``carry(optimizer)`` lets a new optimiser of the model go on where the last round's was; see
    :class:`compress.carry.Carry`.
    """

    round: int
    folder: Path
    seed: int
    rounds: int = 1
    carry: Callable[[Optimizer], None] = lambda optimizer: None


@dataclass(frozen=True)
class Recipe:
    """How a run prunes; with the model and the data it decides the result."""

    budget: Budget
    rounds: int
    schedule: str | Schedule
    criterion: Any
    seed: int
    options: PruneOptions
    methods: tuple[str, ...] = ("prune",)

    def __post_init__(self) -> None:
        if self.shrinks and (unknown := sorted(self.options.keys() - SHRINK_OPTIONS)):
            raise PruneError(f"with methods={self.methods} a run takes no {unknown[0]}=: prune alone, or leave it out")
        for index in range(max(self.rounds, 1)):  # a schedule with a bad value fails here, not after hours of training
            self.target(index)

    def target(self, index: int) -> float:
        """The fraction of the dense cost that is left after round ``index``."""
        return kept_fraction(self.schedule, self.budget.fraction, index, self.rounds)

    @property
    def shrinks(self) -> bool:
        """Whether layers are factorised too."""
        return self.methods != ("prune",)

    def shrink(self, model: nn.Module, example_inputs: Any, fraction: float, index: int) -> ShrinkResult:
        """Prunes and factorises ``model`` to ``fraction`` of its own cost, as in round ``index``."""
        budget = Budget(**{self.budget.metric: fraction})
        seed = seed_everything(self.seed, index, "prune")
        options: dict[str, Any] = {"criterion": self.criterion, "methods": self.methods, **self.options}
        return shrink(model, example_inputs, budget=budget, seed=seed, **options)

    def prune(
        self,
        model: nn.Module,
        example_inputs: Any,
        fraction: float,
        index: int,
        optimizer: Optimizer | None = None,
    ) -> PruneResult:
        """Prunes ``model`` to ``fraction`` of its own cost, as in round ``index``; ``optimizer`` follows."""
        budget = Budget(**{self.budget.metric: fraction})
        seed = seed_everything(self.seed, index, "prune")
        return prune(
            model,
            example_inputs,
            budget=budget,
            criterion=self.criterion,
            seed=seed,
            optimizer=optimizer,
            **self.options,
        )


@dataclass(frozen=True)
class Rounds:
    """The rounds of a run in ``folder``: :meth:`play` commits one, the other methods read committed ones."""

    model: nn.Module
    example_inputs: Any
    recipe: Recipe
    folder: Path

    def path(self, index: int) -> Path:
        """The folder of a round; it exists when the round is committed."""
        return self.folder / f"{index:02d}"

    def record(self, index: int) -> RoundRecord:
        """What the round measured."""
        return RoundRecord.from_json((self.path(index) / RECORD).read_text(encoding="utf-8"))

    def scores(self, index: int) -> dict[str, np.ndarray]:
        """The scores of each group's units that the round pruned by."""
        return load_file(self.path(index) / SCORES)

    def result(self, index: int) -> tuple[nn.Module, Plan]:
        """The model after the round, in evaluation mode, and its plan against the dense model."""
        return _read(self.model, self.path(index))

    def play(self, index: int, train: Callable[..., object], evaluate: Evaluate, test: Evaluate | None = None) -> None:
        """Prunes and commits that on its own, then trains, evaluates, measures and commits the round."""
        pruned = self.folder / f"{index:02d}.pruned"
        if not pruned.exists():
            commit_folder(pruned, lambda partial: self._prune(partial, index))
        model, plan = _read(self.model, pruned)
        optimizer = self._train(model, index, train, pruned) if index > 0 else None
        seed_everything(self.recipe.seed, index, "evaluate")
        metrics = _as_metrics(evaluate(model.eval()), index)
        record = RoundRecord(
            round=index,
            accuracy=_mean(metrics),
            **asdict(measure(model, self.example_inputs)),
            latency_seconds=self._latency(model, index),
            target=self.recipe.target(index),
            metrics=metrics,
            kept=json.loads((pruned / KEPT).read_text(encoding="utf-8")),
            test=None if test is None else _mean(_as_metrics(test(model.eval()), index)),
        )
        commit_folder(self.path(index), lambda partial: _write(partial, model, plan, record, pruned, optimizer))
        shutil.rmtree(pruned)

    def _train(self, model: nn.Module, index: int, train: Callable[..., object], pruned: Path) -> OptimizerState | None:
        """Trains, and returns the state of the optimiser that goes on to the next round."""
        seed = seed_everything(self.recipe.seed, index, "train")
        carry = Carry(model, read_state(pruned / OPTIMIZER, model))
        context = RoundContext(index, self.folder / f"{index:02d}.train", seed, self.recipe.rounds, carry)
        context.folder.mkdir(exist_ok=True)
        model.train()
        train(model, context) if _wants_context(train) else train(model)
        return carry.state()

    def _latency(self, model: nn.Module, index: int) -> float:
        """Seconds of a forward pass; of a pruned model, in the seconds of round 0.

        The dense model is timed again in turn with it: their ratio holds also where the machine is busier by now.
        """
        if index == 0:
            return latency(model, self.example_inputs)
        dense, pruned = latencies([self.model, model], self.example_inputs)
        return self.record(0).latency_seconds * pruned / dense

    def _prune(self, folder: Path, index: int) -> None:
        """Writes the start of a round: what the last round left, cut to what the schedule allows."""
        model, fraction = self.model, 1.0
        plan: Plan = PrunePlan.empty()
        totals: Mapping[str, tuple[int, int]] = {}
        if index > 0:
            model, plan = self.result(index - 1)
            totals = self.record(index - 1).kept
            # At most 1: the last round may have overshot its target by a lump, and be below this one already.
            fraction = min(1.0, self.recipe.target(index) / self._remaining(index - 1, plan))
        optimizer = read_state(self.path(index - 1) / OPTIMIZER, model)
        result: PruneResult | ShrinkResult
        pruning: PruneResult | None
        if index > 0 and self.recipe.shrinks:
            result = self.recipe.shrink(model, self.example_inputs, fraction, index)
            pruning, optimizer = result.pruning, None  # nothing of an optimiser's state fits thin layers
        else:
            result = pruning = self.recipe.prune(model, self.example_inputs, fraction, index, optimizer)
        if index > 0:  # round 0 is the dense model as it was given: recovery would touch its statistics
            model, plan = result.model, joined(plan, result.plan)
        now = {} if pruning is None else pruning.kept
        kept = dict(totals) if pruning is None else {}
        kept |= {name: (left, totals.get(name, (left, total))[1]) for name, (left, total) in now.items()}
        scores = {} if pruning is None else pruning.scores
        if optimizer is not None:
            optimizer.save(folder / OPTIMIZER, model)
        save(model, folder / MODEL, plan=plan)
        (folder / PLAN).write_text(plan.to_json(), encoding="utf-8")
        (folder / KEPT).write_text(json.dumps(kept), encoding="utf-8")
        save_file({name: np.ascontiguousarray(found) for name, found in scores.items()}, folder / SCORES)

    def _remaining(self, index: int, plan: Plan) -> float:
        """The fraction of the dense model's cost that is left after a round, whose plan is ``plan``."""
        metric = self.recipe.budget.metric
        if metric == "channels":
            assert isinstance(plan, PrunePlan)  # (shrink takes no such budget)
            dense = sum(len(scores) for scores in self.scores(0).values())
            return 1 - sum(group.num_removed for group in plan.groups) / dense
        name = "latency_seconds" if metric == "latency" else metric
        return getattr(self.record(index), name) / getattr(self.record(0), name)


def _read(dense: nn.Module, folder: Path) -> tuple[nn.Module, Plan]:
    plan = read_plan((folder / PLAN).read_text(encoding="utf-8"))
    return load(dense, folder / MODEL).eval(), plan


def _write(
    folder: Path,
    model: nn.Module,
    plan: Plan,
    record: RoundRecord,
    pruned: Path,
    optimizer: OptimizerState | None,
) -> None:
    save(model, folder / MODEL, plan=plan)
    if optimizer is not None:
        optimizer.save(folder / OPTIMIZER, model)
    shutil.copyfile(pruned / PLAN, folder / PLAN)
    shutil.copyfile(pruned / SCORES, folder / SCORES)
    (folder / RECORD).write_text(record.to_json(), encoding="utf-8")


def _as_metrics(value: float | Mapping[str, float], index: int) -> dict[str, float]:
    named = value if isinstance(value, Mapping) else {"accuracy": value}
    metrics = {name: float(number) for name, number in named.items()}
    if not metrics or not all(map(math.isfinite, metrics.values())):
        raise PruneError(
            f"evaluate returned {metrics} in round {index}, and finite numbers are needed; "
            "where training diverged, lower the learning rate"
        )
    return metrics


def _mean(metrics: Mapping[str, float]) -> float:
    return sum(metrics.values()) / len(metrics)


def _wants_context(train: Callable[..., object]) -> bool:
    """Whether the second positional parameter has no default: ``train(model, epochs=2)`` gets the model only."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(train).parameters.values()
    return sum(p.kind in positional and p.default is p.empty for p in parameters) >= 2
