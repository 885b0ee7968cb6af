"""Random states that follow from a key alone, and that leave the caller's as they were."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_everything(*key: object) -> int:
    """Seeds the global generators of Python, NumPy and PyTorch from ``key``, whatever ran before; returns the seed."""
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "little")
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - what the caller's training may draw from
    torch.manual_seed(seed)
    return seed


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """The global generators are after the block, or the decorated function, as they were before it."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global state is what is kept
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
