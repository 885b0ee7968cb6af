"""Several tasks in one model: which of its outputs, operators, data and losses belong to each.

A model of several tasks gives a mapping {task: output}. Nothing else is asked of it: where the mapping comes from, and
what the tasks share, is seen in its trace.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeGuard

from torch import Tensor

from compress.calibration import Calibration, check_calibration
from compress.channels import ChannelGroup
from compress.errors import CalibrationError, PruneError
from compress.recorder import Op, Trace
from compress.removal import Values

Loss = Callable[[Any, Any], Tensor]
OTHERS = 0.1  # what a squared error on another task's data counts in a layer that is not that task's


@dataclass(frozen=True)
class Reach:
    """What some outputs depend on: indices of operators of the evaluation run, and names of parameters and buffers."""

    ops: frozenset[int]
    parameters: frozenset[str]


@dataclass(frozen=True)
class View:
    """What one task sees of a model: of outputs and targets that are mappings its own entry. ``task`` None sees all.

    ``reach`` is None where everything counts.
    """

    task: str | None = None
    calibration: Calibration | None = None
    loss: Loss | None = None
    reach: Reach | None = None

    def of(self, value: Any) -> Any:
        """The task's part of an output or a target."""
        return value[self.task] if self.task is not None and isinstance(value, Mapping) else value

    def sees(self, group: ChannelGroup) -> bool:
        """Whether the task's output depends on the group."""
        return self.reach is None or any(member.parameter in self.reach.parameters for member in group.members)

    def reaches(self, op: Op) -> bool:
        """Whether the task's output depends on what the operator gives."""
        return self.reach is None or op.index in self.reach.ops


EVERYTHING = View()


class ByTask:
    """The batches of all tasks one after the other, in proportion; the last batches of all of them come last."""

    def __init__(self, calibration: Mapping[str, Calibration]) -> None:
        self._calibration = dict(calibration)

    def __iter__(self) -> Iterator[Any]:
        own = {task: list(batches) for task, batches in self._calibration.items()}
        return (own[task][place] for task, place in self._order({task: len(all_) for task, all_ in own.items()}))

    @cached_property
    def tasks(self) -> list[str]:
        """Whose each batch is."""
        sizes = {task: len(list(batches)) for task, batches in self._calibration.items()}
        return [task for task, _ in self._order(sizes)]

    @staticmethod
    def _order(sizes: Mapping[str, int]) -> list[tuple[str, int]]:
        placed = [((place + 1) / size, task, place) for task, size in sizes.items() for place in range(size)]
        return [(task, place) for _, task, place in sorted(placed, key=lambda item: item[0])]

    def __len__(self) -> int:
        return len(self.tasks)


def counts_of(views: Sequence[View], data: ByTask, weights: Values | None) -> Callable[[str, int], float]:
    """What squared errors of a layer, by parameter, count on a batch of ``data``, by number.

    A layer that all tasks see serves each as much as its weight (all alike if None, 1 on average). What some see (a
    head, say) is theirs: data of the others count little, and are there as it may have few of its own.
    """
    own = {view.task: view.reach.parameters for view in views if view.reach is not None}
    alike = [1 / len(views)] * len(views)
    size = dict(zip((view.task for view in views), alike if weights is None else weights.tolist(), strict=True))

    def count(parameter: str, batch: int) -> float:
        task = data.tasks[batch]
        seen = [each for each, parameters in own.items() if parameter in parameters]
        if len(seen) == len(views):
            return max(len(views) * size[task], OTHERS)
        return 1.0 if task in seen else OTHERS

    return count


def is_by_task(calibration: Any) -> TypeGuard[Mapping[str, Calibration]]:
    """Whether it is a mapping {task: batches}; one of tensors is a batch, the keyword arguments of a model."""
    return (
        isinstance(calibration, Mapping)
        and len(calibration) > 0
        and not any(isinstance(value, Tensor) for value in calibration.values())
    )


def whole(calibration: Any, loss: Any) -> View:
    """The view of everything at once, for a criterion that knows of no tasks.

    Raises:
        PruneError: calibration or losses are given by task, and nobody said how to combine them.
    """
    for name, value in (("calibration", is_by_task(calibration)), ("loss", isinstance(loss, Mapping))):
        if value:
            raise PruneError(f"{name} is given by task: say how tasks are combined, as in combine='balanced'")
    return View(None, calibration, loss)


def views_of(trace: Trace, calibration: Any, loss: Any) -> list[View]:
    """The tasks of a model, which are the names of its outputs, or those of ``calibration`` where it has fewer.

    Args:
        trace: of the model.
        calibration: batches for all tasks, with targets {task: target}, or {task: batches}; None for no data.
        loss: ``loss(output, target)`` for every task, or {task: loss}; cross-entropy on class indices where None.

    Raises:
        PruneError: the model gives no mapping {task: output}, or a loss is of no task.
        CalibrationError: data of a task that the model does not have, or none for one that has a loss.
    """
    if not trace.named:
        raise PruneError(
            "combine is for models of several tasks, whose output is a mapping {task: output}: this one gives none"
        )
    own, losses = is_by_task(calibration), isinstance(loss, Mapping)
    tasks = list(calibration if own else loss if losses else trace.named)
    for name in (*tasks, *(loss if losses else ())):
        if name not in trace.named:
            raise CalibrationError(f"there is no output for task {name!r}: the model gives {', '.join(trace.named)}")
        if name not in tasks:
            raise CalibrationError(f"task {name!r} has a loss and no data: there are data for {', '.join(tasks)}")
    return [
        View(
            task,
            check_calibration(calibration[task], f"task {task!r}") if own else calibration,
            loss.get(task) if losses else loss,
            reach_of(trace, task),
        )
        for task in tasks
    ]


def reach_of(trace: Trace, task: str) -> Reach:
    """What the output of a task depends on."""
    alive, ops = {ref.id for ref in trace.named[task]}, set()
    for op in reversed(trace.evaluation):  # (what writes in place gives a tensor that it reads)
        if any(ref.id in alive for ref in op.outputs):
            ops.add(op.index)
            alive.update(ref.id for ref in op.tensors)
    return Reach(frozenset(ops), frozenset(name for name, ref in trace.parameters.items() if ref.id in alive))
