"""Randomness that depends on (seed, epoch) alone, so that a resumed epoch sees what it would have seen undisturbed."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def epoch_seed(seed: int, epoch: int) -> int:
    """A seed in [0, 2^63) for one epoch: neighbouring seeds and epochs give unrelated streams."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{epoch}".encode()).digest()[:8], "big") >> 1


def seed_epoch(seed: int, epoch: int) -> None:
    """Seed PyTorch, NumPy and Python for one epoch."""
    value = epoch_seed(seed, epoch)
    random.seed(value)
    np.random.seed(value % 2**32)  # noqa: NPY002  the global state is what users' transforms draw from
    torch.manual_seed(value)


def seed_data(data: Iterable[Any], seed: int, epoch: int) -> None:
    """Seed the data's own order for one epoch.

    ``data`` may have ``set_epoch`` (as ``mtl.data.TensorLoader`` and distributed samplers have), or be a ``DataLoader``
    whose sampler draws from the global state or from a generator of its own.
    """
    for part in (data, getattr(data, "sampler", None), getattr(data, "batch_sampler", None)):
        generator = getattr(part, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(epoch_seed(seed, epoch))
        if callable(set_epoch := getattr(part, "set_epoch", None)):
            set_epoch(epoch)


@contextmanager
def preserved_rng() -> Iterator[None]:
    """The random state of PyTorch (every device), NumPy and Python is the same after the block as before it."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
