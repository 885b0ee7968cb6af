"""``prunus sensitivity``: what each layer of a trained model costs in accuracy when it alone is pruned."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import compress
from compress.criteria import needs, resolve
from compress.sensitivity import CURVE, POINTS, RATIOS, TABLE, SensitivityPoint
from mtl import evaluate
from scripts.command import run_command
from scripts.prune import GRADIENT_BATCH_SIZE, TASK, TEST_BATCH_SIZE, calibration_loader, model_and_example
from scripts.sources import find_criterion, open_data


@dataclass(frozen=True, kw_only=True)
class SensitivityConfig:
    """Show accuracy against the kept part of each layer, one layer at a time, by one or more criteria.

    Args:
        model: layers:NAME, torchvision:NAME, timm:NAME or FILE.py:FACTORY
        data: digits, imagefolder:PATH (with train/ and test/), cifar10:PATH or cifar100:PATH
        checkpoint: trained weights (.pt .pth .th .safetensors)
        mean: per channel on the scale of [0, 1], as in --mean 0.485 0.456 0.406; default: measured on the data
        std: likewise
        image_size: pixels a side, for image folders whose images differ in size
        criteria: which channels go, as in --criteria l2 taylor; names, or FILE.py:FUNCTION
        ratios: parts of a layer to keep, as in --ratios 0.75 0.5 0.25
        images: how many accuracy is measured on, kept apart from the training images; data-driven criteria see others
        seed: of the choice of images
        device: auto, cpu, cuda, ...
        folder: of this run: results, and what a resume needs
    """

    model: str
    data: str
    checkpoint: str
    mean: list[float] | None = None
    std: list[float] | None = None
    image_size: int | None = None
    criteria: list[str] | None = None
    ratios: list[float] | None = None
    images: int = 1000
    seed: int = 0
    device: str = "auto"
    folder: str = "runs/sensitivity"

    def __post_init__(self) -> None:
        if self.images < 1:
            raise ValueError(f"--images is {self.images}, but it must be at least 1")
        if self.ratios is not None and not all(0 < ratio < 1 for ratio in self.ratios):
            raise ValueError(f"--ratios are {self.ratios}, but parts to keep are above 0 and below 1")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    return run_command(run, SensitivityConfig, "prunus sensitivity", argv)


def run(config: SensitivityConfig) -> tuple[SensitivityPoint, ...]:
    """Measures, prints a table for each criterion, and returns the points. Bad input is a ``ValueError``."""
    criteria = [find_criterion(source) for source in config.criteria or ["l2"]]
    data = open_data(config.data, mean=config.mean, std=config.std, image_size=config.image_size, validation=0.1)
    model, example = model_and_example(config, data)
    held_out = data.loader("validation", batch_size=TEST_BATCH_SIZE, limit=config.images, seed=config.seed)
    calibration = None
    if any(needs(resolve(criterion)) for criterion in criteria):
        calibration = calibration_loader(data, "train", GRADIENT_BATCH_SIZE, 16, seed=config.seed)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("points", total=None)
        points = compress.sensitivity(
            model,
            example,
            evaluate=lambda masked: evaluate(masked, TASK, held_out)[TASK.name],
            folder=config.folder,
            criteria=criteria,
            ratios=config.ratios or RATIOS,
            calibration=calibration,
            seed=config.seed,
            on_point=lambda _, number: progress.update(task, advance=1, total=number),
        )
    for criterion in dict.fromkeys(point.criterion for point in points[1:]):
        _print(criterion, points)
    print(f"in {config.folder}: {TABLE}, {CURVE}, {POINTS}")
    print(f"curves: tensorboard --logdir {config.folder}")
    return points


def _print(criterion: str, points: Sequence[SensitivityPoint]) -> None:
    """Accuracy of each group (rows) at each kept part (columns)."""
    found = {(point.group, point.ratio): point for point in points if point.criterion == criterion}
    ratios = list(dict.fromkeys(ratio for _, ratio in found))
    title = f"{criterion}: accuracy with one group pruned (dense: {points[0].accuracy:.2%})"
    table = Table(title=title, title_justify="left")
    table.add_column("group")
    table.add_column("channels", justify="right")
    for ratio in ratios:
        table.add_column(f"{ratio:.0%}", justify="right")
    for group in dict.fromkeys(group for group, _ in found):
        cells = [f"{found[group, ratio].accuracy:.2%}" for ratio in ratios]
        table.add_row(group, str(found[group, ratios[0]].total), *cells)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
