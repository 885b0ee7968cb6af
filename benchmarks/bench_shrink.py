"""Pruning, factorising, and both under one budget, where nothing is trained: accuracy against MACs and milliseconds.

From a few unlabelled images: `compress.shrink` beside `compress.prune` and `compress.factorize` alone. MACs are not
milliseconds: the latency of each model is measured beside the dense one's. Neither the checkpoints nor the images are
part of prunus: name them by flags. Each row is written as soon as it is there, with the commit that it is of: the same
command goes on where it was interrupted, and with more ``--seeds`` or fractions adds to what is there.

Labels are used for nothing but the accuracy on the test images. Beside the JSON file go the same rows as CSV, and the
curves as PNG.
"""

import csv
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from torch import nn

import compress
from benchmarks.bench_no_training import accuracy_on_test, calibration_images, print_rows
from benchmarks.common import checkpoint_parser, current_commit, parse_checkpoint, skipped, trained_model, write_results
from compress.cost import relative_latency
from compress.folder import write_file
from mtl.data import ImageData
from scripts.sources import open_data

TIMED_IMAGES = 32
COLUMNS = ("model", "method", "budget", "calibration", "macs_kept", "accuracy", "latency", "seconds", "cpu_seconds")
METHODS: Mapping[str, Callable[..., Any]] = {
    "prune": lambda *args, **options: compress.prune(*args, criterion="reconstruction", recover=True, **options),
    "factorize": compress.factorize,
    "shrink": compress.shrink,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; exit status 0, also where it has nothing to run on, and 2 for bad input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    flags = checkpoint_parser(__file__, "accuracy of checkpoints that were made smaller without any training")
    flags.add_argument("--methods", nargs="+", default=[*METHODS], choices=[*METHODS], help="to compare")
    flags.add_argument("--seeds", type=int, nargs="+", default=[0], help="one draw of calibration images each")
    flags.add_argument("--metric", default="macs", choices=["macs", "latency"], help="what the budget is of")
    config = flags.parse_args(arguments)
    if not config.checkpoint or config.data is None:
        return skipped(f"{Path(__file__).name} needs --checkpoint layers:resnet20_cifar=FILE@0.5 and --data ...")
    try:
        data = open_data(config.data, mean=config.mean, std=config.std, image_size=None, validation=0.0)
        settings = {name: getattr(config, name) for name in ("images", "batch_size", "metric")}
        rows = _known(config.output, settings)
        for text in config.checkpoint:
            for row in _rows(text, data, config, [*rows]):
                rows.append(row)
                write_results(config.output, arguments, {"settings": settings, "rows": rows})
    except (ValueError, OSError) as error:
        print(f"{Path(__file__).stem}: {error}", file=sys.stderr)
        return 2
    print_rows("made smaller without training", rows)
    write_file(config.output.with_suffix(".csv"), lambda path: _write_table(path, rows))
    write_file(config.output.with_suffix(".png"), lambda path: _draw(path, rows))
    return 0


def _known(path: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a file that was written before, with these settings."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}
    if found["rows"] and found["settings"] != settings:
        raise ValueError(f"--output {path} has rows with {found['settings']}, not {settings}: choose another file")
    rows: list[dict[str, Any]] = found["rows"]
    return rows


def _rows(text: str, data: ImageData, config: Any, known: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """One row a draw of images, fraction and method, after that of the dense model; those not ``known`` yet."""
    source, file, fractions = parse_checkpoint(text)
    model = trained_model(source, file, data.num_classes)
    if not any(row["model"] == source for row in known):
        dense = {"macs_kept": 1.0, "accuracy": accuracy_on_test(model, data), "latency": 1.0}
        yield {"model": source, "method": "dense", **dense, "seconds": 0.0, "cpu_seconds": 0.0}
    for seed in config.seeds:
        config.seed = seed
        batches = calibration_images(data, config)
        for fraction in fractions:
            for name in config.methods:
                row = {"model": source, "method": name, "budget": fraction, "calibration": seed}
                if any(row.items() <= there.items() for there in known):
                    continue
                row |= {"commit": current_commit()}
                try:
                    row |= _row(METHODS[name], model, {config.metric: fraction}, batches, seed, data)
                except compress.BudgetError as error:
                    row |= {"failed": str(error).splitlines()[0]}
                print(row, file=sys.stderr, flush=True)
                yield row


def _row(
    method: Callable[..., Any], model: nn.Module, budget: Mapping[str, float], batches: Sequence[Any], seed: int,
    data: ImageData,
) -> dict[str, Any]:  # fmt: skip
    example = batches[0][: TIMED_IMAGES if "latency" in budget else 1]
    wall, cpu = time.perf_counter(), time.process_time()
    result = method(model, example, budget=compress.Budget(**budget), calibration=batches, seed=seed)
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "macs_kept": result.after.macs / result.before.macs,
        "accuracy": accuracy_on_test(result.model, data),
        "latency": relative_latency(result.model, model, batches[0][:TIMED_IMAGES]),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
    }


def _write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)


def _draw(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Accuracy against MACs on the left, against latency on the right; one row of axes a model."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(9, 3.5 * len(models)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, model in zip(figure.subplots(len(models), 2, squeeze=False), models, strict=True):
        done = [row for row in rows if row["model"] == model and "accuracy" in row]
        for axis, column, label in zip(axes, ("macs_kept", "latency"), ("MACs", "seconds"), strict=True):
            for name in METHODS:
                if points := _means([row for row in done if row["method"] == name], column):
                    axis.plot(*zip(*points, strict=True), marker="o", label=name)
            axis.axhline(100 * done[0]["accuracy"], color="black", linewidth=0.8, label="dense")
            axis.set(xlabel=f"{label}, part of the dense model's", ylabel="accuracy on all test images, %", title=model)
            axis.legend()
    figure.savefig(path, format="png", dpi=120)


def _means(rows: Sequence[Mapping[str, Any]], column: str) -> list[tuple[float, float]]:
    """By budget, over draws: of a column, and of accuracy in percent."""
    budgets = {row["budget"]: [other for other in rows if other["budget"] == row["budget"]] for row in rows}
    return sorted(
        (mean(r[column] for r in alike), 100 * mean(r["accuracy"] for r in alike)) for alike in budgets.values()
    )


if __name__ == "__main__":
    sys.exit(main())
