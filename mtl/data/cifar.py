"""CIFAR-10 and CIFAR-100 as published, read by torchvision, which verifies every file's checksum first."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torchvision import datasets

from mtl.data.folder import image_folder
from mtl.data.images import ImageData, Split, carve, channel_statistics, check_normalization, take
from mtl.data.tasks import TaskData, of_images

# Krizhevsky (2009), "Learning multiple layers of features from tiny images", the list of CIFAR-100's classes.
SUPER_CLASSES = {
    "aquatic_mammals": ("beaver", "dolphin", "otter", "seal", "whale"),
    "fish": ("aquarium_fish", "flatfish", "ray", "shark", "trout"),
    "flowers": ("orchid", "poppy", "rose", "sunflower", "tulip"),
    "food_containers": ("bottle", "bowl", "can", "cup", "plate"),
    "fruit_and_vegetables": ("apple", "mushroom", "orange", "pear", "sweet_pepper"),
    "household_electrical_devices": ("clock", "keyboard", "lamp", "telephone", "television"),
    "household_furniture": ("bed", "chair", "couch", "table", "wardrobe"),
    "insects": ("bee", "beetle", "butterfly", "caterpillar", "cockroach"),
    "large_carnivores": ("bear", "leopard", "lion", "tiger", "wolf"),
    "large_man-made_outdoor_things": ("bridge", "castle", "house", "road", "skyscraper"),
    "large_natural_outdoor_scenes": ("cloud", "forest", "mountain", "plain", "sea"),
    "large_omnivores_and_herbivores": ("camel", "cattle", "chimpanzee", "elephant", "kangaroo"),
    "medium_mammals": ("fox", "porcupine", "possum", "raccoon", "skunk"),
    "non-insect_invertebrates": ("crab", "lobster", "snail", "spider", "worm"),
    "people": ("baby", "boy", "girl", "man", "woman"),
    "reptiles": ("crocodile", "dinosaur", "lizard", "snake", "turtle"),
    "small_mammals": ("hamster", "mouse", "rabbit", "shrew", "squirrel"),
    "trees": ("maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"),
    "vehicles_1": ("bicycle", "bus", "motorcycle", "pickup_truck", "train"),
    "vehicles_2": ("lawn_mower", "rocket", "streetcar", "tank", "tractor"),
}


# CIFAR-10 as three tasks of like things
CIFAR10_TASKS = {
    "vehicles": ("airplane", "automobile", "ship", "truck"),
    "mammals": ("cat", "deer", "dog", "horse"),
    "others": ("bird", "frog"),
}


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


def cifar10_tasks(
    path: str | os.PathLike[str],
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    validation: float = 0.1,
    seed: int = 0,
) -> dict[str, TaskData]:
    """CIFAR-10 as three tasks with images of their own: four vehicles, four mammals, a bird and a frog.

    ``path`` is as for ``cifar10``, or a folder with ``train/CLASS/`` and ``test/CLASS/``. Other arguments, and errors,
    are those of ``cifar10``.
    """
    read = image_folder if (Path(path) / "train").is_dir() else cifar10
    return class_tasks(read(path, mean=mean, std=std, validation=validation, seed=seed), CIFAR10_TASKS)


def cifar100_tasks(
    path: str | os.PathLike[str],
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    validation: float = 0.1,
    seed: int = 0,
) -> dict[str, TaskData]:
    """CIFAR-100 as 20 tasks with images of their own: each super-class tells its five classes apart.

    Arguments and errors are those of ``cifar10``.
    """
    return class_tasks(cifar100(path, mean=mean, std=std, validation=validation, seed=seed), SUPER_CLASSES)


def class_tasks(data: ImageData, groups: Mapping[str, Sequence[str]]) -> dict[str, TaskData]:
    """Tasks with images of their own, each telling some of the classes apart; all are normalised alike.

    Args:
        data: images with names of their classes
        groups: by task, the names of its classes

    Raises:
        ValueError: for a class that there is not.
    """
    tasks = {}
    for name, members in groups.items():
        if unknown := sorted(set(members) - set(data.class_names)):
            raise ValueError(
                f"task {name!r}: there is no class {unknown[0]!r}; there are {', '.join(data.class_names)}"
            )
        classes = torch.tensor([data.class_names.index(member) for member in members])
        train, validation, test = (
            None if split is None else _only(split, classes) for split in (data.train, data.validation, data.test)
        )
        assert train is not None
        assert test is not None
        own = replace(data, train=train, validation=validation, test=test, class_names=tuple(members))
        tasks[name] = of_images(name, own)
    return tasks


def _only(split: Split, classes: Tensor) -> Split:
    """The images of some classes, which become 0, 1, ..."""
    found = split.labels[:, None] == classes
    part = take(split, found.any(1).nonzero().squeeze(1))
    return replace(part, labels=found[found.any(1)].int().argmax(1))


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
