"""Batches of sequences of different lengths: each is filled up to the longest, and the lengths say what counts.

Everywhere in `layers`, `lengths` are integers (batch,) from 1 to the number of steps, on any device; None means that
all steps count. What stands in the filling never influences a result.
"""

import torch
from torch import Tensor

from layers._checks import check_shape


def padding_mask(lengths: Tensor, num_steps: int) -> Tensor:
    """True where a step belongs to its sequence: lengths (batch,) -> (batch, num_steps).

    >>> padding_mask(torch.tensor([1, 3]), 3)
    tensor([[ True, False, False],
            [ True,  True,  True]])
    """
    check_shape("padding_mask", "lengths", lengths, ("batch",))
    return torch.arange(num_steps, device=lengths.device) < lengths[:, None]
