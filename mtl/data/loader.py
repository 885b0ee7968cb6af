"""Batches from tensors in memory, without any work per image in Python.

Shapes: B images in a batch, C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mtl.seeding import epoch_seed

# Zero padding before the random crop: 4 pixels on 32 (He et al. 2016, section 4.2), in proportion for larger images.
_PADDING_RATIO = 8


class Inputs(Protocol):
    """What a loader reads: a tensor is one; files that are decoded on access are another."""

    def __len__(self) -> int: ...
    def __getitem__(self, indices: Tensor, /) -> Tensor: ...


class TensorLoader:
    """Iterable of ``(input, target)`` batches; the last one may be smaller.

    The order and the augmentation depend on ``(seed, epoch)`` alone: iterating twice gives the same batches until
    ``set_epoch`` is called, which ``mtl.fit`` does.

    Args:
        inputs: (N, ...) tensor; bytes are images with values 0 to 255 and come out as float32 in [0, 1]
        targets: (N, ...) tensor, or one per task
        batch_size: >= 1
        shuffle: in a new order each epoch
        augment: images (N, C, H, W) only: random crop after zero padding by H / 8, and horizontal flip
        normalize: (mean, std), one number per channel, on the scale of [0, 1]
        seed: of order and augmentation

    Raises:
        ValueError: for lengths that differ, no samples, or a normalisation for another number of channels.
    """

    def __init__(
        self,
        inputs: Inputs,
        targets: Tensor | Mapping[str, Tensor],
        *,
        batch_size: int = 128,
        shuffle: bool = False,
        augment: bool = False,
        normalize: tuple[Sequence[float], Sequence[float]] | None = None,
        seed: int = 0,
    ) -> None:
        lengths = {len(target) for target in ([targets] if isinstance(targets, Tensor) else targets.values())}
        if lengths != {len(inputs)}:
            raise ValueError(
                f"there are {len(inputs)} inputs, but {sorted(lengths)} targets: give one target for each input"
            )
        if len(inputs) == 0:
            raise ValueError("there are no samples: give at least one")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, but it must be at least 1")
        self.inputs, self.targets, self.batch_size = inputs, targets, batch_size
        self.shuffle, self.augment, self.seed = shuffle, augment, seed
        self._normalize = _affine(inputs, normalize) if normalize is not None else None
        self._epoch = 0

    @property
    def num_samples(self) -> int:
        """In one epoch."""
        return len(self.inputs)

    def __len__(self) -> int:
        """Batches in one epoch."""
        return -(-self.num_samples // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the augmentation of the next iteration."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | dict[str, Tensor]]]:
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, self._epoch))
        order = (
            torch.randperm(self.num_samples, generator=generator) if self.shuffle else torch.arange(self.num_samples)
        )
        for indices in order.split(self.batch_size):
            batch = self.inputs[indices]
            if self.augment:
                batch = crop_and_flip(batch, generator)
            if batch.dtype == torch.uint8:
                batch = batch.float().div_(255)
            if self._normalize is not None:
                shift, scale = self._normalize
                batch = (batch - shift).mul_(scale)
            if isinstance(self.targets, Tensor):
                yield batch, self.targets[indices]
            else:
                yield batch, {task: target[indices] for task, target in self.targets.items()}


def crop_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image (B, C, H, W) moved by up to H / 8 pixels on a black ground, and mirrored with probability 1/2."""
    num_images, _, height, width = images.shape
    padding = height // _PADDING_RATIO
    # A view of all crops of all images; the index copies one of each: 128 images of 32 x 32 in 0.6 ms.
    crops = F.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    top, left = torch.randint(0, 2 * padding + 1, (2, num_images), generator=generator)
    chosen = crops[torch.arange(num_images), :, top, left]
    mirrored = torch.rand(num_images, generator=generator) < 0.5
    return torch.where(mirrored[:, None, None, None], chosen.flip(3), chosen)


def _affine(inputs: Inputs, normalize: tuple[Sequence[float], Sequence[float]]) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(list(values), dtype=torch.float32) for values in normalize)
    num_channels = inputs[torch.arange(1)].shape[1]
    if len(mean) != num_channels or len(std) != num_channels:
        raise ValueError(
            f"images have {num_channels} channels, but mean and std have {len(mean)} and {len(std)} values"
        )
    if not (torch.isfinite(mean).all() and torch.isfinite(std).all() and (std > 0).all()):
        raise ValueError(f"mean {mean.tolist()} and std {std.tolist()} must be finite, and std above 0")
    return mean.view(-1, 1, 1), (1 / std).view(-1, 1, 1)
