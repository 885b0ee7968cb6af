"""``prunus train-mtl``: several tasks trained together and apart, and a table of what sharing gains."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from compress.folder import write_file
from mtl import Comparison, FitOptions, compare
from mtl.comparison import standard_method
from mtl.data import loaders
from scripts.command import run_command
from scripts.config import CONFIG_FILE, check_at_least, claim_folder
from scripts.task_sources import builders, has_validation, open_config, tasks_of

RESULT_FILE = "comparison.json"
TEST_BATCH_SIZE = 500
MANY_TASKS = 8  # the table of methods has a column for each of so many


@dataclass(frozen=True, kw_only=True)
class TrainMtlConfig:
    """Train tasks together and apart, side by side; the same command resumes an interrupted run.

    Args:
        data: digits (six tasks, nothing to download), school:PATH.mat, omniglot:FOLDER, csv:PATH (a file with all
            targets, or a folder with TASK.csv for each task), imagefolder:FOLDER (with TASK/train and TASK/test),
            cifar10:PATH (three tasks: vehicles, mammals, others) or cifar100:PATH (the 20 super-classes are the tasks)
        methods: single, hard, hard:WEIGHTING, "private norms", "first layers" (:NUMBER), "hard then apart" (:PART),
            soft:l2 or soft:trace_norm (:STRENGTH); see mtl.compare.
            WEIGHTING is uncertainty, dwa, gradnorm, random, geometric, pcgrad, mgda, cagrad, imtl, nash, upgrad or
            aligned
        trunk: layers:NAME, torchvision:NAME, timm:NAME or FILE.py:FACTORY; default: three convolutions for images, two
            layers for rows of numbers
        width: outputs of the trunk, which the heads read
        targets: columns of csv to predict, one task each
        features: columns of csv to predict from; default: all others
        classes: targets of csv whose numbers are classes
        shots: images of each character of omniglot to train on
        image_size: pixels a side, for image folders whose images differ in size
        epochs: of each run
        batch_size: samples a step and data set
        optimizer: sgd or adamw
        lr: peak learning rate; default: 0.05 for sgd, 0.001 for adamw
        weight_decay: on weights
        sampling: proportional, sqrt or uniform, where every task has data of its own
        keep: last, or best: the weights of the epoch that is best on validation data
        patience: stop after so many epochs without a better validation score
        seeds: how many times all of it
        device: auto, cpu, cuda, ...
        folder: of all runs: results, curves and what a resume needs
    """

    data: str
    methods: list[str] | None = None
    trunk: str | None = None
    width: int = 64
    targets: list[str] | None = None
    features: list[str] | None = None
    classes: list[str] | None = None
    shots: int = 10
    image_size: int | None = None
    epochs: int = 10
    batch_size: int = 64
    optimizer: Literal["sgd", "adamw"] = "adamw"
    lr: float | None = None
    weight_decay: float = 5e-4
    sampling: Literal["proportional", "sqrt", "uniform"] = "proportional"
    keep: Literal["last", "best"] = "last"
    patience: int | None = None
    seeds: int = 1
    device: str = "auto"
    folder: str = "runs/mtl"

    def __post_init__(self) -> None:
        check_at_least(self, 1, "width", "shots", "epochs", "batch_size", "seeds")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    return run_command(run, TrainMtlConfig, "prunus train-mtl", argv)


def run(config: TrainMtlConfig) -> Comparison:
    """Trains as ``config`` says, prints the table, and returns what it shows. Bad input is a ``ValueError``."""
    options = FitOptions(
        optimizer=config.optimizer,
        lr=config.lr,
        weight_decay=config.weight_decay,
        sampling=config.sampling,
        keep=config.keep,
        patience=config.patience,
        device=config.device,
    )
    data = open_config(config)
    trunk, head = builders(data, config.trunk, config.width)
    trunk()  # what cannot be built fails before anything is written
    folder = Path(config.folder)
    names = config.methods or ["single", "hard"]
    methods = [standard_method(name, trunk, head) for name in names]
    claim_folder(folder, config, (RESULT_FILE, *(name.replace(":", "-").replace(" ", "-") for name in names)))
    found = compare(
        tasks_of(data),
        loaders(data, "train", batch_size=config.batch_size),
        methods,
        test=loaders(data, "test", batch_size=TEST_BATCH_SIZE),
        validation=loaders(data, "validation", batch_size=TEST_BATCH_SIZE) if has_validation(data) else None,
        seeds=config.seeds,
        epochs=config.epochs,
        options=options,
        folder=folder,
    )
    text = json.dumps(found.to_json(), indent=1) + "\n"
    write_file(folder / RESULT_FILE, lambda partial: partial.write_text(text, encoding="utf-8"))
    print(found)
    if len(found.directions) > MANY_TASKS:
        print(found.by_task())
    print(f"in {folder}: {RESULT_FILE}, {CONFIG_FILE}, and a folder for each run (mtl.restore loads its weights)")
    print(f"curves: tensorboard --logdir {folder}")
    return found


if __name__ == "__main__":
    sys.exit(main())
