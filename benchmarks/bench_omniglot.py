"""Does sharing help where data are few? Eight Omniglot alphabets, each a task, with 1, 2 or 4 drawings of a character.

Claim: with both sides tuned alike, the best way of sharing is at least 1.5 points better than a network per alphabet at
1 and at 2 training drawings, paired over seeds, and the confidence interval excludes 0. The data are no part of prunus:
name the folder with the published archives by --data.

Every arm is the same network of three blocks (convolution, batch norm, ReLU, max-pooling) and a linear head; what
differs is which of these modules all tasks have in common. "union" adds a softmax over the characters of all alphabets
to the loss. Every arm tries the same ``CANDIDATES`` and takes the best by its validation drawings (3 of each character,
other seeds than the ones reported); the seeds of the table divide the drawings and start the network, alike for all
arms. Accuracy is on the drawings that are left, mean over alphabets.

Each trained network is one row, written as soon as it is there: the same command goes on where it was interrupted.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from scipy import stats
from torch import Tensor, nn

from benchmarks.common import parser, skipped, wide_console, write_results
from mtl.data import TaskData, num_outputs, omniglot

WIDTHS = (16, 32, 64)
BATCH_SIZE = 16  # drawings of each alphabet in a step
TUNING_SEEDS = (1000,)
CONVOLUTIONS, NORMS = {"conv1", "conv2", "conv3"}, {"norm1", "norm2", "norm3"}


@dataclass(frozen=True)
class Arm:
    """A way of sharing: names of the shared modules, and the factor of the union softmax in the loss."""

    shared: frozenset[str] = frozenset()
    union: float = 0.0


ARMS = {
    "single-task": Arm(),
    "all": Arm(frozenset(CONVOLUTIONS | NORMS)),
    "convolutions": Arm(frozenset(CONVOLUTIONS)),  # batch norms are private
    "first two": Arm(frozenset({"conv1", "norm1", "conv2", "norm2"})),
    "convolutions + union": Arm(frozenset(CONVOLUTIONS), union=1.0),
    "all + union": Arm(frozenset(CONVOLUTIONS | NORMS), union=1.0),
}


@dataclass(frozen=True)
class Recipe:
    """How an arm is trained; ``augmentation`` scales shift, rotation, zoom and shear alike."""

    steps: int = 300
    lr: float = 3e-3
    weight_decay: float = 0.05
    augmentation: float = 1.0


CANDIDATES = (
    Recipe(),
    Recipe(augmentation=0.6),
    Recipe(augmentation=1.5),
    Recipe(weight_decay=0.5),
    Recipe(lr=1e-2),
    Recipe(steps=600, augmentation=1.5),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; exit status 0, also where it has nothing to run on, and 2 for bad input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    flags = parser(__file__, "accuracy on Omniglot with few drawings, by way of sharing")
    flags.add_argument("--data", type=Path, help="folder with images_background_small1.zip and ..._small2.zip")
    flags.add_argument("--drawings", type=int, nargs="+", default=[2, 1, 4], help="of each character to train on")
    flags.add_argument("--seeds", type=int, default=5)
    flags.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM")
    config = flags.parse_args(arguments)
    if config.data is None:
        return skipped(f"{Path(__file__).name} needs --data FOLDER with the archives of Omniglot")
    torch.set_num_threads(1)
    try:
        rows = _Rows(config.output, arguments)
        for drawings in config.drawings:
            _compare(rows, config, drawings)
    except (ValueError, OSError) as error:
        print(f"{Path(__file__).stem}: {error}", file=sys.stderr)
        return 2
    _print(rows.summary)
    return 0


def _compare(rows: _Rows, config: Any, drawings: int) -> None:
    """Tune every arm, then train every arm on every seed, arms in turn."""
    for seed in TUNING_SEEDS:
        data = omniglot(config.data, train=drawings, seed=seed)
        for recipe in CANDIDATES:
            for arm in config.arms:
                rows.add(arm, drawings, seed, recipe, data, "validation")
    for seed in range(config.seeds):
        data = omniglot(config.data, train=drawings, seed=seed)
        for arm in config.arms:
            rows.add(arm, drawings, seed, rows.best(arm, drawings), data, "test")


class _Rows:
    """Results that are kept in a file: what is there already is not trained again."""

    def __init__(self, path: Path, arguments: Sequence[str]) -> None:
        self._path, self._arguments = path, arguments
        self._rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []

    def add(self, arm: str, drawings: int, seed: int, recipe: Recipe, data: Mapping[str, TaskData], split: str) -> None:
        key = {"arm": arm, "drawings": drawings, "seed": seed, "split": split, "recipe": asdict(recipe)}
        if any(all(row[name] == value for name, value in key.items()) for row in self._rows):
            return
        start = time.process_time()
        accuracy = train(ARMS[arm], recipe, data, seed, split)
        row = key | {"accuracy": accuracy, "cpu_seconds": round(time.process_time() - start, 1)}
        print(row, file=sys.stderr, flush=True)
        self._rows.append(row)
        settings = {"widths": WIDTHS, "batch_size": BATCH_SIZE, "tuning_seeds": TUNING_SEEDS}
        write_results(self._path, self._arguments, {"settings": settings, "summary": self.summary, "rows": self._rows})

    def best(self, arm: str, drawings: int) -> Recipe:
        """The candidate with the best mean over the tuning seeds."""
        found = {recipe: self._accuracies(arm, drawings, "validation", recipe) for recipe in CANDIDATES}
        return max(found, key=lambda recipe: mean(found[recipe].values()))

    @property
    def summary(self) -> list[dict[str, Any]]:
        """Mean and deviation in points for each arm, and its paired gain over single-task with a 95 % interval."""
        found = []
        for drawings, arm in sorted({(row["drawings"], row["arm"]) for row in self._rows if row["split"] == "test"}):
            ours, single = (self._accuracies(name, drawings, "test") for name in (arm, "single-task"))
            line = {"drawings": drawings, "arm": arm, "seeds": len(ours), "accuracy": mean(ours.values())}
            line["deviation"] = stdev(ours.values()) if len(ours) > 1 else None
            paired = [ours[seed] - single[seed] for seed in ours if seed in single]
            if arm != "single-task" and len(paired) > 1:
                half = float(stats.t.ppf(0.975, len(paired) - 1)) * stdev(paired) / math.sqrt(len(paired))
                line |= {"gain": mean(paired), "gain_low": mean(paired) - half, "gain_high": mean(paired) + half}
            found.append(line)
        return found

    def _accuracies(self, arm: str, drawings: int, split: str, recipe: Recipe | None = None) -> dict[int, float]:
        return {
            row["seed"]: row["accuracy"]
            for row in self._rows
            if (row["arm"], row["drawings"], row["split"]) == (arm, drawings, split)
            and (recipe is None or row["recipe"] == asdict(recipe))
        }


class Network(nn.Module):
    """A network per task; modules named in ``shared`` are one for all.

    Args:
        outputs: classes of each task
        arm: what is shared
    """

    def __init__(self, outputs: Mapping[str, int], arm: Arm) -> None:
        super().__init__()
        self.tasks, self.stages = list(outputs), nn.ModuleDict()
        channels = 1
        for number, width in enumerate(WIDTHS, start=1):
            for name in (f"conv{number}", f"norm{number}"):
                copies = 1 if name in arm.shared else len(outputs)
                build = (nn.Conv2d, (channels, width, 3, 1, 1)) if name[0] == "c" else (nn.BatchNorm2d, (width,))
                self.stages[name] = nn.ModuleList(build[0](*build[1]) for _ in range(copies))
            channels = width
        self.heads = nn.ModuleList(nn.Linear(channels * 9, number) for number in outputs.values())
        self.union = nn.Linear(channels * 9, sum(outputs.values())) if arm.union else None

    def features(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Images (B_t, 1, 28, 28) of each task -> features (B_t, D) of each."""
        sizes, inputs = [len(part) for part in images], torch.cat(list(images))
        for name, copies in self.stages.items():
            if len(copies) == 1:
                inputs = copies[0](inputs)
            else:
                inputs = torch.cat([own(part) for own, part in zip(copies, inputs.split(sizes), strict=True)])
            if name.startswith("norm"):
                inputs = F.max_pool2d(F.relu(inputs, inplace=True), 2)
        return list(inputs.flatten(1).split(sizes))


def train(arm: Arm, recipe: Recipe, data: Mapping[str, TaskData], seed: int, split: str) -> float:
    """Accuracy on a split, mean over tasks, after training on "train"."""
    torch.manual_seed(seed)
    network = Network(num_outputs(data), arm)
    optimizer = torch.optim.AdamW(network.parameters(), recipe.lr, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, recipe.steps)
    generator = torch.Generator().manual_seed(seed)
    train_set = [_tensors(task, own, "train") for task, own in data.items()]
    offsets = torch.tensor([0, *num_outputs(data).values()]).cumsum(0)
    network.train()
    for _ in range(recipe.steps):
        # with replacement, so that alphabets of all sizes give batches of one size
        chosen = [torch.randint(len(labels), (BATCH_SIZE,), generator=generator) for _, labels in train_set]
        images = torch.cat([own[rows] for (own, _), rows in zip(train_set, chosen, strict=True)])
        labels = [own[rows] for (_, own), rows in zip(train_set, chosen, strict=True)]
        features = network.features(distort(images, recipe.augmentation, generator).split(BATCH_SIZE))
        loss = torch.stack(
            [F.cross_entropy(head(x), y) for head, x, y in zip(network.heads, features, labels, strict=True)]
        ).sum()
        if network.union is not None:
            everyone = torch.cat([y + offset for y, offset in zip(labels, offsets[:-1], strict=True)])
            loss = loss + arm.union * len(data) * F.cross_entropy(network.union(torch.cat(features)), everyone)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return _accuracy(network, [_tensors(task, own, split) for task, own in data.items()])


def distort(images: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Images (B, 1, H, W), each moved, turned, zoomed and sheared at random.

    At amount 1: by up to 3 pixels of 28, 0.25 radians, 15 % and 0.2, uniformly.
    """
    limits = amount * torch.tensor([6 / 28, 6 / 28, 0.25, 0.15, 0.15, 0.2])
    right, down, angle, wide, high, shear = ((2 * torch.rand(len(images), 6, generator=generator) - 1) * limits).unbind(
        1
    )
    cos, sin = angle.cos(), angle.sin()
    wide, high = wide.exp(), high.exp()
    rows = (cos * wide, (shear * cos - sin) * high, right, sin * wide, (shear * sin + cos) * high, down)
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def _tensors(task: str, data: TaskData, split: str) -> tuple[Tensor, Tensor]:
    part = getattr(data, split)
    return part.inputs.float() / 255, part.targets[task]


@torch.no_grad()
def _accuracy(network: Network, data: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Mean over tasks."""
    network.eval()
    features = network.features([images for images, _ in data])
    return mean(
        float((head(x).argmax(1) == labels).float().mean())
        for head, x, (_, labels) in zip(network.heads, features, data, strict=True)
    )


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
