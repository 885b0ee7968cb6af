"""Does sharing help? The same tasks trained apart and together, side by side, over several seeds."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from scipy import stats
from torch import nn

from mtl.evaluation import evaluate
from mtl.metrics import delta_m
from mtl.options import FitOptions
from mtl.seeding import preserved_rng
from mtl.sharing import Coupling, HardShared, L2Coupling, SoftShared, TraceNorm
from mtl.sharing.private import Pattern, patterns_after
from mtl.task import Direction, Task, check_tasks
from mtl.trainer import fit
from mtl.weighting import Weighting, resolve

_STRENGTH = 1e-3
_TOGETHER = 0.7
_COUPLINGS: dict[str, Callable[[float], Coupling]] = {"l2": L2Coupling, "trace_norm": TraceNorm}
_COLUMNS = 8  # more tasks than that are not columns
_ARROWS = {"max": "↑", "min": "↓"}


@dataclass(frozen=True)
class Method:
    """One way to train tasks.

    Args:
        name: its row in the table
        build: makes a fresh model for the tasks given; it is called after the seed is set
        apart: whether each task is trained alone, with a model of its own: ``build`` then gets one task at a time
        weighting: as in ``mtl.fit``
        options: instead of those of all methods
        then: makes of the trained model the one that is trained for the rest of the epochs; None: there is no rest
        part: of the epochs that are before that, in [0, 1]
    """

    name: str
    build: Callable[[Sequence[Task]], nn.Module]
    apart: bool = False
    weighting: str | Mapping[str, float] | Weighting = "equal"
    options: FitOptions | None = None
    then: Callable[[nn.Module], nn.Module] | None = None
    part: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.part <= 1:
            raise ValueError(f"method {self.name!r}: part is {self.part}, but it must be in [0, 1]")


@dataclass(frozen=True)
class Comparison:
    """What came out.

    Args:
        metrics: by method and task, one number per seed
        directions: "max" or "min" by task
        reference: the method that the others are compared with
        seeds: in the order of the metrics
        parameters: by method, numbers in all its models together
    """

    metrics: Mapping[str, Mapping[str, Sequence[float]]]
    directions: Mapping[str, Direction]
    reference: str
    seeds: Sequence[int]
    parameters: Mapping[str, int] = field(default_factory=dict)

    def delta_m(self, method: str) -> list[float]:
        """Relative gain over the reference in percent, for each seed: see ``mtl.delta_m``. A task whose reference is 0
        does not count for that seed; NaN where none does."""
        gains = []
        for index in range(len(self.seeds)):
            there = {task: values[index] for task, values in self.metrics[self.reference].items() if values[index]}
            here = {task: values[index] for task, values in self.metrics[method].items()}
            gains.append(delta_m(here, there, self.directions) if there else math.nan)
        return gains

    def interval(self, method: str) -> tuple[float, float] | None:
        """Where the expected delta m lies with 95 % confidence, by Student's t: the differences are paired, seed by
        seed, so what a seed does to both methods drops out. None with fewer than two seeds, or where one is NaN."""
        gains = self.delta_m(method)
        if len(gains) < 2 or not all(map(math.isfinite, gains)):
            return None
        half = float(stats.t.ppf(0.975, len(gains) - 1)) * stdev(gains) / math.sqrt(len(gains))
        return mean(gains) - half, mean(gains) + half

    def better(self, method: str) -> int:
        """How many tasks are better than with the reference, on average over the seeds."""
        signs = {task: 1 if direction == "max" else -1 for task, direction in self.directions.items()}
        here, there = self.metrics[method], self.metrics[self.reference]
        return sum(sign * (mean(here[task]) - mean(there[task])) > 0 for task, sign in signs.items())

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers."""
        return {
            "metrics": {name: {task: list(found) for task, found in row.items()} for name, row in self.metrics.items()},
            "delta_m": {name: self.delta_m(name) for name in self.metrics},
            "interval": {name: self.interval(name) for name in self.metrics if name != self.reference},
            "directions": dict(self.directions),
            "reference": self.reference,
            "seeds": list(self.seeds),
            "parameters": dict(self.parameters),
        }

    def __str__(self) -> str:
        """A row per method: parameters, mean and deviation over the seeds of each task's metric (of the mean over tasks
        where there are many of one kind) and of delta m, its interval, and how many tasks are better."""
        many = len(self.directions) > _COLUMNS
        columns: Mapping[str, Direction] = self.directions
        if many:
            one = len(set(self.directions.values())) == 1
            columns = {f"mean of {len(self.directions)} tasks": next(iter(self.directions.values()))} if one else {}
        table = Table(title=f"mean ± deviation over {len(self.seeds)} seeds; delta m against {self.reference!r}")
        table.add_column("method")
        if self.parameters:
            table.add_column("parameters", justify="right")
        for column, direction in columns.items():
            table.add_column(f"{column} {_ARROWS[direction]}", justify="right")
        for column in ("delta m, %", "95 % interval", "tasks better"):
            table.add_column(column, justify="right")
        for name, row in self.metrics.items():
            shown = [[mean(found) for found in zip(*row.values(), strict=True)]] if many else list(row.values())
            cells = [_spread(values, "{:.4g}") for values in shown[: len(columns)]]
            size = [f"{self.parameters[name]:,}"] if self.parameters else []
            table.add_row(name, *size, *cells, *([] if name == self.reference else self._gain(name)))
        if len(self.seeds) < 2:
            table.caption = "one seed: what differs may be chance; give several"
        return _text(table, len(columns) + 3)

    def by_task(self) -> str:
        """A row per task and a column per method: mean and deviation of the metric over the seeds."""
        table = Table(title=f"mean ± deviation over {len(self.seeds)} seeds")
        table.add_column("task")
        for name in self.metrics:
            table.add_column(name, justify="right")
        for task, direction in self.directions.items():
            cells = [_spread(row[task], "{:.4g}") for row in self.metrics.values()]
            table.add_row(f"{task} {_ARROWS[direction]}", *cells)
        return _text(table, len(self.metrics))

    def _gain(self, method: str) -> list[str]:
        interval = self.interval(method)
        shown = "" if interval is None else f"{interval[0]:+.2f} to {interval[1]:+.2f}"
        return [
            _spread(self.delta_m(method), "{:+.2f}"),
            shown,
            f"{self.better(method)} of {len(self.directions)}",
        ]


def compare(
    tasks: Task | Sequence[Task],
    data: Any,
    methods: str | Method | Sequence[str | Method],
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
    """Train every method with every seed on the same data, and evaluate each on the test data: does sharing help?

    Give the methods the same care: options that were tuned for one favour it. ``print`` shows the gain over the
    reference with an interval: where it excludes 0, and there are several seeds, it is no chance of the seeds.

    Args:
        tasks: one or more
        data: as in ``mtl.fit``: one data set with all labels, or one per task
        methods: ``Method``, or names that build their models from ``trunk`` and ``head``: "single" (a model per task,
            trained alone), "hard" (one trunk), "hard:WEIGHTING", "private norms" (one trunk with batch norms of each
            task's own), "first layers" (one trunk of which the first half of the layers is shared; "first layers:2":
            the first two convolutions or the like, with their norms), "hard then apart" (one trunk for 70 % of the
            epochs, then a copy of it for each task; "hard then apart:0.5": for half), "soft:l2" and "soft:trace_norm"
            (a model per task, coupled at strength 1e-3; "soft:l2:0.1": at 0.1)
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
    several = [methods] if isinstance(methods, str | Method) else methods
    chosen = [standard_method(name, trunk, head) if isinstance(name, str) else name for name in several]
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
    sizes = {name: {task.name: 0 for task in tasks} for name in names}
    for seed in numbers:
        for method in chosen:
            own = replace(method.options or options, seed=seed)
            for group in [[task] for task in tasks] if method.apart else [list(tasks)]:
                parts = [_part(each, group) for each in (data, validation, test)]
                place = None
                if folder is not None:
                    place = Path(folder) / method.name.replace(":", "-").replace(" ", "-") / f"seed-{seed}"
                    place = place / group[0].name if method.apart else place
                found, sizes[method.name][group[0].name] = _run(method, group, parts, epochs, own, place)
                for name, value in found.items():
                    metrics[method.name][name].append(value)
    known = {name: direction for name, direction in directions.items() if direction}
    parameters = {name: sum(by_task.values()) for name, by_task in sizes.items()}
    return Comparison(metrics, known, reference, numbers, parameters)


def _run(
    method: Method, tasks: Sequence[Task], parts: Sequence[Any], epochs: int, options: FitOptions, folder: Path | None
) -> tuple[dict[str, float], int]:
    """Test metrics by task, and the number of parameters."""
    data, validation, test = parts
    with preserved_rng():
        torch.manual_seed(options.seed)
        model = method.build(tasks)
        train = partial(fit, weighting=method.weighting, validation=validation, options=options)
        if method.then is None:
            train(model, tasks, data, epochs, folder=folder)
        else:
            first = round(method.part * epochs)
            train(model, tasks, data, first, folder=folder and folder / "first")
            model = method.then(model)
            train(model, tasks, data, epochs - first, folder=folder and folder / "then")
        return evaluate(model, tasks, test), sum(parameter.numel() for parameter in model.parameters())


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

    def hard(tasks: Sequence[Task], private: Callable[[nn.Module], Sequence[Pattern]] = lambda _: ()) -> nn.Module:
        made = trunk()
        return HardShared(made, {task.name: head(task) for task in tasks}, private=private(made))

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
            return Method(name, partial(hard, private=lambda _: (nn.modules.batchnorm._BatchNorm,)))
        case ["first layers", *number] if len(number) <= 1 and all(each.isdecimal() for each in number):
            private = partial(patterns_after, num_layers=int(number[0]) if number else None)
            with preserved_rng():
                private(trunk())  # a depth that the trunk has not is said before anything is trained
            return Method(name, partial(hard, private=private))
        case ["hard then apart", *part] if len(part) <= 1:
            return Method(name, hard, then=_apart, part=float(part[0]) if part else _TOGETHER)
        case ["soft", kind, *strength] if kind in _COUPLINGS and len(strength) <= 1:
            coupling = _COUPLINGS[kind](float(strength[0]) if strength else _STRENGTH)
            return Method(name, partial(soft, coupling=coupling))
    raise ValueError(
        f"unknown method {name!r}: use single, hard, hard:WEIGHTING, private norms, first layers, first layers:NUMBER, "
        "hard then apart, hard then apart:PART, soft:l2, soft:trace_norm, or a mtl.Method"
    )


def _apart(model: nn.Module) -> nn.Module:
    """A trunk of its own for each task, which starts as the one of all."""
    assert isinstance(model, HardShared)
    assert model.trunk is not None
    return HardShared(model.trunk, dict(model.heads.items()), private=("*",))


def _text(table: Table, columns: int) -> str:
    text = io.StringIO()
    Console(file=text, width=60 + 24 * columns).print(table)
    return text.getvalue().rstrip()


def _spread(values: Sequence[float], form: str) -> str:
    if len(values) < 2:
        return form.format(values[0])
    return f"{form.format(mean(values))} ± {stdev(values):.2g}"
