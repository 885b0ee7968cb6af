"""Does sharing help? The same tasks trained apart and together, side by side, over several seeds."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from mtl.evaluation import evaluate
from mtl.metrics import delta_m
from mtl.options import FitOptions
from mtl.seeding import preserved_rng
from mtl.sharing import Coupling, HardShared, L2Coupling, SoftShared, TraceNorm
from mtl.task import Direction, Task, check_tasks
from mtl.trainer import fit
from mtl.weighting import Weighting, resolve

_STRENGTH = 1e-3
_COUPLINGS: dict[str, Callable[[float], Coupling]] = {"l2": L2Coupling, "trace_norm": TraceNorm}
_COLUMNS = 8  # more tasks than that are not shown one by one


@dataclass(frozen=True)
class Method:
    """One way to train tasks.

    Args:
        name: its row in the table
        build: makes a fresh model for the tasks given; it is called after the seed is set
        apart: whether each task is trained alone, with a model of its own: ``build`` then gets one task at a time
        weighting: as in ``mtl.fit``
        options: instead of those of all methods
    """

    name: str
    build: Callable[[Sequence[Task]], nn.Module]
    apart: bool = False
    weighting: str | Mapping[str, float] | Weighting = "equal"
    options: FitOptions | None = None


@dataclass(frozen=True)
class Comparison:
    """What came out.

    Args:
        metrics: by method and task, one number per seed
        directions: "max" or "min" by task
        reference: the method that the others are compared with
        seeds: in the order of the metrics
    """

    metrics: Mapping[str, Mapping[str, Sequence[float]]]
    directions: Mapping[str, Direction]
    reference: str
    seeds: Sequence[int]

    def delta_m(self, method: str) -> list[float]:
        """Relative gain over the reference in percent, for each seed: see ``mtl.delta_m``. A task whose reference is 0
        does not count for that seed; NaN where none does."""
        gains = []
        for index in range(len(self.seeds)):
            there = {task: values[index] for task, values in self.metrics[self.reference].items() if values[index]}
            here = {task: values[index] for task, values in self.metrics[method].items()}
            gains.append(delta_m(here, there, self.directions) if there else math.nan)
        return gains

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers."""
        return {
            "metrics": {name: {task: list(found) for task, found in row.items()} for name, row in self.metrics.items()},
            "delta_m": {name: self.delta_m(name) for name in self.metrics},
            "directions": dict(self.directions),
            "reference": self.reference,
            "seeds": list(self.seeds),
        }

    def __str__(self) -> str:
        """A row per method: mean and deviation over the seeds of each task's metric (of the mean over tasks where there
        are many of one kind) and of delta m."""
        many = len(self.directions) > _COLUMNS
        columns: Mapping[str, Direction] = self.directions
        if many:
            one = len(set(self.directions.values())) == 1
            columns = {f"mean of {len(self.directions)} tasks": next(iter(self.directions.values()))} if one else {}
        table = Table(title=f"mean ± deviation over {len(self.seeds)} seeds; delta m against {self.reference!r}")
        table.add_column("method")
        arrows = {"max": "↑", "min": "↓"}
        for column, direction in columns.items():
            table.add_column(f"{column} {arrows[direction]}", justify="right")
        table.add_column("delta m, %", justify="right")
        for name, row in self.metrics.items():
            shown = [[mean(found) for found in zip(*row.values(), strict=True)]] if many else list(row.values())
            cells = [_spread(values, "{:.4g}") for values in shown[: len(columns)]]
            gain = "" if name == self.reference else _spread(self.delta_m(name), "{:+.2f}")
            table.add_row(name, *cells, gain)
        text = io.StringIO()
        Console(file=text, width=40 + 24 * (len(columns) + 1)).print(table)
        return text.getvalue().rstrip()


def compare(
    tasks: Task | Sequence[Task],
    data: Any,
    methods: Sequence[str | Method],
    *,
    test: Any,
    trunk: Callable[[], nn.Module] | None = None,
    head: Callable[[Task], nn.Module] | None = None,
    validation: Any = None,
    seeds: int | Sequence[int] = 3,
    epochs: int = 10,
    options: FitOptions | None = None,
    folder: str | os.PathLike[str] | None = None,
    reference: str | None = None,
) -> Comparison:
    """Train every method with every seed on the same data, and evaluate each on the test data.

    Args:
        tasks: one or more
        data: as in ``mtl.fit``: one data set with all labels, or one per task
        methods: ``Method``, or names that build their models from ``trunk`` and ``head``: "single" (a model per task,
            trained alone), "hard" (one trunk), "hard:WEIGHTING", "private norms" (one trunk with batch norms of each
            task's own), "soft:l2" and "soft:trace_norm" (a model per task, coupled at strength 1e-3; "soft:l2:0.1": at
            0.1)
        test: to report on; in the form of the data
        trunk: makes a trunk
        head: makes the head of a task, which reads the trunk's output
        validation: in the same form, where the options ask for it
        seeds: how many, from 0, or which
        epochs: of each run
        options: of each run, but for the seed
        folder: of all runs: those that are complete are not repeated
        reference: name of the method to compare with; default: the first that trains tasks apart, else the first

    Raises:
        ValueError: for no or unknown methods or seeds, two methods of one name, and what ``mtl.fit`` refuses.
    """
    tasks, options = check_tasks(tasks), options or FitOptions()
    chosen = [standard_method(name, trunk, head) if isinstance(name, str) else name for name in methods]
    names = [method.name for method in chosen]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"methods are {names}: give at least one, each with a name of its own")
    if reference is None:
        reference = next((method.name for method in chosen if method.apart), names[0])
    if reference not in names:
        raise ValueError(f"reference is {reference!r}, but the methods are {names}")
    directions = {task.name: task.direction for task in tasks}
    if undirected := [name for name, direction in directions.items() if direction is None]:
        raise ValueError(f"task {undirected[0]!r}: its metric does not say whether more is better: give direction=")
    numbers = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not numbers:
        raise ValueError("there is no seed: give at least one")
    metrics: dict[str, dict[str, list[float]]] = {name: {task.name: [] for task in tasks} for name in names}
    for seed in numbers:
        for method in chosen:
            own = replace(method.options or options, seed=seed)
            for group in [[task] for task in tasks] if method.apart else [list(tasks)]:
                parts = [_part(each, group) for each in (data, validation, test)]
                place = None
                if folder is not None:
                    place = Path(folder) / method.name.replace(":", "-").replace(" ", "-") / f"seed-{seed}"
                    place = place / group[0].name if method.apart else place
                for name, value in _run(method, group, parts, epochs, own, place).items():
                    metrics[method.name][name].append(value)
    return Comparison(metrics, {name: found for name, found in directions.items() if found}, reference, numbers)


def _run(
    method: Method, tasks: Sequence[Task], parts: Sequence[Any], epochs: int, options: FitOptions, folder: Path | None
) -> dict[str, float]:
    data, validation, test = parts
    with preserved_rng():
        torch.manual_seed(options.seed)
        model = method.build(tasks)
        fit(
            model,
            tasks,
            data,
            epochs,
            weighting=method.weighting,
            validation=validation,
            folder=folder,
            options=options,
        )
        return evaluate(model, tasks, test)


def _part(data: Any, tasks: Sequence[Task]) -> Any:
    """The data of some tasks; one data set with all labels serves any of them."""
    if not isinstance(data, Mapping):
        return data
    return {task.name: data[task.name] for task in tasks if task.name in data}


def standard_method(
    name: str, trunk: Callable[[], nn.Module] | None, head: Callable[[Task], nn.Module] | None
) -> Method:
    """The method that a name means, see ``compare``.

    Raises:
        ValueError: for an unknown name, or without trunk or head.
    """
    if trunk is None or head is None:
        raise ValueError(f"method {name!r} builds its models from trunk= and head=: give both, or a mtl.Method")

    def hard(tasks: Sequence[Task], **sharing: Any) -> nn.Module:
        return HardShared(trunk(), {task.name: head(task) for task in tasks}, **sharing)

    def soft(tasks: Sequence[Task], coupling: Any) -> nn.Module:
        return SoftShared(lambda task: nn.Sequential(trunk(), head(task)), tasks, coupling)

    match name.split(":"):
        case ["single"]:
            return Method(name, hard, apart=True)
        case ["hard", *weighting] if len(weighting) <= 1:
            chosen = weighting[0] if weighting else "equal"
            resolve(chosen, [])  # an unknown name is said before anything is trained
            return Method(name, hard, weighting=chosen)
        case ["private norms"]:
            return Method(name, partial(hard, private=(nn.modules.batchnorm._BatchNorm,)))
        case ["soft", kind, *strength] if kind in _COUPLINGS and len(strength) <= 1:
            coupling = _COUPLINGS[kind](float(strength[0]) if strength else _STRENGTH)
            return Method(name, partial(soft, coupling=coupling))
    raise ValueError(
        f"unknown method {name!r}: use single, hard, hard:WEIGHTING, private norms, soft:l2, soft:trace_norm, or a "
        "mtl.Method"
    )


def _spread(values: Sequence[float], form: str) -> str:
    if len(values) < 2:
        return form.format(values[0])
    return f"{form.format(mean(values))} ± {stdev(values):.2g}"
