"""One step of training, and the state that steps change."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mtl.backward import Backward, cut_at
from mtl.batch import Batch, forward
from mtl.distillation import Distillation
from mtl.ema import ModelAverage
from mtl.optimizer import build_optimizer, set_lr
from mtl.options import FitOptions
from mtl.placement import Placement
from mtl.processes import Processes
from mtl.task import Labels, Task
from mtl.weighting import GradientWeighting, Weighting

Penalty = Callable[[nn.Module, float], Tensor]


@dataclass(frozen=True)
class Outcome:
    """What came out of one batch, by task; all without a graph.

    Args:
        pairs: output and target of this process's labelled samples, as the metrics take them
        losses: over all processes, as they are minimised but for the factors
        counts: labels over all processes
        factors: of the gradients
        skipped: value of each loss that was not finite and was left out
        cosines: see ``Backward.cosines``
    """

    pairs: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    losses: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    factors: dict[str, Tensor] = field(default_factory=dict)
    skipped: dict[str, float] = field(default_factory=dict)
    cosines: dict[str, float] = field(default_factory=dict)


class Stepper:
    """The state of a run, and what one batch does to it.

    A model may have ``forward_tasks({task: input})`` (where each task has inputs of its own),
    ``auxiliary_losses(outputs, targets)`` (more to minimise, by task), ``penalty()`` (more to minimise, a scalar),
    ``proximal_step(lr)`` (called after each step), ``representation`` (the module whose output is all that the tasks
    share) and ``task_parameters(task)``.
    """

    def __init__(
        self,
        model: nn.Module,
        tasks: Sequence[Task],
        weighting: Weighting,
        options: FitOptions,
        placement: Placement,
        distillation: Distillation | None = None,
        penalty: Penalty | None = None,
    ) -> None:
        self.model, self.tasks, self.options, self.placement = model, tasks, options, placement
        self.distillation, self.penalty = distillation, penalty
        if distillation is not None:
            distillation.check(model)
        self.processes = Processes.here()
        self.weighting = weighting.to(placement.device)
        self.losses = {task.name: _training_loss(task, options.label_smoothing) for task in tasks}
        self.processes.align((*model.parameters(), *model.buffers()))
        self.optimizer = build_optimizer(model, self.weighting, options)
        self.optimizer.zero_grad()
        self.scaler = torch.amp.GradScaler(placement.device.type, enabled=placement.precision == "fp16")
        self.average = ModelAverage(model, options.ema_decay) if options.ema_decay is not None else None
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.backward = Backward(self.weighting, trained, self.processes)
        self.step = 0

    def add(self, batch: Batch, part: float = 1.0, *, check: bool = False, cosines: bool = False) -> Outcome:
        """Add ``part`` of the gradients of a batch.

        Args:
            batch: as it was read
            part: of the next step that the batch makes up
            check: whether labels are in range, which waits for the device
            cosines: also measure those

        Raises:
            ValueError: for outputs that do not fit the labels.
        """
        if not batch.labels:
            return Outcome()
        local, parts = self.processes.part(batch)
        local = local.to(self.placement.device)
        with self._buffers_kept_where_skipped() as restore, cut_at(self._representation(batch)) as cuts:
            with self.placement.autocast(), self._features() as features:
                outputs = forward(self.model, local, self.tasks)
            pairs = self._pairs(local, outputs, check)
            losses = self._losses(local, outputs, pairs, features)
            values = self._over_processes({name: parts[name] * loss.detach() for name, loss in losses.items()})
            skipped = {name: number for name, value in values.items() if not math.isfinite(number := float(value))}
            if skipped:
                restore()
        values = {name: value for name, value in values.items() if name not in skipped}
        counts = {name: batch.labels[name].count for name in values}
        seen = {name: (pairs[name][0].detach(), pairs[name][1]) for name in values}
        if not values:
            return Outcome(skipped=skipped)
        weights = {task.name: task.weight for task in self.tasks}
        weighted = {name: weights[name] * parts[name] * losses[name] for name in values}
        angles = self.backward.cosines(weighted, cuts) if cosines else {}
        totals = {name: weights[name] * value for name, value in values.items()}
        factors = self.backward(weighted, totals, cuts, self.scaler.get_scale() * part)
        return Outcome(seen, values, counts, factors, skipped, angles)

    def update(self, lr: float, progress: float) -> None:
        """Take a step along the gradients that were added up, and forget them; ``progress`` is for the penalty."""
        set_lr(self.optimizer, lr)
        penalties = [self.penalty(self.model, progress)] if self.penalty is not None else []
        if callable(own := getattr(self.model, "penalty", None)):
            penalties.append(own())
        for penalty in penalties:
            if penalty.requires_grad:
                self.scaler.scale(penalty).backward()
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.processes.average_gradients(trained)
        if any(parameter.grad is not None for parameter in trained):
            if self.options.max_grad_norm is not None:
                self.scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self.model.parameters(), self.options.max_grad_norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            if callable(proximal_step := getattr(self.model, "proximal_step", None)):
                proximal_step(lr)
            if self.average is not None:
                self.average.update(self.model)
        self.step += 1

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model as it would be if training ended here."""
        if self.average is None or not self.average.num_updates:
            yield
        else:
            with self.average.applied_to(self.model):
                yield

    def state_dict(self) -> dict[str, Any]:
        """All that the next epoch depends on: random numbers do not belong to it, see ``seed_epoch``."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "weighting": self.weighting.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.weighting.load_state_dict(state["weighting"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])

    def _pairs(self, batch: Batch, outputs: Mapping[str, Any], check: bool) -> dict[str, tuple[Tensor, Tensor]]:
        pairs = {}
        for task in self.tasks:
            if (labels := batch.labels.get(task.name)) is not None:
                if check:
                    task.check(outputs[task.name], labels)
                pairs[task.name] = task.pair(outputs[task.name], labels)
        return pairs

    def _features(self) -> AbstractContextManager[dict[str, list[Tensor]]]:
        return self.distillation.watched(self.model) if self.distillation is not None else nullcontext({})

    def _losses(
        self,
        batch: Batch,
        outputs: Mapping[str, Any],
        pairs: Mapping[str, tuple[Tensor, Tensor]],
        features: Mapping[str, Sequence[Tensor]],
    ) -> dict[str, Tensor]:
        """What each task minimises on this process's samples; a process without samples of a task has 0 for it."""
        labels: Mapping[str, Labels] = batch.labels
        losses = {
            name: self.losses[name](*pair) if labels[name].count else outputs[name].sum() * 0.0
            for name, pair in pairs.items()
        }
        if self.distillation is not None:
            with self.placement.autocast():
                losses = self.distillation.losses(losses, batch, outputs, features, self.tasks)
        if callable(auxiliary := getattr(self.model, "auxiliary_losses", None)):
            more = auxiliary(outputs, {name: found.values for name, found in labels.items() if found.count})
            losses = {name: loss + more[name] if name in more else loss for name, loss in losses.items()}
        return losses

    def _over_processes(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        together = torch.stack(list(values.values()))
        self.processes.average([together])
        return dict(zip(values, together, strict=True))

    def _representation(self, batch: Batch) -> nn.Module | None:
        if batch.own or len(batch.labels) < 2 or not isinstance(self.weighting, GradientWeighting):
            return None
        module = getattr(self.model, "representation", None)
        return module if isinstance(module, nn.Module) else None

    @contextmanager
    def _buffers_kept_where_skipped(self) -> Iterator[Callable[[], None]]:
        """A batch that is skipped must not leave its NaN in running statistics: the function takes them back."""
        before = [buffer.clone() for buffer in self.model.buffers()] if self.options.on_nan == "skip" else []

        def restore() -> None:
            for buffer, values in zip(self.model.buffers(), before, strict=False):
                buffer.copy_(values)

        yield restore


def _training_loss(task: Task, label_smoothing: float) -> Callable[[Tensor, Tensor], Tensor]:
    if label_smoothing == 0 or not isinstance(task.loss, nn.CrossEntropyLoss):
        return task.loss
    loss = copy.copy(task.loss)
    loss.label_smoothing = label_smoothing
    return loss
