"""Does sharing help where data are few? Eight Omniglot alphabets, each a task, with 1, 2 or 4 drawings of a character.

Claim: with both sides tuned alike, the best way of sharing is at least 1.5 points better than a network per alphabet at
1 and at 2 training drawings, paired over seeds, and the confidence interval excludes 0. The data are no part of prunus:
name the folder with the published archives by --data.

Every arm is the same network of three blocks (convolution, batch norm, ReLU, and max-pooling but for the first, which
has stride 2) and a linear head; what differs is which of these modules all tasks have in common. "union" adds a softmax
over the characters of all alphabets to the loss; in "then apart" all alphabets train one network for the first 70 % of
the steps, and each a copy of it for the rest; the last two arms couple the convolutions of networks that share nothing
(all copies start alike). Every arm tries the same ``CANDIDATES``, each with two kinds of statistics for its batch norms
(those of the distorted drawings in training, or of the drawings as they are), and takes the best by validation drawings
(8 of each character, of another seed than the ones reported). The seeds of the table divide the drawings and start the
network, alike for all arms. Accuracy is on the drawings that are left, mean over alphabets.

Each trained network is two rows, one for each kind of statistics, written as soon as it is there: the same command goes
on where it was interrupted.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.table import Table
from scipy import stats

from benchmarks.common import parser, skipped, wide_console, write_results
from benchmarks.omniglot_networks import ARMS, BATCH_SIZE, STATISTICS, WIDTHS, Recipe, train
from mtl.data import TaskData, omniglot

TUNING_SEEDS = (1000,)
VALIDATION = 8  # drawings of each character to choose a recipe by
CANDIDATES = (  # 400 steps with less distortion lost with single-task and "all + union", at one and at two drawings
    Recipe(sharing=0.3, weight_decay=0.05),
    Recipe(),
    Recipe(steps=1500),
)
Choice = tuple[Recipe, str]  # and one of STATISTICS


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; exit status 0, also where it has nothing to run on, and 2 for bad input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    flags = parser(__file__, "accuracy on Omniglot with few drawings, by way of sharing")
    flags.add_argument("--data", type=Path, help="folder with images_background_small1.zip and ..._small2.zip")
    flags.add_argument("--drawings", type=int, nargs="+", default=[1, 2, 4], help="of each character to train on")
    flags.add_argument("--seeds", type=int, default=5)
    flags.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM")
    config = flags.parse_args(arguments)
    if config.data is None:
        return skipped(f"{Path(__file__).name} needs --data FOLDER with the archives of Omniglot")
    torch.set_num_threads(1)
    try:
        rows = _Rows(config.output, arguments, config)
        for drawings in config.drawings:
            _compare(rows, config, drawings)
    except (ValueError, OSError) as error:
        print(f"{Path(__file__).stem}: {error}", file=sys.stderr)
        return 2
    _print(rows.summary)
    return 0


def _compare(rows: _Rows, config: Any, drawings: int) -> None:
    """Tune every arm and train it on every seed: what is interrupted has rows of whole arms."""
    tuning = {seed: omniglot(config.data, train=drawings, validation=VALIDATION, seed=seed) for seed in TUNING_SEEDS}
    tests = {seed: omniglot(config.data, train=drawings, validation=0, seed=seed) for seed in range(config.seeds)}
    for arm in config.arms:
        for seed, data in tuning.items():
            for recipe in CANDIDATES:
                rows.add(arm, drawings, seed, recipe, data, "validation")
        for seed, data in tests.items():
            rows.add(arm, drawings, seed, rows.best(arm, drawings)[0], data, "test")


def choices() -> list[Choice]:
    """What every arm may be tuned to."""
    return [(recipe, statistics) for recipe in CANDIDATES for statistics in STATISTICS]


class _Rows:
    """Results that are kept in a file: what is there already is not trained again."""

    def __init__(self, path: Path, arguments: Sequence[str], config: Any) -> None:
        self._path, self._arguments, self._config = path, arguments, config
        self._rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []

    def add(self, arm: str, drawings: int, seed: int, recipe: Recipe, data: Mapping[str, TaskData], split: str) -> None:
        key = {"arm": arm, "drawings": drawings, "seed": seed, "split": split, "recipe": asdict(recipe)}
        if any(all(row[name] == value for name, value in key.items()) for row in self._rows):
            return
        start = time.process_time()
        accuracies = train(ARMS[arm], recipe, data, seed, split)
        seconds = round(time.process_time() - start, 1)
        for statistics, accuracy in accuracies.items():
            self._rows.append(key | {"statistics": statistics, "accuracy": accuracy, "cpu_seconds": seconds})
        print(f"{len(self._rows) // len(STATISTICS)} networks:", key, accuracies, file=sys.stderr, flush=True)
        settings = {"widths": WIDTHS, "batch_size": BATCH_SIZE, "tuning_seeds": TUNING_SEEDS, "validation": VALIDATION}
        results = {"settings": settings, "missing": self._missing(), "summary": self.summary, "rows": self._rows}
        write_results(self._path, self._arguments, results, ("scipy",))

    def _missing(self) -> list[str]:
        """What was asked for and is not there yet: an interrupted run says so."""
        found = []
        for drawings in self._config.drawings:
            for arm in self._config.arms:
                if seeds := self._config.seeds - len(self._tested(arm, drawings)):
                    found.append(f"drawings: {drawings}, {arm}: {seeds} of {self._config.seeds} seeds")
        return found

    def best(self, arm: str, drawings: int) -> Choice:
        """The candidate with the best mean over the tuning seeds."""
        return max(choices(), key=lambda choice: mean(self._of(arm, drawings, "validation", choice).values()))

    @property
    def summary(self) -> list[dict[str, Any]]:
        """Mean and deviation in points for each arm, and its paired gain over single-task with a 95 % interval."""
        found = []
        for drawings, arm in sorted({(row["drawings"], row["arm"]) for row in self._rows if row["split"] == "test"}):
            ours, single = (self._tested(name, drawings) for name in (arm, "single-task"))
            if not ours:  # rows of recipes that are candidates no more
                continue
            line = {"drawings": drawings, "arm": arm, "seeds": len(ours), "accuracy": mean(ours.values())}
            line |= {"deviation": stdev(ours.values()) if len(ours) > 1 else None}
            recipe, statistics = self.best(arm, drawings)
            line |= {"recipe": asdict(recipe), "statistics": statistics}
            paired = [ours[seed] - single[seed] for seed in ours if seed in single]
            if arm != "single-task" and len(paired) > 1:
                half = float(stats.t.ppf(0.975, len(paired) - 1)) * stdev(paired) / math.sqrt(len(paired))
                line |= {"gain": mean(paired), "gain_low": mean(paired) - half, "gain_high": mean(paired) + half}
            found.append(line)
        return found

    def _tested(self, arm: str, drawings: int) -> dict[int, float]:
        """Test accuracy by seed, with the recipe that was chosen; empty before one was."""
        if not all(self._of(arm, drawings, "validation", choice) for choice in choices()):
            return {}
        return self._of(arm, drawings, "test", self.best(arm, drawings))

    def _of(self, arm: str, drawings: int, split: str, choice: Choice) -> dict[int, float]:
        """Accuracy by seed."""
        key = {"arm": arm, "drawings": drawings, "split": split, "recipe": asdict(choice[0]), "statistics": choice[1]}
        return {row["seed"]: row["accuracy"] for row in self._rows if all(row[name] == key[name] for name in key)}


def _print(lines: Sequence[Mapping[str, Any]]) -> None:
    table = Table(title="accuracy on Omniglot, %, mean over 8 alphabets", title_justify="left")
    for column in ("drawings", "arm", "seeds", "accuracy", "deviation", "gain over single-task", "95 % interval"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for line in lines:
        numbers = [
            f"{100 * line['accuracy']:.1f}",
            "" if line["deviation"] is None else f"{100 * line['deviation']:.1f}",
        ]
        if "gain" in line:
            low, high = 100 * line["gain_low"], 100 * line["gain_high"]
            numbers += [f"{100 * line['gain']:+.1f}", f"{low:+.1f} to {high:+.1f}"]
        table.add_row(str(line["drawings"]), line["arm"], str(line["seeds"]), *numbers)
    wide_console().print(table)


if __name__ == "__main__":
    sys.exit(main())
