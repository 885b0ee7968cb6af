"""Embeddings: Eckart-Young for the table weighted by how often tokens occur, and the model that comes out."""

import numpy as np
import pytest
import torch
from torch import nn

import compress
from compress import Budget, PruneError
from compress.factorize.tables import UNSEEN, Table
from layers.low_rank import LowRankEmbedding
from tests.compress.helpers import assert_same


class Tagger(nn.Module):
    def __init__(self, size: int = 200, padding: int | None = None) -> None:
        super().__init__()
        self.tokens = nn.Embedding(size, 24, padding_idx=padding)
        self.places, self.tied = nn.Embedding(16, 24), nn.Embedding(50, 24)
        self.head, self.again = nn.Linear(24, 10), nn.Linear(24, 50, bias=False)
        self.again.weight = self.tied.weight

    def forward(self, i):
        x = self.tokens(i) + self.places(torch.arange(i.shape[1])) + self.tied(i % 50)
        return self.head(x.tanh()).mean(1), self.again(x).mean(1)


def tokens(number: int = 3, size: int = 200) -> list[torch.Tensor]:
    """Low numbers occur most."""
    generator = torch.Generator().manual_seed(0)
    return [(torch.rand(32, 16, generator=generator).pow(4) * size).long() for _ in range(number)]


def test_errors_are_those_of_the_tokens_that_occur_and_none_of_their_rank_is_better() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(60, 9, dtype=torch.float64, generator=generator)
    counts = torch.randint(0, 50, (60,), generator=generator) ** 2
    table = Table.of(weight, counts)
    frequency = ((counts + UNSEEN).double() / (counts + UNSEEN).double().sum()).numpy()
    mean = frequency @ weight.numpy()
    spread = frequency @ ((weight.numpy() - mean) ** 2).sum(1)
    singular = np.linalg.svd(np.sqrt(frequency)[:, None] * weight.numpy(), compute_uv=False)
    left, values, right = np.linalg.svd(weight.numpy(), full_matrices=False)
    for rank in range(1, 10):
        (thin, expand), error = table.factors(rank)
        lost = frequency @ ((weight - thin @ expand.T).numpy() ** 2).sum(1) / spread
        assert error == pytest.approx(lost, rel=1e-9, abs=1e-12)
        assert error == pytest.approx((singular[rank:] ** 2).sum() / spread, rel=1e-9, abs=1e-12)
        raw = frequency @ ((weight.numpy() - (left[:, :rank] * values[:rank]) @ right[:rank]) ** 2).sum(1) / spread
        assert error <= raw * (1 + 1e-9) + 1e-12
    with pytest.raises(PruneError, match="rank 10 is not between 1 and 9"):
        table.factors(10)


def test_tokens_that_never_occur_and_tables_of_zeros_come_out_finite() -> None:
    for weight in (torch.randn(20, 5), torch.zeros(20, 5)):
        for counts in (torch.zeros(20), torch.eye(20)[0] * 1e9):
            (thin, expand), error = Table.of(weight, counts).factors(3)
            assert thin.isfinite().all()
            assert expand.isfinite().all()
            assert 0 <= error <= 1e30
    with pytest.raises(PruneError, match="finite"):
        Table.of(torch.full((3, 3), float("nan")))


def test_a_budget_of_parameters_makes_tables_thin_and_one_of_macs_does_not(tmp_path) -> None:
    torch.manual_seed(0)
    model, data = Tagger(padding=0).eval(), tokens()
    result = compress.factorize(model, data[0][:1], budget=Budget(params=0.5), calibration=data)
    assert 0.45 < result.after.params / result.before.params <= 0.5
    small = result.model.tokens
    assert isinstance(small, LowRankEmbedding)
    assert small.table.padding_idx == 0
    assert small.table.weight[0].abs().max() == 0
    assert "shared" in result.left["tied.weight"]
    compress.save(result, tmp_path / "small.safetensors")
    loaded = compress.load(Tagger(padding=0).eval(), tmp_path / "small.safetensors")
    for found, expected in zip(loaded(data[0]), result.model(data[0]), strict=True):
        assert torch.equal(found, expected)
    back = compress.unfactorize(loaded)
    assert isinstance(back.tokens, nn.Embedding)
    with torch.no_grad():
        torch.testing.assert_close(back.tokens(data[0]), loaded.tokens(data[0]), rtol=1e-4, atol=1e-5)
    by_macs = compress.factorize(model, data[0][:1], budget=Budget(macs=0.9), calibration=data, recover=False)
    assert isinstance(by_macs.model.tokens, nn.Embedding)


def test_full_rank_changes_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 3)).double()
    plan = compress.FactorPlan((compress.Factor("0", "embedding", (8,), "", (30, 8), 0.0),))
    assert_same(compress.apply(model, compress.FactorPlan.from_json(plan.to_json())), model, tokens(1, 30)[0], 1e-10)


def test_a_table_that_is_read_in_another_way_says_so() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.capped = nn.Embedding(30, 24), nn.Embedding(30, 24, max_norm=1.0)
            self.line = nn.Linear(24, 24)

        def forward(self, i):
            return self.line(nn.functional.embedding(i, self.table.weight) + self.capped(i)).mean(1)

    data = [tokens(1, 30)[0]]
    result = compress.factorize(Other(), data[0][:2], budget=Budget(params=0.9), calibration=data, recover=False)
    assert "not read through the call" in result.left["table.weight"]
    assert "renormalised" in result.left["capped.weight"]
