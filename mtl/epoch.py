"""One epoch: all its steps, and what they add up to."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mtl.callbacks import Callback
from mtl.evaluation import compute, evaluate, update
from mtl.history import Epoch
from mtl.metrics import delta_m
from mtl.options import FitOptions
from mtl.progress import STEPS_PER_UPDATE, Report
from mtl.sampling import Steps
from mtl.schedule import lr_factor
from mtl.seeding import seed_epoch
from mtl.step import Outcome, Stepper
from mtl.task import Task

_LOG = logging.getLogger("mtl")


class Tally:
    """What the batches of an epoch add up to, by task."""

    def __init__(self, tasks: Sequence[Task], device: torch.device) -> None:
        self._sums = {task.name: torch.zeros((), device=device, dtype=torch.float32) for task in tasks}
        self._factors = {task.name: torch.zeros((), device=device) for task in tasks}
        self._counts: Counter[str] = Counter()
        self._batches: Counter[str] = Counter()
        self._metrics = {task.name: task.new_metric().to(device) for task in tasks}
        self.skipped: Counter[str] = Counter()
        self.cosines: dict[str, float] = {}

    def add(self, outcome: Outcome) -> None:
        """Take in one batch."""
        for name, loss in outcome.losses.items():
            self._sums[name] = self._sums[name] + loss * outcome.counts[name]
            self._factors[name] += outcome.factors[name]
            self._counts[name] += outcome.counts[name]
            self._batches[name] += 1
            output, target = outcome.pairs[name]
            if len(target):
                update(self._metrics[name], output, target)
        self.skipped.update(dict.fromkeys(outcome.skipped, 1))
        self.cosines = self.cosines or outcome.cosines

    def check(self, epoch: int) -> None:
        """Every task must have been trained.

        Raises:
            ValueError: naming the one that was not.
        """
        for name in self._sums:
            if not self._counts[name]:
                reason = "a finite loss" if self.skipped[name] else "a labelled sample"
                raise ValueError(f"task {name!r}: no batch of epoch {epoch} had {reason}; check its data and labels")

    def losses(self) -> dict[str, float]:
        """Mean per label so far, of the tasks that had any."""
        return {name: float(total) / self._counts[name] for name, total in self._sums.items() if self._counts[name]}

    def factors(self) -> dict[str, float]:
        """Mean per batch."""
        return {name: float(total) / self._batches[name] for name, total in self._factors.items()}

    def metrics(self) -> dict[str, float]:
        """On the batches as they were trained on, over all processes."""
        return compute(self._metrics)


@dataclass(frozen=True)
class Epochs:
    """What all epochs of a run have in common.

    Args:
        stepper: the state that they change
        steps: of an epoch
        validation: evaluated after each; None for none
        total: number of epochs, for the learning rate
        report: shows how far it is
        callbacks: called after each step
        cosines: whether to measure those, once an epoch
    """

    stepper: Stepper
    steps: Steps
    validation: Any
    total: int
    report: Report
    callbacks: Sequence[Callback]
    cosines: bool

    def run(self, epoch: int, first: Epoch | None, *, check: bool) -> Epoch:
        """Train on every batch of an epoch, then evaluate.

        Args:
            epoch: 1 for the first
            first: what the run's first epoch gave; None in it
            check: whether labels are in range
        """
        start = time.perf_counter()
        stepper, options, tasks = self.stepper, self.stepper.options, self.stepper.tasks
        seed_epoch(options.seed, epoch)
        self.steps.seed(options.seed, epoch)
        tally, lr = self._train(epoch, check)
        losses = tally.losses()
        stepper.weighting.end_epoch(losses)
        stepper.processes.align(stepper.model.buffers())
        validation: dict[str, float] = {}
        if self.validation is not None:
            with stepper.averaged():
                validation = evaluate(stepper.model, tasks, self.validation)
        weights = stepper.weighting.weights()
        return Epoch(
            epoch=epoch,
            lr=lr,
            loss=losses,
            train=tally.metrics(),
            validation=validation,
            weights=tally.factors() if weights is None else weights,
            seconds=time.perf_counter() - start,
            score=score(validation, tasks, options, first.validation if first else validation),
            skipped=dict(tally.skipped),
            delta_m=_gain(validation, tasks, options),
            cosines=tally.cosines,
        )

    def _train(self, epoch: int, check: bool) -> tuple[Tally, float]:
        stepper, options = self.stepper, self.stepper.options
        tally = Tally(stepper.tasks, stepper.placement.device)
        num_batches, num_seen, lr = len(self.steps), 0, 0.0
        for index, batch in enumerate(self.steps):
            in_group = index % options.accumulate
            group = min(options.accumulate, num_batches - index + in_group)  # the last may be smaller
            cosines = self.cosines and not tally.cosines and len(batch.labels) > 1
            outcome = stepper.add(batch, 1 / max(group, 1), check=check, cosines=cosines)
            _report_skipped(outcome, epoch, index + 1, options)
            tally.add(outcome)
            num_seen += 1
            if in_group + 1 == group:
                lr, progress = self._lr(num_batches)
                stepper.update(lr, progress)
                for callback in self.callbacks:
                    callback.after_step(stepper.model, stepper.step)
            if self.report.live and num_seen % STEPS_PER_UPDATE == 0:
                text = " ".join(f"{name} {loss:.3f}" for name, loss in tally.losses().items())
                self.report.steps(STEPS_PER_UPDATE, f"epoch {epoch}  loss {text}  lr {lr:.2g}")
        if num_seen != num_batches:
            raise ValueError(
                f"the data gave {num_seen} batches in epoch {epoch}, but their length is {num_batches}: make them agree"
            )
        tally.check(epoch)
        return tally, lr

    def _lr(self, num_batches: int) -> tuple[float, float]:
        """The learning rate of the next step, and the part of all steps that is done."""
        options, step = self.stepper.options, self.stepper.step
        updates = -(-num_batches // options.accumulate)
        factor = lr_factor(options.schedule, step, self.total * updates, options.warmup_epochs * updates)
        return options.peak_lr * factor, step / (self.total * updates)


def score(
    metrics: Mapping[str, float], tasks: Sequence[Task], options: FitOptions, first: Mapping[str, float]
) -> float | None:
    """What "best" and ``patience`` go by, see ``FitOptions.monitor``; None without metrics, and where nothing asks for
    it and a metric does not say whether more is better."""
    if not metrics:
        return None
    chosen = [task for task in tasks if options.monitor in (None, task.name)]
    terms = []
    for task in chosen:
        if task.direction is None:
            if options.keep == "last" and options.patience is None:
                return None
            raise ValueError(
                f"task {task.name!r}: {type(task.metric).__name__} does not say whether more is better: give the task "
                "direction='max' or 'min'"
            )
        value = metrics[task.name]
        if task.direction == "min":
            value = -value / (abs(first[task.name]) or 1.0) if options.monitor is None else -value
        terms.append(value)
    return sum(terms) / len(terms)


def _gain(metrics: Mapping[str, float], tasks: Sequence[Task], options: FitOptions) -> float | None:
    if not options.reference or not metrics:
        return None
    return delta_m(metrics, options.reference, {task.name: task.direction or "max" for task in tasks})


def _report_skipped(outcome: Outcome, epoch: int, batch: int, options: FitOptions) -> None:
    for name, value in outcome.skipped.items():
        what = f"task {name!r}: the loss is {value} in epoch {epoch}, batch {batch}"
        if options.on_nan == "stop":
            raise ValueError(
                f"{what}; check inputs and targets, lower lr, set max_grad_norm, or leave such batches out with "
                'on_nan="skip"'
            )
        _LOG.warning("%s; the task is left out of this batch", what)
