"""scikit-learn's digits: 1,797 images of 8 x 8 grey pixels, part of the installed package."""

from __future__ import annotations

import torch

from mtl.data.images import ImageData, Split, carve


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
