"""``fit``: train a model on one or more tasks, and carry on after a crash with the numbers of an undisturbed run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mtl.batch import mode
from mtl.board import Board
from mtl.callbacks import Callback
from mtl.checkpoint import RunFolder
from mtl.distillation import Distillation
from mtl.epoch import Epochs
from mtl.history import Epoch, History
from mtl.options import FitOptions
from mtl.placement import Placement
from mtl.progress import Report
from mtl.sampling import steps_of
from mtl.seeding import preserved_rng
from mtl.signature import signature
from mtl.step import Penalty, Stepper
from mtl.task import Task, check_tasks
from mtl.weighting import Weighting, resolve


def fit(
    model: nn.Module,
    tasks: Task | Sequence[Task],
    data: Iterable[Any] | Mapping[str, Iterable[Any]],
    epochs: int = 10,
    *,
    weighting: str | Mapping[str, float] | Weighting = "equal",
    validation: Iterable[Any] | Mapping[str, Iterable[Any]] | None = None,
    folder: str | os.PathLike[str] | None = None,
    options: FitOptions | None = None,
    distillation: Distillation | None = None,
    penalty: Penalty | None = None,
    callbacks: Sequence[Callback] = (),
) -> History:
    """Train the model in place.

    Every epoch starts from random numbers that depend on (seed, epoch) alone: data order, augmentation and dropout.
    With a folder the state is saved after each epoch, and the same call after a crash goes on with the first
    unfinished epoch and ends with bitwise the same numbers (on one machine with as many threads); a finished folder
    gives its model and history at once. The folder also holds TensorBoard events.

    Under ``torchrun`` or ``accelerate launch`` each process takes its part of every batch, and the numbers are those of
    one process up to rounding: see ``mtl.processes``. Batch norm sees a process's part only, which is a warning, unless
    it is a synchronised one.

    Args:
        model: gives ``{task: output}``, or a tensor where there is one task. Afterwards its modules are in the modes,
            and its parameters on the device and in the layout, that they were given in
        tasks: one or more
        data: batches ``(input, target)`` with a length, to be iterated every epoch (a ``DataLoader``, a
            ``mtl.data.TensorLoader``, a list); input is a tensor, a tuple of positional or a dict of keyword arguments;
            target is a tensor (one task) or ``{task: tensor}``. Or ``{task: such data}``, where every task has data of
            its own; what an epoch is then, ``FitOptions.sampling`` says
        epochs: how many, >= 0
        weighting: "equal", "uncertainty", "dwa", "gradnorm", "random", "geometric"; "pcgrad", "mgda", "cagrad", "imtl",
            "nash", "upgrad" or "aligned" (extra ``gradients``); a factor per task; or a ``Weighting``
        validation: data in the same form, evaluated after each epoch
        folder: of this run only
        options: everything else
        distillation: a teacher to learn from as well
        penalty: ``penalty(model, progress)`` is a scalar that every step adds to the loss; ``progress`` is the part of
            the steps that is done, in [0, 1)
        callbacks: called after steps and epochs; those that change the model must do so by (seed, epoch) alone for a
            resumed run to end with the same numbers

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
    steps = steps_of(data, tasks, options.sampling)
    _check(tasks, options, epochs, validation)
    combine = resolve(weighting, [task.name for task in tasks])
    run = signature(model, tasks, combine, options, distillation, penalty)
    run |= {"epochs": epochs, "batches": len(steps), "validation": validation is not None}
    placement = Placement.choose(model, options)
    store = RunFolder(folder, run) if folder is not None else None
    saved = store.load() if store is not None else None
    if saved is not None:
        placement = placement.kept(saved["precision"], saved["channels_last"])

    with ExitStack() as stack:
        stack.enter_context(preserved_rng())
        stack.enter_context(_threads(options.num_threads))
        for module, training in ((model, True), *([(distillation.teacher, False)] if distillation else [])):
            stack.enter_context(placement.applied_to(module))
            stack.enter_context(mode(module, training=training))
        stepper = Stepper(model, tasks, combine, options, placement, distillation, penalty)
        stepper.processes.check_batch_norm(model)
        progress = _Progress(stepper, epochs, store)
        if saved is not None:
            progress.load(saved)
        done = len(progress.history)
        if not progress.is_over:
            first = stepper.processes.is_first
            board = stack.enter_context(Board(folder if first else None, done + 1))
            batches = len(steps) * epochs, len(steps) * done
            report = stack.enter_context(Report(*batches, enabled=options.progress and first))
            several = folder is not None and len(tasks) > 1
            loop = Epochs(stepper, steps, validation, epochs, report, callbacks, several)
            if not done:
                board.spectra(model, 0)
            while not progress.is_over:
                row = loop.run(len(progress.history) + 1, progress.first_row, check=len(progress.history) == done)
                wish = [callback.after_epoch(model, row) for callback in callbacks]
                board.write(row)
                board.spectra(model, row.epoch)
                progress.add(row, stop=any(wish))
                report.epoch(row, epochs)
        progress.finish()
    return progress.history


def restore(model: nn.Module, folder: str | os.PathLike[str], which: str = "best") -> None:
    """Give the model the weights of a run that ``fit`` left in a folder.

    Args:
        model: of the run's class and sizes
        folder: of the run
        which: "best" by the validation score, or "last"

    Raises:
        ValueError: where there is no run, the run had no validation data to choose the best by, or the weights do not
            fit.
    """
    if which not in ("best", "last"):
        raise ValueError(f"which is {which!r}, but it must be 'best' or 'last'")
    saved = RunFolder(folder, None).load()
    if saved is None:
        raise ValueError(f"{os.fspath(folder)} holds no run of mtl.fit")
    found = saved["best"] if which == "best" else saved["stepper"]
    if found is None:
        raise ValueError(
            f"the run in {os.fspath(folder)} had no validation data, so there is no best: use which='last'"
        )
    try:
        model.load_state_dict(found["model"])
    except RuntimeError as error:
        raise ValueError(
            f"the model in {os.fspath(folder)} is another: {str(error).splitlines()[-1].strip()}"
        ) from None
    if which == "last" and found["average"] is not None:
        with torch.no_grad():
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                tensor.copy_(found["average"]["average"][name])


class _Progress:
    """How far a run is: its history, the best epoch's weights, and whether it is over; saved after each epoch."""

    def __init__(self, stepper: Stepper, epochs: int, store: RunFolder | None) -> None:
        self._stepper, self._epochs, self._store = stepper, epochs, store
        self._stopped = False
        self._best: dict[str, Any] | None = None
        self.history = History()

    @property
    def first_row(self) -> Epoch | None:
        """None before the first epoch."""
        return self.history[0] if self.history else None

    @property
    def is_over(self) -> bool:
        """Whether all epochs are done, the score has not risen for long, or a callback ended the run."""
        patience, best = self._stepper.options.patience, self.history.best
        waited = len(self.history) - best.epoch if best is not None else 0
        return self._stopped or len(self.history) >= self._epochs or (patience is not None and waited >= patience)

    def add(self, row: Epoch, *, stop: bool) -> None:
        """An epoch is done."""
        self.history = History((*self.history.epochs, row))
        self._stopped = stop
        if self.history.best is row:
            with self._stepper.averaged():
                weights = {name: _copy(value) for name, value in self._stepper.model.state_dict().items()}
            self._best = {"epoch": row.epoch, "model": weights}
        if self._store is not None:
            if self._stepper.processes.is_first:
                self._store.save(self._state())
            self._stepper.processes.wait()

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._stepper.load_state_dict(state["stepper"])
        self.history = History.from_json(state["history"])
        self._best, self._stopped = state["best"], state["stopped"]

    def finish(self) -> None:
        """The model gets the weights that it should end with: the best epoch's, or the average where there is one."""
        average = self._stepper.average
        if self._stepper.options.keep == "best" and self._best is not None:
            self._stepper.model.load_state_dict(self._best["model"])
        elif average is not None and average.num_updates:
            average.write_to(self._stepper.model)

    def _state(self) -> dict[str, Any]:
        placement = self._stepper.placement
        return {
            "precision": placement.precision,
            "channels_last": placement.channels_last,
            "stepper": self._stepper.state_dict(),
            "history": self.history.to_json(),
            "best": self._best,
            "stopped": self._stopped,
        }


def _check(tasks: Sequence[Task], options: FitOptions, epochs: int, validation: object) -> None:
    names = [task.name for task in tasks]
    if epochs < 0:
        raise ValueError(f"epochs is {epochs}, but it must be at least 0")
    for option, used in (
        ("monitor", [options.monitor] if options.monitor is not None else []),
        ("task_lr", list(options.task_lr or {})),
        ("reference", list(options.reference or {})),
    ):
        if unknown := sorted(set(used) - set(names)):
            raise ValueError(f"{option} names {unknown[0]!r}, which is no task: the tasks are {names}")
    if zero := [name for name, value in (options.reference or {}).items() if value == 0]:
        raise ValueError(f"reference of task {zero[0]!r} is 0, of which nothing is a fraction: leave the task out")
    if validation is None and (options.keep == "best" or options.patience is not None):
        wish = 'keep="best"' if options.keep == "best" else f"patience={options.patience}"
        raise ValueError(f"{wish} chooses by validation data, but there are none: pass validation=")


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


@contextmanager
def _threads(num_threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        yield
    finally:
        torch.set_num_threads(before)
