"""``prunus factorize``: a trained checkpoint goes in, one with thin layers in the place of wide ones comes out."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.table import Table
from torch import nn

import compress
from compress import Budget, FactorResult, ShrinkResult
from compress.cost import Cost
from compress.factorize import options as factorize_options
from mtl import Distillation, FitOptions, evaluate, fit
from mtl.data import ImageData
from scripts.command import run_command
from scripts.config import check_at_least
from scripts.prune import (
    CALIBRATION_BATCH_SIZE,
    TASK,
    TEMPERATURE,
    TEST_BATCH_SIZE,
    calibration_loader,
    device_named,
    model_and_example,
)
from scripts.sources import open_data

Result = TypeVar("Result", FactorResult, ShrinkResult)


@dataclass(frozen=True, kw_only=True)
class FactorizeConfig:
    """Replace layers of a trained model by two or three thin ones, to a budget; retrain it where that is asked for.

    Args:
        model: layers:NAME, torchvision:NAME, timm:NAME or FILE.py:FACTORY
        data: digits, imagefolder:PATH (with train/ and test/), cifar10:PATH or cifar100:PATH
        checkpoint: trained weights (.pt .pth .th .safetensors)
        budget: what fraction of the dense model to keep: one of --budget.macs .params .latency, in (0, 1]
        output: the file to write (.safetensors), which must not exist
        mean: per channel on the scale of [0, 1], as in --mean 0.485 0.456 0.406; default: measured on the data
        std: likewise
        image_size: pixels a side, for image folders whose images differ in size
        methods: what a layer may become, as in --methods svd spatial; and tucker2, attention; default: any
        protect: layers that stay as they are, as in --protect head "stem.*"
        calibration: images that are looked at, without labels: train or validation
        calibration_batches: how many batches of them, of at most 128 images
        validation: part of the training images, or how many, that is held out where --calibration is validation
        recover: refit what comes out to the dense model, without training
        epochs: of retraining after that; 0 for none
        lr: peak learning rate of retraining, falling to 0; thin layers want a quarter of what wide ones do
        batch_size: images a step
        distill: part of the retraining loss that the dense model's outputs have, in [0, 1]; 0 learns from labels alone
        seed: of everything random
        device: auto, cpu, cuda, ...
    """

    model: str
    data: str
    checkpoint: str
    budget: Budget
    output: str
    mean: list[float] | None = None
    std: list[float] | None = None
    image_size: int | None = None
    methods: list[str] | None = None
    protect: list[int | str] | None = None
    calibration: str = "train"
    calibration_batches: int = 8
    validation: float = 0.1
    recover: bool = True
    epochs: int = 0
    lr: float = 0.005
    batch_size: int = 128
    distill: float = 0.9
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        check_at_least(self, 0, "epochs")
        check_at_least(self, 1, "batch_size", "calibration_batches")
        if self.calibration not in ("train", "validation"):
            raise ValueError(f"--calibration is {self.calibration}, but it must be train or validation")
        if not 0 <= self.distill <= 1:
            raise ValueError(f"--distill is {self.distill}, but it must be in [0, 1]: the part that the teacher has")
        FitOptions(lr=self.lr)  # bad values fail here, before anything runs
        output = Path(self.output)
        if output.suffix != ".safetensors":
            raise ValueError(f"--output is {self.output}, but the file is a .safetensors")
        if output.exists():
            raise ValueError(f"--output {self.output} exists; choose another name, or remove it")
        if not output.parent.is_dir():
            raise ValueError(f"--output {self.output}: the folder {output.parent} does not exist; create it")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    return run_command(run, FactorizeConfig, "prunus factorize", argv)


def run(config: FactorizeConfig) -> FactorResult:
    """Factorises as ``config`` says, prints what that cost, and writes the file. Bad input is a ``ValueError``."""
    return made_smaller(
        config, "factorised", partial(compress.factorize, methods=tuple(config.methods or factorize_options.METHODS))
    )


def made_smaller(config: FactorizeConfig, name: str, make: Callable[..., Result]) -> Result:
    """What ``make`` makes of the model that ``config`` names, printed as ``name`` and written."""
    held_out = config.validation if config.calibration == "validation" else 0.0
    data = open_data(config.data, mean=config.mean, std=config.std, image_size=config.image_size, validation=held_out)
    model, example = model_and_example(config, data)
    images = calibration_loader(
        data, config.calibration, CALIBRATION_BATCH_SIZE, config.calibration_batches, seed=config.seed
    )
    result = make(
        model,
        example,
        budget=config.budget,
        calibration=images,
        recover=config.recover,
        protect=tuple(map(str, config.protect or ())),  # modules may have numbers for names
        seed=config.seed,
    )
    print(result.summary())
    accuracies = {"dense": _accuracy(model, data), name: _accuracy(result.model, data)}
    if config.epochs:
        _train(config, data, result.model, model)
        accuracies[f"after {config.epochs} epochs"] = _accuracy(result.model, data)
    compress.save(result, config.output)
    _print_accuracies(accuracies, result)
    print(f"{config.output}: compress.load(fresh_model, {config.output!r}) gives the model back")
    return result


def _train(config: FactorizeConfig, data: ImageData, model: nn.Module, teacher: nn.Module) -> None:
    loader = data.loader("train", batch_size=config.batch_size, seed=config.seed)
    options = FitOptions(lr=config.lr, seed=config.seed, device=str(device_named(config.device)))
    distillation = None
    if config.distill:
        distillation = Distillation(teacher=teacher, weight=config.distill, temperature=TEMPERATURE)
    fit(model, TASK, loader, epochs=config.epochs, options=options, distillation=distillation)


def _accuracy(model: nn.Module, data: ImageData) -> float:
    return evaluate(model, TASK, data.loader("test", batch_size=TEST_BATCH_SIZE))[TASK.name]


def _print_accuracies(accuracies: dict[str, float], result: FactorResult | ShrinkResult) -> None:
    """Accuracy on the test images, and size, of each stage."""
    table = Table(title="on the test images", title_justify="left")
    for column in ("", "accuracy", "parameters", "MACs", "latency"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, accuracy in accuracies.items():
        dense = name == "dense"
        cost: Cost = result.before if dense else result.after
        seconds = "" if dense else f"{result.latency:.1%}"
        table.add_row(name, f"{accuracy:.2%}", f"{cost.params:,}", f"{cost.macs:,}", seconds)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
