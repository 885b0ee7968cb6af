"""Memory that was freed goes back to the system."""

import ctypes
import sys
from functools import cache
from typing import Any


def trim_heap() -> None:
    """Give back what is free, where the C library can (glibc).

    Every thread allocates from a heap of its own and keeps what it frees there. With the activations of many batches in
    as many threads that comes to a multiple of what is in use (ResNet-20, 2,048 images: 3.9 GB instead of 2).
    """
    if (trim := _malloc_trim()) is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
