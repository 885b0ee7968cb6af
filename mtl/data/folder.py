"""Images in ``train/CLASS/`` and ``test/CLASS/`` folders, and ``validation/CLASS/`` where there is one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torchvision.datasets import ImageFolder

from mtl.data.images import ImageData, Split, carve, channel_statistics, check_normalization

# Decoded images up to this much stay in memory, train and test together.
_MAX_BYTES_IN_MEMORY = 2 * 2**30
# The usual practice for photographs: the shorter side to 256 for a crop of 224 (Krizhevsky et al. 2012, section 2).
_RESIZE_RATIO = 256 / 224
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def image_folder(
    path: str | os.PathLike[str],
    *,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    validation: float = 0.1,
    seed: int = 0,
    progress: bool = True,
) -> ImageData:
    """Colour images of every type that Pillow reads, a class per folder, classes in alphabetical order.

    Images that all have one size (``image_size``, where it is given) and fit in 2 GiB are decoded into memory once.
    Otherwise each is decoded when its turn comes: shorter side to ``image_size * 256 / 224``, then the centre of
    ``image_size``.

    Args:
        path: the folder that holds ``train``, ``test`` and perhaps ``validation``
        image_size: pixels a side; needed where sizes differ or the images do not fit in memory
        mean: per channel on the scale of [0, 1]; default: measured on the training images in memory, else ImageNet's
        std: likewise
        validation: fraction, or number, of the training images; not used where there is a folder ``validation``
        seed: of that choice
        progress: a bar while decoding, where the output is a terminal

    Raises:
        ValueError: for a missing or empty folder, classes that differ, a class without images, and an image that
            cannot be read (naming it).
    """
    check_normalization(mean, std)
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size is {image_size}, but it must be at least 1")
    parts = ("train", "test", *(["validation"] if (Path(path) / "validation").is_dir() else []))
    folders = [_scan(Path(path), part) for part in parts]
    for part, folder in zip(parts[1:], folders[1:], strict=True):
        if differing := sorted(set(folders[0].classes) ^ set(folder.classes)):
            only = "train" if differing[0] in folders[0].classes else part
            raise ValueError(
                f"{path}: class {differing[0]!r} is in {only} only: train and {part} need the same class folders"
            )
    files = [[Path(file) for file, _ in folder.samples] for folder in folders]
    images = _decode_all(files, image_size, progress)
    if images is not None and (mean is None or std is None):
        mean, std = channel_statistics(images[0])
    labels = [torch.tensor(folder.targets) for folder in folders]
    if images is not None:
        splits = [Split(*pair) for pair in zip(images, labels, strict=True)]
    elif image_size is None:
        raise ValueError(f"{path}: the images differ in size or do not fit in memory: give image_size, for example 224")
    else:
        splits = [Split(_Files(names, image_size), part) for names, part in zip(files, labels, strict=True)]
    train, validation_split = (splits[0], splits[2]) if len(splits) > 2 else carve(splits[0], validation, seed)
    return ImageData(
        train,
        validation_split,
        splits[1],
        class_names=tuple(folders[0].classes),
        mean=tuple(mean or _IMAGENET_MEAN),
        std=tuple(std or _IMAGENET_STD),
    )


def _scan(path: Path, part: str) -> ImageFolder:
    folder = path / part
    if not folder.is_dir():
        raise ValueError(f"{path}: there is no folder {part!r} in it; images belong in {part}/CLASS/")
    if not any(entry.is_dir() for entry in folder.iterdir()):
        raise ValueError(f"{folder} holds no class folders; images belong in {part}/CLASS/")
    found = ImageFolder(os.fspath(folder), allow_empty=True)
    for index in set(range(len(found.classes))) - set(found.targets):
        raise ValueError(
            f"{folder / found.classes[index]} holds no images: add some, or remove the class from train and test"
        )
    return found


def _decode_all(files: Sequence[Sequence[Path]], image_size: int | None, progress: bool) -> list[Tensor] | None:
    """All images as bytes (N, 3, H, W); None if their sizes differ, are not the one wanted, or take too much memory."""
    first = _decode(files[0][0])
    wanted = first.shape if image_size is None else (image_size, image_size, 3)
    if first.shape != wanted or first.nbytes * sum(map(len, files)) > _MAX_BYTES_IN_MEMORY:
        return None
    images = [np.empty((len(part), *wanted), np.uint8) for part in files]
    console = Console()
    with Progress(console=console, transient=True, disable=not (progress and console.is_terminal)) as bar:
        task = bar.add_task("decoding images", total=sum(map(len, files)))
        for part, target in zip(files, images, strict=True):
            # No threads: 60,000 small images take 4 s in one, and longer in two that share the interpreter's lock.
            for row, file in enumerate(part):
                pixels = _decode(file)
                if pixels.shape != wanted:
                    return None
                target[row] = pixels
                if row % 256 == 0:
                    bar.update(task, advance=256)
    return [torch.from_numpy(part).permute(0, 3, 1, 2).contiguous() for part in images]


def _decode(file: Path, size: int | None = None) -> np.ndarray:
    """The pixels (H, W, 3) of a file; with a size, of its centre after resizing."""
    try:
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB") if size is None else _centre(image.convert("RGB"), size))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{file} cannot be read as an image ({reason}): repair or remove it") from None


def _centre(image: Image.Image, size: int) -> Image.Image:
    scale = round(size * _RESIZE_RATIO) / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))


@dataclass(frozen=True)
class _Files:
    """Images that are decoded on access; Pillow lets go of the interpreter's lock meanwhile, so threads help."""

    files: Sequence[Path]
    size: int

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, indices: Tensor, /) -> Tensor:
        chosen = [self.files[index] for index in indices.tolist()]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            pixels = list(pool.map(lambda file: _decode(file, self.size), chosen))
        return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
