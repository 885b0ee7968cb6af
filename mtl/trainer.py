"""``fit``: train a model on one or more tasks, and carry on after a crash with the numbers of an undisturbed run."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from mtl.batch import by_task, call, mode, unpack
from mtl.board import Board
from mtl.checkpoint import RunFolder
from mtl.distillation import Distillation
from mtl.ema import ModelAverage
from mtl.evaluation import compute, evaluate
from mtl.history import Epoch, History
from mtl.optimizer import build_optimizer
from mtl.options import FitOptions
from mtl.placement import Placement
from mtl.progress import STEPS_PER_UPDATE, Report
from mtl.schedule import lr_factor
from mtl.seeding import preserved_rng, seed_epoch
from mtl.task import Task, check_tasks
from mtl.weighting import Weighting, resolve

# They change where or how loudly a run works, not which run it is.
_NOT_IN_SIGNATURE = ("device", "num_threads", "progress")


def fit(
    model: nn.Module,
    tasks: Task | Sequence[Task],
    data: Iterable[Any],
    epochs: int = 10,
    *,
    weighting: str | Mapping[str, float] | Weighting = "equal",
    validation: Iterable[Any] | None = None,
    folder: str | os.PathLike[str] | None = None,
    options: FitOptions | None = None,
    distillation: Distillation | None = None,
    penalty: Callable[[nn.Module, float], Tensor] | None = None,
) -> History:
    """Train the model in place.

    Every epoch starts from random numbers that depend on (seed, epoch) alone: data order, augmentation and dropout.
    With a folder the state is saved after each epoch, and the same call after a crash goes on with the first
    unfinished epoch and ends with bitwise the same numbers (on one machine with as many threads); a finished folder
    gives its model and history at once. The folder also holds TensorBoard events.

    Args:
        model: gives ``{task: output}``, or a tensor where there is one task. Afterwards its modules are in the modes,
            and its parameters on the device and in the layout, that they were given in
        tasks: one or more
        data: batches ``(input, target)`` with a length, to be iterated every epoch (a ``DataLoader``, a
            ``mtl.data.TensorLoader``, a list); input is a tensor, a tuple of positional or a dict of keyword arguments;
            target is a tensor (one task) or ``{task: tensor}``
        epochs: how many, >= 0
        weighting: "equal", "uncertainty", a factor per task, or a ``Weighting``
        validation: data in the same form, evaluated after each epoch
        folder: of this run only
        options: everything else
        distillation: a teacher to learn from as well
        penalty: ``penalty(model, progress)`` is a scalar that every step adds to the loss; ``progress`` is the part of
            the steps that is done, in [0, 1)

    Returns:
        Loss and metrics of each epoch.

    Raises:
        ValueError: for data without length or batches, outputs or targets that do not fit the tasks, a loss that is not
            finite, and a folder of another run (naming what differs).

    Example:
        >>> data = [(torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [2.0]]))]
        >>> history = fit(nn.Linear(1, 1, bias=False), Task("double", nn.MSELoss()), data, epochs=60)
        >>> round(history[-1].loss["double"], 1)
        0.0
    """
    tasks, options = check_tasks(tasks), options or FitOptions()
    num_steps = _length(data)
    if epochs < 0:
        raise ValueError(f"epochs is {epochs}, but it must be at least 0")
    combine = resolve(weighting, [task.name for task in tasks])
    signature = _signature(model, tasks, combine, options)
    if distillation is not None:
        signature["distillation"] = {"weight": distillation.weight, "temperature": distillation.temperature}
    if penalty is not None:
        signature["penalty"] = _described(penalty)
    signature |= {"epochs": epochs, "batches": num_steps, "validation": validation is not None}
    store = RunFolder(folder, signature) if folder is not None else None
    saved = store.load() if store is not None else None
    placement = Placement.choose(model, options)
    if saved is not None:
        placement = placement.kept(saved["precision"], saved["channels_last"])

    with ExitStack() as stack:
        stack.enter_context(preserved_rng())
        stack.enter_context(_threads(options.num_threads))
        for module, training in ((model, True), *([(distillation.teacher, False)] if distillation else [])):
            stack.enter_context(placement.applied_to(module))
            stack.enter_context(mode(module, training=training))
        trainer = _Trainer(model, tasks, combine, options, placement, num_steps * epochs)
        trainer.distillation, trainer.penalty = distillation, penalty
        history = History()
        if saved is not None:
            trainer.load_state_dict(saved["trainer"])
            history = History.from_json(saved["history"])
        if len(history) < epochs:
            first = len(history) + 1
            with (
                Board(folder, first) as board,
                Report(num_steps * epochs, num_steps * len(history), enabled=options.progress) as report,
            ):
                for epoch in range(first, epochs + 1):
                    row = trainer.run_epoch(data, validation, epoch, report)
                    history = History((*history.epochs, row))
                    board.write(row)
                    if store is not None:
                        numbers = {"precision": placement.precision, "channels_last": placement.channels_last}
                        store.save({**numbers, "trainer": trainer.state_dict(), "history": history.to_json()})
                    report.epoch(row, epochs)
        trainer.finish()
    return history


class _Trainer:
    """The state of a run between epochs, and what one epoch does to it."""

    def __init__(
        self,
        model: nn.Module,
        tasks: Sequence[Task],
        combine: Weighting,
        options: FitOptions,
        placement: Placement,
        total_steps: int,
    ) -> None:
        self.model, self.tasks, self.options, self.placement = model, tasks, options, placement
        self.combine = combine.to(placement.device)
        self.losses = {task.name: _training_loss(task, options.label_smoothing) for task in tasks}
        self.optimizer = build_optimizer(model, self.combine, options)
        self.scaler = torch.amp.GradScaler(placement.device.type, enabled=placement.precision == "fp16")
        self.average = ModelAverage(model, options.ema_decay) if options.ema_decay is not None else None
        self.distillation: Distillation | None = None
        self.penalty: Callable[[nn.Module, float], Tensor] | None = None
        self.total_steps = total_steps
        self.step = 0

    def run_epoch(self, data: Iterable[Any], validation: Iterable[Any] | None, epoch: int, report: Report) -> Epoch:
        """Train on all of the data once, then evaluate."""
        start = time.perf_counter()
        seed_epoch(data, self.options.seed, epoch)
        steps_before = self.step
        warmup_steps = self.options.warmup_epochs * _length(data)
        sums: dict[str, Tensor] = {}
        metrics = {task.name: task.new_metric().to(self.placement.device) for task in self.tasks}
        num_samples, lr = 0, 0.0
        for batch in data:
            inputs, target = unpack(batch, self.placement.device)
            targets = by_task(target, self.tasks, "target")
            lr = self.options.peak_lr * lr_factor(self.options.schedule, self.step, self.total_steps, warmup_steps)
            outputs, losses = self._train_step(inputs, targets, lr)
            batch_size = len(next(iter(targets.values())))
            num_samples += batch_size
            for name, loss in losses.items():
                share = loss.detach() * batch_size
                sums[name] = sums[name] + share if name in sums else share
                metrics[name].update(outputs[name].detach(), targets[name])
            if report.live and self.step % STEPS_PER_UPDATE == 0:
                text = " ".join(f"{name} {float(total) / num_samples:.3f}" for name, total in sums.items())
                report.steps(STEPS_PER_UPDATE, f"epoch {epoch}  loss {text}  lr {lr:.2g}")
        _check_epoch(sums, epoch, self.step - steps_before, _length(data))
        return Epoch(
            epoch=epoch,
            lr=lr,
            loss={name: float(total) / num_samples for name, total in sums.items()},
            train=compute(metrics),
            validation=self._evaluate(validation) if validation is not None else {},
            weights=self.combine.weights(),
            seconds=time.perf_counter() - start,
        )

    def _train_step(
        self, inputs: Any, targets: Mapping[str, Tensor], lr: float
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with self.placement.autocast():
            values = call(self.model, inputs)
            taught = self.distillation.outputs(inputs, self.tasks) if self.distillation is not None else {}
        outputs = by_task(values, self.tasks, "output of the model")
        losses = {name: loss(outputs[name], targets[name]) for name, loss in self.losses.items()}
        if self.distillation is not None:
            losses = self.distillation.mixed(losses, outputs, taught, self.tasks)
        total = self.combine(losses)
        if self.penalty is not None:
            total = total + self.penalty(self.model, self.step / self.total_steps)
        self.optimizer.zero_grad()
        self.scaler.scale(total).backward()
        if self.options.max_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.options.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        if self.average is not None:
            self.average.update(self.model)
        return outputs, losses

    def _evaluate(self, data: Iterable[Any]) -> dict[str, float]:
        if self.average is None:
            return evaluate(self.model, self.tasks, data)
        with self.average.applied_to(self.model):
            return evaluate(self.model, self.tasks, data)

    def finish(self) -> None:
        """The averaged weights are the result, where an average was asked for and there is one."""
        if self.average is not None and self.average.num_updates:
            self.average.write_to(self.model)

    def state_dict(self) -> dict[str, Any]:
        """All that the next epoch depends on: random numbers do not belong to it, see ``seed_epoch``."""
        average = self.average.state_dict() if self.average is not None else None
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "weighting": self.combine.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": average,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.combine.load_state_dict(state["weighting"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])


def _length(data: Iterable[Any]) -> int:
    try:
        length = len(data)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(
            f"the data ({type(data).__name__}) have no length, and every epoch iterates them: give a DataLoader over a "
            "sized data set, an mtl.data.TensorLoader or a list of batches"
        ) from None
    if length == 0:
        raise ValueError("the data hold no batch: there is nothing to train on")
    return length


def _signature(model: nn.Module, tasks: Sequence[Task], combine: Weighting, options: FitOptions) -> dict[str, Any]:
    return {
        "options": {name: value for name, value in asdict(options).items() if name not in _NOT_IN_SIGNATURE},
        "tasks": {task.name: f"{_described(task.loss)}, {type(task.metric).__name__}" for task in tasks},
        "weighting": f"{type(combine).__name__}({combine.extra_repr()})",
        "model": {name: list(tensor.shape) for name, tensor in model.state_dict().items()},
    }


def _described(loss: Callable[..., Any]) -> str:
    if not isinstance(loss, nn.Module):
        return getattr(loss, "__qualname__", type(loss).__name__)
    settings = {name: value for name, value in vars(loss).items() if isinstance(value, int | float | str)}
    shown = (f"{name}={value}" for name, value in sorted(settings.items()) if name != "training" and name[0] != "_")
    return f"{type(loss).__name__}({', '.join(shown)})"


def _training_loss(task: Task, label_smoothing: float) -> Callable[[Tensor, Tensor], Tensor]:
    if label_smoothing == 0 or not isinstance(task.loss, nn.CrossEntropyLoss):
        return task.loss
    loss = copy.copy(task.loss)
    loss.label_smoothing = label_smoothing
    return loss


def _check_epoch(sums: Mapping[str, Tensor], epoch: int, num_steps: int, expected: int) -> None:
    if num_steps != expected:
        raise ValueError(
            f"the data gave {num_steps} batches in epoch {epoch}, but their length is {expected}: make them agree"
        )
    for name, total in sums.items():
        if not torch.isfinite(total):
            raise ValueError(
                f"task {name!r}: the loss is {float(total)} in epoch {epoch}; check inputs and targets, lower lr, or "
                "set max_grad_norm"
            )


@contextmanager
def _threads(num_threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        yield
    finally:
        torch.set_num_threads(before)
