"""Whether two results agree."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Of the largest number in a result: rounding errors of deep networks, whose sums are taken in another order.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def difference(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> str | None:
    """What is different beyond rounding, or None."""
    if len(expected) != len(actual):
        return f"{len(actual)} tensors instead of {len(expected)}"
    for wanted, found in zip(expected, actual, strict=True):
        if wanted.shape != found.shape or wanted.dtype != found.dtype:
            return f"{found.dtype} {tuple(found.shape)} instead of {wanted.dtype} {tuple(wanted.shape)}"
        if wanted.dtype not in TOLERANCE:
            if not torch.equal(wanted, found):
                return "other integers" if not wanted.is_complex() else "other numbers"
            continue
        finite = wanted.isfinite()
        if not torch.equal(wanted[~finite].nan_to_num(), found[~finite].nan_to_num()):
            return "infinite or undefined numbers in other places"
        error = (wanted - found)[finite].abs().double()
        scale = wanted[finite].abs().double()
        if error.numel() and not error.max() <= TOLERANCE[wanted.dtype] * max(float(scale.max()), 1e-30):
            return f"an error of {float(error.max()):.1e} where numbers reach {float(scale.max()):.1e}"
    return None
