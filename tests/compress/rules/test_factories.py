import pytest
import torch
from torch import nn

import compress
from tests.compress.helpers import Apply, assert_exact, between, frozen_reasons, image

aten = torch.ops.aten

# x has 11 channels of 9 x 7
FUNCTIONS = {
    "sizes from the shape": lambda x: x + torch.zeros(x.shape, dtype=x.dtype) + torch.ones(x.size(), dtype=x.dtype)
             + torch.full((x.size(0), x.size(1), 1, 1), 0.3, dtype=x.dtype),
    "new_": lambda x: x + x.new_zeros(x.shape) + x.new_ones(x.shape[1], 1, 1) + x.new_full((x.shape[1], 9, 7), 0.1),
    "empty": lambda x: torch.empty(x.shape, dtype=x.dtype).zero_() + x.new_empty(x.shape).fill_(0.1) + x,
    "empty by strides": lambda x: x + aten.new_empty_strided(x, x.shape, x.stride()).zero_()
             + torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).zero_()
             + torch.empty_permuted(x.shape, (0, 1, 2, 3), dtype=x.dtype).zero_(),
    "random": lambda x: x + 0 * torch.rand(x.shape, dtype=x.dtype) + 0 * torch.randn(x.shape, dtype=x.dtype),
    "ranges along space": lambda x: x + torch.arange(7, dtype=x.dtype) + torch.linspace(0, 1, 9, dtype=x.dtype)[:, None]
             + torch.eye(9, 7, dtype=x.dtype),
    "ranges by the shape of space": lambda x: x * torch.arange(x.shape[-1], dtype=x.dtype),
    "indices": lambda x: x + torch.tril_indices(3, 3).sum() + torch.triu_indices(3, 3).sum() + 0 * torch.randperm(7)
             + 0 * torch.randint(0, 5, (7,)),
    "a number as a tensor": lambda x: x * torch.scalar_tensor(2.0, dtype=x.dtype),
}  # fmt: skip

CASES = {name: (lambda f=f: (between(f), image())) for name, f in FUNCTIONS.items()}
CASES |= {
    "a stored width": lambda: (
        nn.Sequential(
            nn.Conv2d(3, 11, 1),
            Apply(lambda self, x: x + torch.ones(self.width, 1, 1, dtype=x.dtype), width=11),
            nn.Conv2d(11, 5, 1),
        ),
        image(),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_removal_equals_masking(name: str) -> None:
    assert_exact(*CASES[name]())


def test_a_stored_width_is_lowered() -> None:
    result = assert_exact(*CASES["a stored width"]())
    assert result.model[1].width == result.model[0].out_channels < 11


def test_a_width_written_in_code_freezes() -> None:
    graph = compress.trace(between(lambda x: x + torch.ones(11, 1, 1, dtype=x.dtype)), image())
    assert not graph.groups
    assert "fixed length" in frozen_reasons(graph, "0.weight")


def test_positions_along_the_channels_freeze_them() -> None:
    """Channel i is multiplied by i: which i a kept channel has would change."""
    graph = compress.trace(between(lambda x: x * torch.arange(x.shape[1], dtype=x.dtype)[:, None, None]), image())
    assert not graph.groups
