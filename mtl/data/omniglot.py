"""Omniglot: hand-drawn characters of many alphabets, each alphabet a task (Lake et al. 2015)."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mtl.data.tasks import TaskData, of_rows
from mtl.seeding import epoch_seed


def omniglot(
    folder: str | os.PathLike[str],
    *,
    train: int = 10,
    validation: int = 3,
    image_size: int = 28,
    seed: int = 0,
) -> dict[str, TaskData]:
    """Each alphabet as the data of a task: images (N, 1, H, W) in bytes, ink white on black, a class per character.

    Args:
        folder: holds the published archives (``images_*.zip``), or folders ``.../ALPHABET/CHARACTER/*.png`` unpacked
            from them; a drawing that occurs twice (by file name) counts once
        train: drawings of each character to train on, >= 1; the first ones of the order that ``seed`` gives, so that a
            larger number contains a smaller one
        validation: drawings of each character to choose by, the ones after; what is left is for the test
        image_size: pixels a side; the published drawings have 105
        seed: of the order of each character's drawings

    Raises:
        ValueError: for a folder without drawings, and characters with too few of them.
    """
    if train < 1 or validation < 0 or image_size < 1:
        raise ValueError(f"train={train}, validation={validation}, image_size={image_size} must be at least 1, 0 and 1")
    drawings = _drawings(Path(folder))
    tasks: dict[str, TaskData] = {}
    for alphabet, characters in sorted(drawings.items()):
        images: list[Tensor] = []
        labels: list[int] = []
        parts: tuple[list[int], ...] = ([], [], [])
        for label, (character, files) in enumerate(sorted(characters.items())):
            if len(files) <= train + validation:
                raise ValueError(
                    f"{alphabet}/{character} has {len(files)} drawings: train={train} and validation={validation} "
                    "leave none for the test"
                )
            generator = torch.Generator().manual_seed(epoch_seed(seed, 1000 * len(tasks) + label))
            order = (torch.randperm(len(files), generator=generator) + len(images)).tolist()
            for part, chosen in zip(
                parts, (order[:train], order[train : train + validation], order[train + validation :]), strict=True
            ):
                part.extend(chosen)
            images += [_shrink(files[name], image_size) for name in sorted(files)]
            labels += [label] * len(files)
        rows = [torch.tensor(part, dtype=torch.long) for part in parts]
        tasks[alphabet] = of_rows(
            torch.stack(images), {alphabet: torch.tensor(labels)}, {alphabet: len(characters)}, rows
        )
    return tasks


def _drawings(folder: Path) -> dict[str, dict[str, dict[str, Image.Image]]]:
    """alphabet -> character -> file name -> image."""
    found: dict[str, dict[str, dict[str, Image.Image]]] = {}
    for path, image in (*_in_archives(folder), *_in_folders(folder)):
        *_, alphabet, character, name = path.parts
        if "." in alphabet:
            raise ValueError(f"{folder}: alphabet {alphabet!r} must not contain '.', since it names a task: rename it")
        found.setdefault(alphabet, {}).setdefault(character, {})[name] = image
    if not found:
        raise ValueError(f"{folder} holds no archives images_*.zip and no folders ALPHABET/CHARACTER/ with PNG files")
    return found


def _in_archives(folder: Path) -> Iterator[tuple[PurePosixPath, Image.Image]]:
    for file in sorted(folder.glob("images_*.zip")):
        try:
            with zipfile.ZipFile(file) as archive:
                for name in sorted(archive.namelist()):
                    path = PurePosixPath(name)
                    if path.suffix == ".png" and len(path.parts) >= 3:
                        yield path, _open(io.BytesIO(archive.read(name)), f"{file}: {name}")
        except (zipfile.BadZipFile, OSError) as error:
            raise ValueError(f"{file} cannot be read as a zip archive: {error}") from None


def _in_folders(folder: Path) -> Iterator[tuple[PurePosixPath, Image.Image]]:
    for file in sorted(folder.rglob("*/*/*.png")):
        yield PurePosixPath(file.relative_to(folder).as_posix()), _open(file, str(file))


def _open(file: io.BytesIO | Path, name: str) -> Image.Image:
    try:
        with Image.open(file) as image:
            return image.convert("L")
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{name} cannot be read as an image ({error}): repair or remove it") from None


def _shrink(image: Image.Image, size: int) -> Tensor:
    # The mean over each pixel's area: thin strokes become grey, but do not break.
    pixels = np.array(image.resize((size, size), Image.Resampling.BOX))
    return torch.from_numpy(255 - pixels).unsqueeze(0)
