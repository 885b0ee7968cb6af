"""``prunus demo`` and ``make demo``: the whole way on scikit-learn's digits, with nothing downloaded."""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import compress
from mtl import evaluate
from mtl.data import ImageData, digits
from scripts.command import run_command
from scripts.prune import TASK, PruneConfig
from scripts.prune import run as prune
from scripts.sources import build_model

MODEL = "layers:digits_cnn"
FRACTIONS = (0.25, 0.1)  # of the MACs, to which the dense model is brought without any training


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Train a small CNN on 8 x 8 digits, prune it to a quarter of its MACs, save it and load it again.

    Then the dense model is pruned, factorised, and both under one budget, without training, side by side.

    Args:
        folder: of the run; the same command resumes it, or shows it when it is complete
        fresh: delete the folder and start over
    """

    folder: str = "runs/demo"
    fresh: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    return run_command(run, DemoConfig, "prunus demo", argv)


def run(config: DemoConfig) -> None:
    """Prunes, saves and loads; raises ``ValueError`` where the loaded model computes something else."""
    torch.set_num_threads(
        1
    )  # in so small a network two threads wait for each other: 16 s with one, 110 with two when busy
    folder = Path(config.folder)
    if config.fresh and (folder / "config.yaml").is_file():  # only ever deletes the folder of a run
        shutil.rmtree(folder)
    if (folder / "small.safetensors").exists():
        print(f"{folder} is complete and is shown again; start over with: python scripts/demo.py --fresh")
    result = prune(
        PruneConfig(
            model=MODEL,
            data="digits",
            budget=compress.Budget(macs=0.25),
            dense_epochs=8,
            rounds=3,
            epochs=3,
            batch_size=64,
            folder=config.folder,
        )
    )
    data = digits()
    fresh = build_model(MODEL, data.num_classes)
    loaded = compress.load(fresh, folder / "small.safetensors").eval()
    images = torch.cat([images for images, _ in data.loader("test")])
    with torch.no_grad():
        if not torch.equal(loaded(images), result.model.cpu()(images)):
            raise ValueError(
                f"{folder / 'small.safetensors'} computes something else than the model that was saved in it"
            )
    print(
        f"small.safetensors, loaded into a fresh {type(fresh).__name__}: the same outputs on {len(images)} test images"
    )
    _compare(compress.load(fresh, folder / "rounds" / "00" / "model.safetensors"), data)


def _compare(dense: nn.Module, data: ImageData) -> None:
    """What each method keeps of the accuracy where nothing is trained."""
    calibration = [images for images, _ in data.loader("train", batch_size=64)]
    example = calibration[0][:1]
    table = Table(title="without training: accuracy on the test images", title_justify="left")
    table.add_column("part of the MACs")
    for column in ("prune", "factorize", "shrink (both)"):
        table.add_column(column, justify="right")
    for fraction in FRACTIONS:
        budget = compress.Budget(macs=fraction)
        made = (
            compress.prune(
                dense, example, budget=budget, criterion="reconstruction", recover=True, calibration=calibration
            ),
            compress.factorize(dense, example, budget=budget, calibration=calibration),
            compress.shrink(dense, example, budget=budget, calibration=calibration),
        )
        scores = [evaluate(result.model, TASK, data.loader("test"))[TASK.name] for result in made]
        table.add_row(f"{fraction:.0%}", *(f"{score:.2%}" for score in scores))
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
