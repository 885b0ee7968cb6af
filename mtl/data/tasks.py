"""Data of several tasks: one set of inputs with a label per task, or a set of its own for each task.

Shapes: N samples, F features, C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtl.data.images import ImageData
from mtl.data.loader import Inputs, TensorLoader

# Where a class label is missing: what torch.nn.CrossEntropyLoss ignores. A missing number is NaN.
MISSING_CLASS = -100


@dataclass(frozen=True, eq=False)
class Labelled:
    """Inputs, and a target for each of one or more tasks.

    Args:
        inputs: (N, ...); bytes are images
        targets: by task, (N,) class indices (int64, ``MISSING_CLASS`` where unknown) or (N,) numbers (float32, NaN
            where unknown)
    """

    inputs: Inputs
    targets: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True, eq=False)
class TaskData:
    """One data set, labelled for one or more tasks, in three parts.

    Args:
        train: to train on
        validation: to choose by; None when none was asked for
        test: never part of the others
        num_outputs: by task, the number of classes, or 1 for a number (regression)
        mean: per channel of images, on the scale of [0, 1], subtracted by ``loader``; None for what needs none
        std: likewise, what every image is divided by then
        augment: whether ``loader("train")`` crops and mirrors
    """

    train: Labelled
    validation: Labelled | None
    test: Labelled
    num_outputs: Mapping[str, int]
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    augment: bool = False

    def is_regression(self, task: str) -> bool:
        """Whether the task's targets are numbers, not classes."""
        return self.train.targets[task].is_floating_point()

    def loader(self, split: str, *, batch_size: int = 128, seed: int = 0) -> TensorLoader:
        """Batches ``(inputs, {task: target})``, shuffled (and augmented where that is on) for "train".

        Raises:
            ValueError: for an unknown or missing split.
        """
        if split not in ("train", "validation", "test"):
            raise ValueError(f"unknown split {split!r}: use 'train', 'validation' or 'test'")
        part: Labelled | None = getattr(self, split)
        if part is None:
            raise ValueError("there is no validation split: load the data with validation above 0")
        return TensorLoader(
            part.inputs,
            part.targets,
            batch_size=batch_size,
            shuffle=split == "train",
            augment=self.augment and split == "train",
            normalize=(self.mean, self.std) if self.mean is not None and self.std is not None else None,
            seed=seed,
        )


def of_images(task: str, data: ImageData) -> TaskData:
    """An image data set as the data of one classification task."""
    parts = (
        None if split is None else Labelled(split.images, {task: split.labels})
        for split in (data.train, data.validation, data.test)
    )
    train, validation, test = parts
    assert train is not None
    assert test is not None
    augment = data.loader("train").augment
    return TaskData(train, validation, test, {task: data.num_classes}, data.mean, data.std, augment)


def split_rows(num_rows: int, validation: float, test: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of the rows for training, validation and test, drawn at random.

    Args:
        num_rows: to divide
        validation: fraction in [0, 1) of all rows
        test: likewise
        seed: of the draw

    Raises:
        ValueError: where nothing would be left to train or to test on.
    """
    num_validation, num_test = (round(part * num_rows) for part in (validation, test))
    if min(validation, test) < 0 or num_test < 1 or num_rows - num_validation - num_test < 1:
        raise ValueError(
            f"validation={validation} and test={test} of {num_rows} rows leave nothing to train or to test on: "
            "give fractions that add up to less than 1, and test above 0"
        )
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))
    return order[num_validation + num_test :], order[num_test : num_validation + num_test], order[:num_test]


def of_rows(
    inputs: Tensor,
    targets: Mapping[str, Tensor],
    num_outputs: Mapping[str, int],
    rows: Sequence[Tensor],
    prepare: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> TaskData:
    """Rows of a table, or images in memory, divided into (train, validation, test) by index.

    Args:
        inputs: (N, ...)
        targets: by task, (N,)
        num_outputs: by task
        rows: the three parts
        prepare: ``prepare(inputs, training inputs)``, such as ``standardize``
    """
    if prepare is not None:
        inputs = prepare(inputs, inputs[rows[0]])
    train, validation, test = (
        Labelled(inputs[part], {task: target[part] for task, target in targets.items()}) for part in rows
    )
    return TaskData(train, validation if len(validation) else None, test, num_outputs)


def standardize(inputs: Tensor, train: Tensor) -> Tensor:
    """Columns (N, F) with mean 0 and deviation 1 over the training rows; a column that is constant there becomes 0."""
    center, scale = train.mean(0), train.std(0, correction=0)
    constant = scale <= 1e-6 * center.abs().clamp(min=1)
    return ((inputs - center) / scale.masked_fill(constant, 1)).masked_fill(constant, 0).float()


def loaders(data: TaskData | Mapping[str, TaskData], split: str, **options: Any) -> Any:
    """What ``mtl.fit`` takes: one loader for shared inputs, or ``{task: loader}`` where each task has data of its own.

    Raises:
        ValueError: for an unknown or missing split.
    """
    if isinstance(data, TaskData):
        return data.loader(split, **options)
    return {task: own.loader(split, **options) for task, own in data.items()}


def num_outputs(data: TaskData | Mapping[str, TaskData]) -> dict[str, int]:
    """Outputs that the head of each task needs: the number of classes, or 1 for a number."""
    sets = [data] if isinstance(data, TaskData) else data.values()
    return {task: number for own in sets for task, number in own.num_outputs.items()}
