"""CIFAR-10 and CIFAR-100 as published, read by torchvision, which verifies every file's checksum first."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torchvision import datasets

from mtl.data.images import ImageData, Split, carve, channel_statistics, check_normalization


def cifar10(
    path: str | os.PathLike[str],
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    validation: float = 0.1,
    seed: int = 0,
) -> ImageData:
    """CIFAR-10 (Krizhevsky 2009): 50,000 + 10,000 images of 32 x 32 in 10 classes.

    Args:
        path: the folder that holds ``cifar-10-batches-py``; nothing is downloaded
        mean: per channel on the scale of [0, 1]; default: measured on the training images
        std: likewise
        validation: fraction, or number, of the training images
        seed: of that choice

    Raises:
        ValueError: if the files are missing or their checksums are wrong.
    """
    return _load(datasets.CIFAR10, path, (mean, std), validation, seed)


def cifar100(
    path: str | os.PathLike[str],
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    validation: float = 0.1,
    seed: int = 0,
) -> ImageData:
    """CIFAR-100 (Krizhevsky 2009): 50,000 + 10,000 images of 32 x 32 in 100 classes, from ``cifar-100-python``.

    Arguments and errors are those of ``cifar10``.
    """
    return _load(datasets.CIFAR100, path, (mean, std), validation, seed)


def _load(
    kind: type[datasets.CIFAR10],
    path: str | os.PathLike[str],
    normalize: tuple[Sequence[float] | None, Sequence[float] | None],
    validation: float,
    seed: int,
) -> ImageData:
    check_normalization(*normalize)
    try:
        parts = [kind(os.fspath(path), train=train, download=False) for train in (True, False)]
    except RuntimeError:
        raise ValueError(
            f"{kind.__name__}: {os.fspath(path)} holds no folder {kind.base_folder} with all files and the right "
            "checksums; unpack the published archive there"
        ) from None
    splits = [
        Split(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in parts
    ]
    images = splits[0].images
    assert isinstance(images, torch.Tensor)
    mean, std = normalize
    if mean is None or std is None:
        mean, std = channel_statistics(images)
    train, validation_split = carve(splits[0], validation, seed)
    names = tuple(parts[0].classes)
    return ImageData(train, validation_split, splits[1], class_names=names, mean=tuple(mean), std=tuple(std))
