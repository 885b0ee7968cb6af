"""Accuracy against the kept part of each layer, one layer at a time: where a model can be pruned and where it cannot.

Channels are masked in place, not removed, so that a point costs one evaluation and no surgery.
"""

import csv
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from compress.calibration import Calibration
from compress.channels import ChannelGraph, trace
from compress.criteria import Criterion, resolve
from compress.errors import PruneError
from compress.folder import claim, write_file
from compress.loop import digests
from compress.plan import make_plan
from compress.sandbox import untouched, unwrapped
from compress.score import check_needs, collect_evidence, removals_of
from compress.surgery import masked
from compress.tasks import whole
from compress.trace import ExampleInputs

RATIOS = (0.9, 0.7, 0.5, 0.3, 0.1)
RUN, POINTS, TABLE, CURVE, EVENTS = (
    "sensitivity.json",
    "points.jsonl",
    "sensitivity.csv",
    "sensitivity.png",
    "events.out.tfevents.sensitivity",
)


@dataclass(frozen=True)
class SensitivityPoint:
    """``accuracy`` when one ``group`` keeps ``kept`` of its ``total`` channels, those that ``criterion`` ranks highest.

    ``ratio`` is the part that was asked for. The dense model is the point of group and criterion "".
    """

    criterion: str
    group: str
    ratio: float
    kept: int
    total: int
    accuracy: float


def sensitivity(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    evaluate: Callable[[nn.Module], float],
    folder: str | Path,
    criteria: Sequence[str | Criterion] = ("l2",),
    ratios: Sequence[float] = RATIOS,
    calibration: Calibration | None = None,
    loss: Callable[..., Any] | None = None,
    seed: int = 0,
    on_point: Callable[[SensitivityPoint, int], object] | None = None,
) -> tuple[SensitivityPoint, ...]:
    """Evaluate ``model`` with each channel group cut to each of ``ratios`` by each of ``criteria``, the rest whole.

    ``folder`` gets ``points.jsonl`` (a line for each point as it is measured: the same call on the same folder goes on
    from there), and at the end ``sensitivity.csv``, ``sensitivity.png`` and TensorBoard events. The model is as before.

    Args:
        evaluate: accuracy of a model, higher is better; must not depend on chance. Called without gradients.
        ratios: parts to keep, in (0, 1); at least one channel stays.
        calibration: as for :func:`compress.prune`; read once for all criteria.
        on_point: gets each point, those of earlier calls included, and how many there will be.

    Returns:
        The dense model's point, then those of each criterion, group by group.

    Raises:
        PruneError: bad options, or a folder of another run.
        CalibrationError: a criterion needs data, and there are none or they do not fit.
    """
    model, folder = unwrapped(model), Path(folder)
    if not ratios or not all(0 < ratio < 1 for ratio in ratios):
        raise PruneError(f"ratios are {list(ratios)}; give parts to keep above 0 and below 1, such as 0.5")
    named = {_name(criterion): resolve(criterion) for criterion in criteria}
    if len(named) != len(criteria) or not named:
        raise PruneError(f"criteria are {', '.join(map(_name, criteria)) or 'none'}; give each once, and at least one")
    check_needs(list(named.values()), calibration)
    graph = trace(model, example_inputs)
    if not graph.groups:
        raise PruneError("no channel of this model can be removed: prunus inspect says why")
    (evidence,) = collect_evidence(model, graph, list(named.values()), [whole(calibration, loss)], seed)
    scores = {name: removals_of(criterion, evidence)[1] for name, criterion in named.items()}
    description = {**digests(model), "criteria": list(named), "ratios": list(ratios), "seed": seed}
    claim(folder / RUN, description, (POINTS, TABLE, CURVE))
    known = _read(folder / POINTS)
    number = 1 + len(named) * len(graph.groups) * len(ratios)
    points: list[SensitivityPoint] = []
    with (folder / POINTS).open("a", encoding="utf-8") as file:

        def add(criterion: str, group: int | None, ratio: float, plan_units: np.ndarray) -> None:
            name = "" if group is None else _label(graph, group)
            point = known.get((criterion, name, ratio))
            if point is None:
                total = 0 if group is None else graph.groups[group].num_units
                plan = make_plan(graph, {} if group is None else {group: plan_units}, {})
                with torch.no_grad(), untouched(model), masked(model, plan):
                    accuracy = float(evaluate(model.eval()))
                point = SensitivityPoint(criterion, name, ratio, total - len(plan_units), total, accuracy)
                file.write(json.dumps(asdict(point)) + "\n")
                file.flush()
                os.fsync(file.fileno())
            points.append(point)
            if on_point is not None:
                on_point(point, number)

        add("", None, 1.0, np.zeros(0, dtype=np.int64))
        for name in named:
            for group, values in zip(graph.groups, scores[name], strict=True):
                for ratio in ratios:
                    left = max(1, round(ratio * group.num_units))
                    add(name, group.index, ratio, np.argsort(values, kind="stable")[: group.num_units - left])
    write_file(folder / TABLE, lambda partial: _write_table(partial, points))
    write_file(folder / CURVE, lambda partial: _draw(partial, points))
    _write_events(folder, points)
    return tuple(points)


def _name(criterion: str | Criterion) -> str:
    return criterion if isinstance(criterion, str) else str(getattr(criterion, "__name__", type(criterion).__name__))


def _label(graph: ChannelGraph, group: int) -> str:
    """The group's name; with its number where several have that name."""
    name = graph.groups[group].name
    alone = sum(other.name == name for other in graph.groups) == 1
    return name if alone else f"{name}#{group}"


def _read(path: Path) -> Mapping[tuple[str, str, float], SensitivityPoint]:
    """The points of earlier calls. What a killed process wrote by half is cut off, so that lines stay whole."""
    if not path.exists():
        return {}
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        write_file(path, lambda partial: partial.write_text(whole, encoding="utf-8"))
    try:
        points = [SensitivityPoint(**json.loads(line)) for line in whole.splitlines()]
    except (ValueError, TypeError) as error:
        raise PruneError(f"{path} is damaged ({error}); delete it to start over") from error
    return {(point.criterion, point.group, point.ratio): point for point in points}


def _write_table(path: Path, points: Sequence[SensitivityPoint]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(SensitivityPoint)])
        writer.writeheader()
        writer.writerows(asdict(point) for point in points)


def _write_events(folder: Path, points: Sequence[SensitivityPoint]) -> None:
    """TensorBoard: a curve for each criterion and group, over the percentage that is kept."""
    from torch.utils.tensorboard import SummaryWriter

    partial = folder / ".events"
    shutil.rmtree(partial, ignore_errors=True)
    with SummaryWriter(str(partial)) as writer:
        for point in points[1:]:
            writer.add_scalar(f"sensitivity/{point.criterion}/{point.group}", point.accuracy, round(100 * point.ratio))
    (events,) = partial.iterdir()
    os.replace(events, folder / EVENTS)
    partial.rmdir()


def _draw(path: Path, points: Sequence[SensitivityPoint]) -> None:
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    dense, *measured = points
    criteria = list(dict.fromkeys(point.criterion for point in measured))
    groups = list(dict.fromkeys(point.group for point in measured))
    figure = Figure(figsize=(1 + 5 * len(criteria), 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(criteria), sharey=True, squeeze=False)[0]
    for axes, criterion in zip(panels, criteria, strict=True):
        for number, group in enumerate(groups):
            line = sorted((p.ratio, p.accuracy) for p in measured if (p.criterion, p.group) == (criterion, group))
            colour = colormaps["viridis"](number / max(len(groups) - 1, 1))
            axes.plot(
                [100 * ratio for ratio, _ in line] + [100], [a for _, a in line] + [dense.accuracy],
                marker=".", linewidth=1, color=colour, label=group,
            )  # fmt: skip
        axes.set_title(criterion)
        axes.set_xlabel("channels kept of one group (%)")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy")
    few = groups if len(groups) <= 12 else [groups[0], groups[-1]]  # first and last layer: the colours run between
    handles = [line for line in panels[-1].get_lines() if line.get_label() in few]
    panels[-1].legend(handles=handles, fontsize="x-small", loc="lower right")
    figure.savefig(path)
