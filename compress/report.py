"""What a run leaves for people: history as JSON and CSV, the curve of accuracy against size, and TensorBoard events."""

import csv
import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np

from compress.folder import write_file

HISTORY, TABLE, CURVE = "history.json", "history.csv", "curve.png"
EVENTS = "events.out.tfevents.{round:06d}"  # "tfevents" is how TensorBoard recognises it; names sort by round


@dataclasses.dataclass(frozen=True)
class RoundRecord:
    """What was measured at the end of a round; round 0 is the dense model.

    ``accuracy`` is what ``evaluate`` returned (the mean of it where there are several ``metrics``). ``macs`` counts one
    run of the example inputs. ``target`` is the fraction of the dense cost that the schedule allows in this round, and
    ``kept`` tells for each layer how many of its output channels are left, and of how many. ``test`` is the accuracy on
    data that decide nothing, None where nobody asked for it.
    """

    round: int
    accuracy: float
    params: int
    macs: int
    bytes: int
    latency_seconds: float
    target: float
    metrics: Mapping[str, float]
    kept: Mapping[str, tuple[int, int]]
    test: float | None = None

    def to_json(self) -> str:
        """The record as JSON; :meth:`from_json` gives an equal one back."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The record that :meth:`to_json` wrote."""
        values = json.loads(text)
        values["kept"] = {layer: (left, total) for layer, (left, total) in values["kept"].items()}
        return cls(**values)


def several(record: RoundRecord) -> Mapping[str, float]:
    """The metrics by name where there are several, tasks' say: one is the accuracy itself."""
    return record.metrics if len(record.metrics) > 1 else {}


def write_history(folder: Path, records: Sequence[RoundRecord]) -> None:
    """Writes ``history.json``, ``history.csv`` and ``curve.png`` of the rounds so far, each replaced in one step."""
    rounds = [dataclasses.asdict(record) for record in records]
    text = json.dumps({"rounds": rounds}, indent=1)
    write_file(folder / HISTORY, lambda partial: partial.write_text(text, encoding="utf-8"))
    write_file(folder / TABLE, lambda partial: _write_table(partial, records))
    write_file(folder / CURVE, lambda partial: _draw_curve(partial, records))


def write_events(folder: Path, record: RoundRecord, scores: Mapping[str, np.ndarray]) -> None:
    """Writes the round's TensorBoard events into a file of its own, unless it is there.

    One complete file a round, moved into place, is what keeps a run that was killed and resumed free of doubles.
    ``scores`` are the scores of each group's units, before the round's pruning.
    """
    path = folder / EVENTS.format(round=record.round)
    if path.exists():
        return
    from torch.utils.tensorboard import SummaryWriter

    partial = folder / ".events"
    shutil.rmtree(partial, ignore_errors=True)
    with SummaryWriter(str(partial)) as writer:
        for name in ("accuracy", "params", "macs", "latency_seconds"):
            writer.add_scalar(name, getattr(record, name), record.round)
        if record.test is not None:
            writer.add_scalar("test", record.test, record.round)
        for name, value in several(record).items():
            writer.add_scalar(f"metrics/{name}", value, record.round)
        for layer, (left, total) in record.kept.items():
            writer.add_scalar(f"kept/{layer}", left / total, record.round)
        for group, values in scores.items():
            finite = values[np.isfinite(values)]
            if finite.size:
                writer.add_histogram(f"scores/{group}", finite, record.round)
    (events,) = partial.iterdir()
    os.replace(events, path)
    partial.rmdir()


def _write_table(path: Path, records: Sequence[RoundRecord]) -> None:
    columns = ("round", "accuracy", "test", "params", "macs", "bytes", "latency_seconds", "target")
    tasks = [{f"accuracy/{name}": value for name, value in several(record).items()} for record in records]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, (*columns, *tasks[0]), extrasaction="ignore")
        writer.writeheader()
        writer.writerows({**dataclasses.asdict(record), **own} for record, own in zip(records, tasks, strict=True))


def _draw_curve(path: Path, records: Sequence[RoundRecord]) -> None:
    # The object interface on the Agg canvas: no display is needed and the caller's pyplot state stays as it is.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    sizes = {"MACs": [record.macs for record in records], "parameters": [record.params for record in records]}
    accuracy = [record.accuracy for record in records]
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (name, size) in zip(panels, sizes.items(), strict=True):
        percent = [100 * value / max(size[0], 1) for value in size]
        axes.plot(percent, accuracy, marker="o", color="tab:blue")
        for task in several(records[0]):
            own = [record.metrics[task] for record in records]
            axes.plot(percent, own, marker=".", linewidth=1, alpha=0.6, label=task)
        if (test := [record.test for record in records])[0] is not None:
            axes.plot(percent, test, marker="x", color="tab:orange", label="test, decides nothing")
        axes.axhline(accuracy[0], color="tab:gray", linestyle="--", linewidth=1, label="dense")
        for record, x in zip(records, percent, strict=True):
            axes.annotate(
                f"{record.round}", (x, record.accuracy), textcoords="offset points", xytext=(0, 7), ha="center"
            )
        axes.set_xlim(0, 106)
        axes.margins(y=0.12)
        axes.set_xlabel(f"{name} kept (% of {size[0]:,})")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy")
    panels[0].legend(loc="lower right", fontsize="small", ncols=1 + len(records[0].metrics) // 8)
    figure.suptitle("Accuracy against size; each point is a round of pruning and training")
    figure.savefig(path)
