"""Everything that can be said about a pruning run: its flags, its YAML, and whether a folder is of the same run."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import yaml

from compress import Budget
from compress.folder import claim
from mtl import FitOptions

CONFIG_FILE = "config.yaml"
# Where and how loudly a run works; everything else must be equal for a folder to be the same run.
NOT_IN_CONFIG_FILE = ("folder", "device")
PRUNE_OUTPUTS = ("dense", "rounds", "history.json", "small.safetensors", "run.json")


class ModelConfig(Protocol):
    """What says which model is meant, with which weights and where."""

    @property
    def model(self) -> str: ...
    @property
    def data(self) -> str: ...
    @property
    def checkpoint(self) -> str | None: ...
    @property
    def seed(self) -> int: ...
    @property
    def device(self) -> str: ...


def check_at_least(config: object, least: int, *names: str) -> None:
    """Raises ``ValueError`` that names the flag where one of these is below ``least``."""
    for name in names:
        if (value := getattr(config, name)) < least:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, but it must be at least {least}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """Prune a model to a budget, in rounds of pruning and training; the same command resumes an interrupted run.

    Args:
        model: layers:NAME, torchvision:NAME, timm:NAME or FILE.py:FACTORY
        data: digits, imagefolder:PATH (with train/, test/ and, where there is one, validation/), cifar10:PATH or
            cifar100:PATH
        budget: what fraction of the dense model to keep: one of --budget.macs .params .channels .latency, in (0, 1]
        checkpoint: weights to start from (.pt .pth .th .safetensors); without, the dense model is trained first
        dense_epochs: epochs of training the dense model, where there is no checkpoint
        mean: per channel on the scale of [0, 1], as in --mean 0.485 0.456 0.406; default: measured on the data
        std: likewise
        image_size: pixels a side, for image folders whose images differ in size
        criterion: which channels go: l1, l2, mean_activation, nonzero, random, taylor, bn_scale, fpgm, lamp,
            reconstruction, or FILE.py:FUNCTION for one of your own
        calibration: images that data-driven criteria and --recover look at: validation (kept apart from training) or
            train; default: validation for a criterion, train where only --recover needs them
        calibration_batches: how many batches of them, of at most 128 images (of 32 for gradients)
        validation: part of the training images, or how many, that is held out where the data have no validation images:
            the accuracy of the rounds is measured on them, and they decide. A checkpoint that was trained on all
            training images has seen them, so that its own accuracy is too high. 0: the accuracy is on the test images,
            and nothing may depend on it
        scope: "global" compares channels over layers, "uniform" takes the same part of each
        round_to: widths become multiples of it; "auto" times which multiples are worth it on this machine
        schedule: one_shot, linear, cubic or exponential
        rounds: of pruning and training
        epochs: of training in each round
        lr: peak learning rate of retraining, falling to 0 in each round (a dense model is trained at 0.05)
        batch_size: images a step
        sparsity: press channels towards zero while training, before they are removed: the strength to which a group
            lasso grows in each round, such as 1e-4; one more round comes first, in which nothing is removed
        ema_decay: end each round with the average of its weights, in (0, 1), such as 0.99 a step; default: no average
        distill: part of the retraining loss that the dense model's outputs have, in [0, 1]; 0 learns from labels alone
        recover: repair each pruned model without training (layers refitted to the dense model's, on training images)
        max_drop: stop at the first round that loses more validation accuracy than this fraction, and return the one
            before
        seed: of everything random
        device: auto, cpu, cuda, ...
        folder: of this run: results, curves and what a resume needs
    """

    model: str
    data: str
    budget: Budget
    checkpoint: str | None = None
    dense_epochs: int = 20
    mean: list[float] | None = None
    std: list[float] | None = None
    image_size: int | None = None
    criterion: str = "l2"
    calibration: str | None = None
    calibration_batches: int = 8
    validation: float = 0.1
    scope: str = "global"
    round_to: int | str = 1
    schedule: str = "cubic"
    rounds: int = 3
    epochs: int = 2
    lr: float = 0.02
    batch_size: int = 128
    sparsity: float = 0.0
    ema_decay: float | None = None
    distill: float = 0.9
    recover: bool = False
    max_drop: float | None = None
    seed: int = 0
    device: str = "auto"
    folder: str = "runs/prune"

    def __post_init__(self) -> None:
        check_at_least(self, 1, "dense_epochs", "rounds", "epochs", "batch_size", "calibration_batches")
        if self.calibration not in (None, "validation", "train"):
            raise ValueError(f"--calibration is {self.calibration}, but it must be validation or train")
        if not self.validation >= 0:
            raise ValueError(
                f"--validation is {self.validation}, but it must be a part in [0, 1), or a number of images"
            )
        if not self.sparsity >= 0:
            raise ValueError(f"--sparsity is {self.sparsity}, but a strength is 0 (off) or above, such as 1e-4")
        FitOptions(lr=self.lr, ema_decay=self.ema_decay)  # bad values fail here, before anything is written
        if not 0 <= self.distill <= 1:
            raise ValueError(f"--distill is {self.distill}, but it must be in [0, 1]: the part that the teacher has")


def claim_folder(folder: Path, config: Any, outputs: Sequence[str] = PRUNE_OUTPUTS) -> None:
    """Writes the config, a dataclass, that reproduces the run into ``folder``; ``ValueError`` where it holds another
    run, or some of the ``outputs`` of one."""
    values = {name: value for name, value in dataclasses.asdict(config).items() if name not in NOT_IN_CONFIG_FILE}
    claim(
        folder / CONFIG_FILE, values, outputs, dump=lambda value: yaml.safe_dump(value, sort_keys=False), parse=_parse
    )


def _parse(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
