"""Ranks by variational Bayes: known ranks under noise, and the threshold against the theory of random matrices."""

import pytest
import torch
from torch import nn

import compress
from compress import PruneError
from compress.factorize import vbmf_rank


def noisy(shape: tuple[int, int], rank: int, noise: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    low = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
    return low + noise * torch.randn(shape, generator=generator)


@pytest.mark.parametrize("shape", [(40, 120), (120, 40), (64, 64)])
@pytest.mark.parametrize("rank", [0, 1, 7])
@pytest.mark.parametrize("noise", [0.1, 1.0])
def test_finds_the_rank_under_noise_whatever_the_scale(shape: tuple[int, int], rank: int, noise: float) -> None:
    for seed in range(2):
        matrix = noisy(shape, rank, noise, seed)
        assert vbmf_rank(matrix) == rank
        assert vbmf_rank(1e-6 * matrix.T) == rank


def test_what_is_kept_lies_above_the_bulk_of_noise() -> None:
    """Noise alone reaches sigma (sqrt(M) + sqrt(L)) (Marchenko & Pastur): a signal below that cannot be told from it,
    one of twice that can."""
    rows, columns = 60, 200
    edge = rows**0.5 + columns**0.5
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(rows, columns, generator=generator)
    left, right = torch.linalg.qr(torch.randn(rows, 1, generator=generator))[0], torch.randn(1, columns)
    right = right / right.norm()
    assert vbmf_rank(noise + 0.3 * edge * left @ right) == 0
    assert vbmf_rank(noise + 2.0 * edge * left @ right) == 1


def test_without_noise_it_is_the_rank() -> None:
    assert vbmf_rank(noisy((30, 50), 4, 0.0, 0)) == 4
    assert vbmf_rank(torch.zeros(5, 6)) == 0
    for wrong in (torch.zeros(3), torch.full((2, 2), float("inf"))):
        with pytest.raises(PruneError, match="finite matrix"):
            vbmf_rank(wrong)


def test_factorize_takes_the_ranks_of_the_weights() -> None:
    model = nn.Sequential(nn.Conv2d(20, 30, 3, padding=1), nn.ReLU(), nn.Conv2d(30, 40, 1), nn.Flatten(1))
    model.append(nn.Linear(40 * 16, 32))
    with torch.no_grad():
        kernel = torch.einsum("oa,abyx,bi->oiyx", torch.randn(30, 4), torch.randn(4, 3, 3, 3), torch.randn(3, 20))
        model[0].weight.copy_(kernel + 0.05 * torch.randn(30, 20, 3, 3))
        model[2].weight.copy_(noisy((40, 30), 2, 0.1, 0)[:, :, None, None])
        model[4].weight.copy_(noisy((32, 640), 5, 0.1, 0))
    images = torch.randn(64, 20, 4, 4)
    result = compress.factorize(model, images[:1], energy="vbmf", calibration=[images], recover=False)
    assert {f.module: (f.kind, f.ranks) for f in result.plan.factors if f.kind != "spatial"} == {
        "0": ("tucker2", (3, 4)),
        "2": ("tucker2", (None, 2)),
        "4": ("linear", (5,)),
    }
