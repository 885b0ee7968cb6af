"""Images for classification in three parts: train, validation (carved from train) and test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtl.data.loader import Inputs, TensorLoader
from mtl.seeding import epoch_seed

# Smaller images (digits) lose their strokes when moved or mirrored.
_MIN_SIZE_TO_AUGMENT = 32


@dataclass(frozen=True, eq=False)
class Split:
    """Images and labels, in no useful order.

    Args:
        images: (N, C, H, W), bytes or float32 in [0, 1]; a tensor, or files that are decoded on access
        labels: (N,) class indices
    """

    images: Inputs
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set for classification.

    Args:
        train: to train on
        validation: carved from the training images; None when none were asked for
        test: never part of the others
        class_names: by class index
        mean: per channel, on the scale of [0, 1], subtracted from every image by ``loader``
        std: per channel, what every image is divided by then
    """

    train: Split
    validation: Split | None
    test: Split
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return tuple(self.train.images[torch.arange(1)].shape[1:])

    def loader(
        self,
        split: str,
        *,
        batch_size: int = 128,
        shuffle: bool | None = None,
        augment: bool | None = None,
        limit: int | None = None,
        seed: int = 0,
    ) -> TensorLoader:
        """Batches of normalised float32 images (B, C, H, W) and labels (B,).

        Args:
            split: "train", "validation" or "test"
            batch_size: >= 1
            shuffle: in a new order each epoch; default: for "train"
            augment: random crop and flip; default: for "train" if images have at least 32 pixels a side
            limit: only so many images, drawn at random with the seed (for calibration)
            seed: of all of this

        Raises:
            ValueError: for an unknown or missing split.
        """
        if split not in ("train", "validation", "test"):
            raise ValueError(f"unknown split {split!r}: use 'train', 'validation' or 'test'")
        part: Split | None = getattr(self, split)
        if part is None:
            raise ValueError("there is no validation split: load the data with validation above 0")
        if limit is not None:
            generator = torch.Generator().manual_seed(epoch_seed(seed, 0))
            part = take(part, torch.randperm(len(part), generator=generator)[:limit])
        if augment is None:
            augment = split == "train" and min(self.image_shape[1:]) >= _MIN_SIZE_TO_AUGMENT
        return TensorLoader(
            part.images,
            part.labels,
            batch_size=batch_size,
            shuffle=split == "train" if shuffle is None else shuffle,
            augment=augment,
            normalize=(self.mean, self.std),
            seed=seed,
        )


def take(split: Split, indices: Tensor) -> Split:
    """The part of a split at the indices."""
    images = split.images
    images = images[indices] if isinstance(images, Tensor) else _View(images, indices)
    return Split(images, split.labels[indices])


def carve(train: Split, validation: float, seed: int) -> tuple[Split, Split | None]:
    """Training and validation images, each class in proportion.

    Args:
        train: what to divide
        validation: a fraction in (0, 1), a number of images >= 1, or 0 for no validation images
        seed: of the choice

    Raises:
        ValueError: where a class would have no image in one of the parts.
    """
    if validation == 0:
        return train, None
    from sklearn.model_selection import train_test_split  # a second to import

    size = validation if 0 < validation < 1 else int(validation)
    try:
        rest, held_out = train_test_split(
            torch.arange(len(train)).numpy(), test_size=size, stratify=train.labels.numpy(), random_state=seed % 2**32
        )
    except ValueError as error:
        raise ValueError(f"cannot take validation={validation} from {len(train)} training images: {error}") from None
    return take(train, torch.from_numpy(rest)), take(train, torch.from_numpy(held_out))


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of bytes (N, C, H, W), on the scale of [0, 1], by counting values."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in range(images.shape[1]):
        counts = torch.zeros(256, dtype=torch.float64)
        for chunk in images.split(4096):
            counts += torch.bincount(chunk[:, channel].flatten(), minlength=256)
        share = counts / counts.sum()
        mean = float(share @ values)
        means.append(mean)
        stds.append(max(float(share @ (values - mean) ** 2) ** 0.5, 1e-6))  # one flat colour must not divide by 0
    return tuple(means), tuple(stds)


def check_normalization(mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    """Both or none.

    Raises:
        ValueError: if one is given without the other.
    """
    if (mean is None) != (std is None):
        raise ValueError("give mean and std together, or neither to measure both on the training images")


@dataclass(frozen=True)
class _View:
    """Some of the files, in another order."""

    images: Inputs
    indices: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, indices: Tensor, /) -> Tensor:
        return self.images[self.indices[indices]]
