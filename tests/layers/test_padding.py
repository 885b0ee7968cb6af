import pytest
import torch

from layers import padding_mask


def test_mask_is_true_where_a_step_counts() -> None:
    mask = padding_mask(torch.tensor([3, 1, 2]), 4)
    assert mask.tolist() == [[True, True, True, False], [True, False, False, False], [True, True, False, False]]


def test_lengths_are_a_vector() -> None:
    with pytest.raises(ValueError, match=r"padding_mask: lengths must have shape \(batch,\).*\(1, 2\)"):
        padding_mask(torch.tensor([[3, 1]]), 4)
