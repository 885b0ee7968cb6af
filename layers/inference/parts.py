"""A batch run in parts: activations of a few examples stay in the caches, where those of all go through memory.

On a Xeon with 2 MB of second-level cache, one thread and 32 images, mobilenet_v2 takes 430 ms at once and 225 ms in
parts of 2 to 8. The results of layers are too large then, besides, for what the allocator keeps: every page is new.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat

import torch
from torch import Tensor

from layers.clock import seconds
from layers.inference.runner import Runner

_TRYING = 1.0  # seconds of comparing sizes
_WORTH = 0.97  # of the time of the whole batch, or of larger parts, which take fewer calls


@dataclass(frozen=True)
class InParts:
    """``run`` of ``size`` examples at a time or up to twice as many; ``batched`` says which tensors hold them."""

    run: Runner
    batched: tuple[bool, ...]
    size: int

    def __call__(self, *tensors: Tensor) -> Sequence[Tensor]:
        count = batch_size(tensors, self.batched) // self.size
        if count < 2:
            return self.run(*tensors)
        each = [x.tensor_split(count) if held else repeat(x) for x, held in zip(tensors, self.batched, strict=True)]
        results = [self.run(*part) for part in zip(*each, strict=False)]
        return [torch.cat(values) for values in zip(*results, strict=True)]


def best_size(run: Runner, tensors: Sequence[Tensor], batched: tuple[bool, ...]) -> int:
    """How many examples at a time take the least time: the whole batch, or a half, a quarter and so on.

    Never one: a graph for any batch may treat that differently.
    """
    length = batch_size(tensors, batched)
    sizes = [length >> halvings for halvings in range(length.bit_length()) if length >> halvings > 1]
    runs = {str(size): partial(run, *first_examples(tensors, batched, size)) for size in sizes}
    for warm_up in runs.values():
        warm_up()
    times = seconds(runs, tensors[0].device, _TRYING) if len(runs) > 1 else {}
    best = length
    for size in sizes[1:]:
        if times[str(size)] / size < _WORTH * times[str(best)] / best:
            best = size
    return best


def batch_size(tensors: Sequence[Tensor], batched: tuple[bool, ...]) -> int:
    """The number of examples."""
    return len(tensors[batched.index(True)])


def first_examples(tensors: Sequence[Tensor], batched: tuple[bool, ...], size: int) -> list[Tensor]:
    """The tensors of a batch of the first ``size`` examples."""
    return [x[:size] if held else x for x, held in zip(tensors, batched, strict=True)]
