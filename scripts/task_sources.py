"""Where the data of several tasks come from: ``digits``, ``csv:PATH``, ``omniglot:FOLDER`` and others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

import layers
from mtl import Task
from mtl.data import (
    TaskData,
    cifar10_tasks,
    cifar100_tasks,
    csv,
    digits_tasks,
    image_folder,
    num_outputs,
    omniglot,
    school_tasks,
)
from mtl.data.tasks import of_images
from scripts.sources import build_model

SOURCES = (
    "digits, school:PATH.mat, omniglot:FOLDER, csv:PATH, imagefolder:FOLDER (of one per task), cifar10:PATH or "
    "cifar100:PATH"
)

Data = TaskData | Mapping[str, TaskData]


def open_tasks(
    source: str,
    *,
    targets: Sequence[str] | None = None,
    features: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    shots: int = 10,
    image_size: int | None = None,
) -> Data:
    """Reads what ``source`` names; the choice of validation and test data does not depend on the run's seed.

    Raises ``ValueError`` for a source that does not exist or is damaged, and for options that it does not take.
    """
    kind, _, path = source.partition(":")
    readers: dict[str, Callable[[], Data]] = {
        "digits": digits_tasks,
        "school": lambda: school_tasks(path),
        "omniglot": lambda: omniglot(path, train=shots),
        "csv": lambda: csv(path, targets or (), features=features, classes=classes or ()),
        "imagefolder": lambda: _image_folders(Path(path), image_size),
        "cifar10": lambda: cifar10_tasks(path),
        "cifar100": lambda: cifar100_tasks(path),
    }
    if kind not in readers or (kind == "digits") != (not path):
        raise ValueError(f"data {source!r} is none of {SOURCES}")
    if kind != "csv" and (targets or features or classes):
        raise ValueError(f"--targets, --features and --classes are for csv only; the tasks of {kind} are known")
    if kind == "csv" and not targets:
        raise ValueError("csv needs --targets: the columns that are to be predicted, one task each")
    return readers[kind]()


class TaskConfig(Protocol):
    """The flags that say which tasks are meant."""

    @property
    def data(self) -> str: ...
    @property
    def targets(self) -> list[str] | None: ...
    @property
    def features(self) -> list[str] | None: ...
    @property
    def classes(self) -> list[str] | None: ...
    @property
    def shots(self) -> int: ...
    @property
    def image_size(self) -> int | None: ...


def open_config(config: TaskConfig) -> Data:
    """What the flags of a command name; errors are those of :func:`open_tasks`."""
    return open_tasks(
        config.data,
        targets=config.targets,
        features=config.features,
        classes=config.classes,
        shots=config.shots,
        image_size=config.image_size,
    )


def has_validation(data: Data) -> bool:
    """Whether every task has validation data."""
    return all(own.validation is not None for own in ([data] if isinstance(data, TaskData) else data.values()))


def tasks_of(data: Data) -> list[Task]:
    """Classification where targets are classes, regression where they are numbers."""
    return [
        (Task.regression if own.is_regression(name) else Task.classification)(name)
        for own in ([data] if isinstance(data, TaskData) else data.values())
        for name in own.num_outputs
    ]


def builders(data: Data, trunk: str | None, width: int) -> tuple[Callable[[], nn.Module], Callable[[Task], nn.Module]]:
    """Functions that make a trunk with ``width`` outputs, and the head of a task.

    ``trunk`` is a source as for ``prunus prune``; without, it is three convolutions for images and two layers for rows.

    Raises ``ValueError`` for a trunk that cannot be built, and for tasks whose inputs have different shapes.
    """
    outputs = num_outputs(data)
    sets = {"": data} if isinstance(data, TaskData) else data
    shapes = {name: tuple(own.test.inputs[torch.arange(1)].shape[1:]) for name, own in sets.items()}
    shape = next(iter(shapes.values()))
    for name, other in shapes.items():
        if len(other) != len(shape) or other[0] != shape[0]:
            raise ValueError(f"inputs of task {name!r} have shape {other}, those of the first {shape}: they must agree")

    def build() -> nn.Module:
        if trunk is not None:
            return build_model(trunk, width)
        return _convolutions(shape[0], width) if len(shape) == 3 else _perceptron(shape[0], width)

    return build, lambda task: nn.Linear(width, outputs[task.name])


def _convolutions(num_channels: int, width: int) -> nn.Module:
    return nn.Sequential(
        layers.ConvBNAct(num_channels, 32, 3),
        layers.ConvBNAct(32, 64, 3, stride=2),
        layers.ConvBNAct(64, width, 3, stride=2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * width, width),
        nn.ReLU(),
    )


def _perceptron(num_features: int, width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(num_features, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())


def _image_folders(folder: Path, image_size: int | None) -> dict[str, TaskData]:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if not names:
        raise ValueError(
            f"{folder} holds no folders: each task's images belong in {folder}/TASK/train/CLASS/ and test/"
        )
    return {name: of_images(name, image_folder(folder / name, image_size=image_size)) for name in names}
