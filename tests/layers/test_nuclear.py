import numpy as np
import pytest
import torch
from torch import Tensor

from layers import nuclear
from layers.nuclear import effective_rank, nuclear_norms, shrinkages, singular_values


def gradient_by_svd(matrix: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(matrix.detach().double(), full_matrices=False)
    return left @ right


def gradient(matrix: Tensor) -> Tensor:
    matrix = matrix.detach().requires_grad_()
    return torch.autograd.grad(nuclear_norms([matrix]).sum(), matrix)[0]


def of_rank(rank: int, rows: int = 6, columns: int = 40, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.randn(rows, rank, dtype=torch.float64) @ torch.randn(rank, columns, dtype=torch.float64)).to(dtype)


@pytest.fixture(autouse=True)
def _seed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(nuclear, "_ELEMENTS_PER_CHUNK", 50)  # several chunks in every test


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (5, 5), (1, 7), (7, 1)])
def test_value_and_gradient_of_full_rank_are_those_of_svd(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(nuclear_norms([matrix])[0], torch.linalg.svdvals(matrix).sum())
    torch.testing.assert_close(gradient(matrix), gradient_by_svd(matrix), atol=1e-7, rtol=0)


def test_gradient_agrees_with_finite_differences_for_several_matrices_at_once() -> None:
    weight = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    factors = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda w: nuclear_norms([w, w[:2], w.T * 3]) @ factors, weight)


def test_gradient_has_the_rank_of_the_matrix_and_is_zero_at_zero() -> None:
    # autograd through svd gives sqrt(6) here, whatever the rank
    assert abs(float(gradient(of_rank(2)).norm()) - 2**0.5) < 1e-6
    assert abs(float(gradient(of_rank(2, dtype=torch.float32)).norm()) - 2**0.5) < 1e-5
    assert float(gradient(torch.zeros(4, 30)).abs().max()) == 0


@pytest.mark.parametrize("difference", [1e-2, 1e-4])
def test_gradient_of_nearly_identical_models_in_float32(difference: float) -> None:
    matrix = torch.randn(1, 3000) + difference * torch.randn(8, 3000)
    error = gradient(matrix) - gradient_by_svd(matrix)
    assert float(error.norm() / 8**0.5) < 1e-4


def test_what_rounding_makes_of_equal_models_is_no_difference() -> None:
    weights = torch.randn(1, 500).repeat(5, 1) * torch.rand(5, 500).add(1).div(1e8).add(1)
    deviations = weights - weights.mean(dim=0)
    matrix = deviations.requires_grad_()
    norms = nuclear_norms([matrix], [torch.linalg.vector_norm(weights)])
    assert float(torch.autograd.grad(norms.sum(), matrix)[0].abs().max()) == 0


def test_bfloat16_weights_and_autocast() -> None:
    matrix = torch.randn(5, 200).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = gradient(matrix)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.double(), gradient_by_svd(matrix), atol=2e-3, rtol=1e-2)
    assert nuclear_norms([matrix]).dtype == torch.float32


@pytest.mark.parametrize("shape", [(5, 30), (30, 5)])
@pytest.mark.parametrize("threshold", [0.0, 3.0, 1e3])
def test_proximal_map_is_soft_thresholding_of_singular_values(shape: tuple[int, int], threshold: float) -> None:
    matrix = torch.randn(shape, dtype=torch.float64)
    left, values, right = np.linalg.svd(matrix.numpy(), full_matrices=False)
    expected = left @ np.diag(np.maximum(values - threshold, 0)) @ right
    result = matrix - shrinkages([matrix], [threshold])[0]
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-12)


def test_singular_values_fall_and_are_numpy_s() -> None:
    matrices = [torch.randn(4, 20, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64)]
    for matrix, values in zip(matrices, singular_values(matrices), strict=True):
        np.testing.assert_allclose(values.numpy(), np.linalg.svd(matrix.numpy(), compute_uv=False), atol=1e-9)


def test_weights_that_are_not_finite_are_named() -> None:
    with pytest.raises(ValueError, match="not finite"):
        nuclear_norms([torch.full((3, 4), torch.nan)])


def test_effective_rank_of_equal_singular_values_is_their_number() -> None:
    assert effective_rank(torch.tensor([3.0, 3.0, 3.0, 0.0])) == pytest.approx(3)
    assert 1 < effective_rank(torch.tensor([3.0, 0.1])) < 2
    assert effective_rank(torch.zeros(3)) == 0
