"""scikit-learn's digits: 1,797 images of 8 x 8 grey pixels, part of the installed package; one task or several."""

from __future__ import annotations

import torch
from torch import Tensor

from mtl.data.images import ImageData, Split, carve
from mtl.data.tasks import Labelled, TaskData


def digits(validation: float = 0.1, test: float = 0.2, seed: int = 0) -> ImageData:
    """The digits 0 to 9 as float32 images (N, 1, 8, 8) in [0, 1], classes in proportion in every part.

    Args:
        validation: fraction, or number, of the training images
        test: fraction in (0, 1), or number, of all images
        seed: of the choice

    Raises:
        ValueError: for parts that cannot be had.
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    # Ink is counted in 4 x 4 blocks of a scan, 0 to 16.
    images = torch.from_numpy(raw.images).float().div_(16).unsqueeze(1)
    everything = Split(images, torch.from_numpy(raw.target).long())
    rest, held_out = carve(everything, test, seed)
    if held_out is None:
        raise ValueError("test is 0, but some images must be left to test on: give a fraction such as 0.2")
    train, validation_split = carve(rest, validation, seed)
    return ImageData(
        train=train,
        validation=validation_split,
        test=held_out,
        class_names=tuple(str(digit) for digit in range(10)),
        mean=(0.0,),
        std=(1.0,),
    )


def digits_tasks(validation: float = 0.1, test: float = 0.2, seed: int = 0) -> TaskData:
    """Six questions about the same digits: images (N, 1, 8, 8), a label for each task.

    ``digit`` (10 classes), ``parity``, ``large`` (5 or more) and ``prime`` (2 classes each), ``remainder`` (of the
    division by 3, 3 classes), and ``ink``, a number: the mean over the pixels, standardised over the training images.

    Arguments and errors are those of ``digits``.
    """
    data = digits(validation, test, seed)
    assert isinstance(data.train.images, Tensor)
    ink = data.train.images.mean(dim=(1, 2, 3))
    center, scale = ink.mean(), ink.std()

    def labelled(split: Split) -> Labelled:
        digit = split.labels
        assert isinstance(split.images, Tensor)
        return Labelled(
            split.images,
            {
                "digit": digit,
                "parity": digit % 2,
                "large": (digit >= 5).long(),
                "prime": torch.isin(digit, torch.tensor([2, 3, 5, 7])).long(),
                "remainder": digit % 3,
                "ink": (split.images.mean(dim=(1, 2, 3)) - center) / scale,
            },
        )

    return TaskData(
        train=labelled(data.train),
        validation=None if data.validation is None else labelled(data.validation),
        test=labelled(data.test),
        num_outputs={"digit": 10, "parity": 2, "large": 2, "prime": 2, "remainder": 3, "ink": 1},
    )
