"""Pooling against numpy, and what padded sequences must not change."""

import numpy as np
import pytest
import torch
from torch import Tensor

import layers
from layers.pool import k_max

LENGTHS = torch.tensor([9, 4, 1])


def k_max_by_hand(x: np.ndarray, k: int, lengths: list[int]) -> np.ndarray:
    result = np.zeros((*x.shape[:2], k))
    for n, c in np.ndindex(x.shape[:2]):
        sequence = x[n, c, : lengths[n]]
        best = np.sort(np.argsort(-sequence, kind="stable")[:k])
        result[n, c, : len(best)] = sequence[best]
    return result


@pytest.mark.parametrize("k", [1, 2, 5, 9, 12])
@pytest.mark.parametrize("padded", [False, True])
def test_k_max_keeps_the_order(k: int, padded: bool) -> None:
    x = torch.randn(3, 5, 9, dtype=torch.float64)
    found = layers.KMaxOverTime(k)(x, LENGTHS if padded else None)
    lengths = LENGTHS.tolist() if padded else [9] * 3
    np.testing.assert_array_equal(found.numpy(), k_max_by_hand(x.numpy(), k, lengths))
    assert torch.equal(found, k_max(x, k, LENGTHS if padded else None))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_of_equal_values_the_first_are_taken(k: int) -> None:
    x = torch.randn(3, 40, 9, dtype=torch.float64).relu().round()
    found = layers.KMaxOverTime(k)(x, LENGTHS)
    np.testing.assert_array_equal(found.numpy(), k_max_by_hand(x.numpy(), k, LENGTHS.tolist()))


def test_gradient_of_k_max_goes_to_the_largest() -> None:
    x = torch.tensor([[[1.0, 5.0, 2.0, 7.0, 9.0]]], requires_grad=True)
    (layers.KMaxOverTime(2)(x, torch.tensor([4])) * torch.tensor([2.0, 3.0])).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[[0, 2, 0, 3, 0]]]


POOLS = {
    "max": lambda: layers.PoolOverTime("max"),
    "average": lambda: layers.PoolOverTime("average"),
    "k-max": lambda: layers.KMaxOverTime(3),
}


@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
def test_the_filling_does_not_matter(pool) -> None:
    x = torch.randn(3, 5, 9, dtype=torch.float64)
    found = pool()(x, LENGTHS)
    for n, length in enumerate(LENGTHS.tolist()):
        alone = pool()(x[n : n + 1, :, :length])
        torch.testing.assert_close(found[n : n + 1], alone, rtol=1e-14, atol=0)
        x[n, :, length:] = float("nan")
    assert torch.equal(pool()(x, LENGTHS), found)


@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (torch.tensor([9, 10, 1]), "lengths must be from 1 to 9, but are from 1 to 10"),
        (torch.tensor([9, 0, 1]), "lengths must be from 1 to 9, but are from 0 to 9"),
        (torch.tensor([9, 1]), r"lengths must have shape \(3,\).*has shape \(2,\)"),
        (torch.tensor([9.0, 2.0, 1.0]), "lengths must be a tensor of integers, but has dtype torch.float32"),
    ],
)
def test_bad_lengths(pool, lengths: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"OverTime: {message}"):
        pool()(torch.zeros(3, 5, 9), lengths)


def windows(x: np.ndarray, size: int, stride: int) -> np.ndarray:
    """All windows over the last axes but two, in new axes behind."""
    axes = tuple(range(2, x.ndim))
    found = np.lib.stride_tricks.sliding_window_view(x, (size,) * len(axes), axes)
    return found[(slice(None), slice(None), *(slice(None, None, stride),) * len(axes))]


@pytest.mark.parametrize("shape", [(2, 3, 9), (2, 3, 9, 7), (2, 3, 4, 5, 6)], ids=["1d", "2d", "3d"])
def test_local_and_global_pooling(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    kind, inner = f"{len(shape) - 2}d", tuple(range(len(shape), 2 * len(shape) - 2))
    cut = windows(x.numpy(), 3, 2)
    largest = getattr(layers, f"MaxPool{kind}")(3, 2)(x)
    np.testing.assert_array_equal(largest.numpy(), cut.max(inner))
    average = getattr(layers, f"AvgPool{kind}")(3, 2)(x)
    np.testing.assert_allclose(average.numpy(), cut.mean(inner), rtol=1e-12, atol=1e-14)
    axes = tuple(range(2, len(shape)))
    np.testing.assert_array_equal(layers.GlobalPool("max")(x).numpy(), x.numpy().max(axes))
    np.testing.assert_allclose(layers.GlobalPool()(x).numpy(), x.numpy().mean(axes), rtol=1e-12, atol=1e-14)


def test_window_larger_than_the_input() -> None:
    with pytest.raises(ValueError, match=r"MaxPool1d: input must be at least as large as the window \(4,\)"):
        layers.MaxPool1d(4)(torch.zeros(1, 2, 3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: layers.KMaxOverTime(0), "KMaxOverTime: k must be an integer of at least 1, but is 0"),
        (lambda: layers.PoolOverTime("mean"), "PoolOverTime: kind must be one of 'average', 'max', but is 'mean'"),
        (lambda: layers.GlobalPool("sum"), "GlobalPool: kind must be one of"),
    ],
)
def test_bad_arguments(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
