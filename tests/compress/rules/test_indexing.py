import pytest
import torch
from torch import nn

import compress
from tests.compress.helpers import Apply, assert_exact, between, frozen_reasons, image, tokens

ROWS = torch.tensor([0, 4, 2])
FIRST = torch.tensor([1, 0, 1])
ODD = torch.arange(9) % 2 == 0


def _put(x, key, values):
    y = x.clone()
    y[key] = values
    return y


# x has 11 channels of 9 x 7: the looked-up axis is a spatial one, the channels pass
FUNCTIONS = {
    "index_select": lambda x: x.index_select(2, ROWS),
    "index": lambda x: x[:, :, ROWS],
    "index two axes": lambda x: x[:, :, ROWS, ROWS].unsqueeze(-1),
    "index apart": lambda x: x.permute(2, 1, 0, 3)[ROWS, :, torch.tensor([1, 0, 1])].permute(0, 1, 2).unsqueeze(-1),
    "gather": lambda x: x.gather(3, torch.zeros_like(x, dtype=torch.int64)),
    "scatter": lambda x: x.scatter(3, torch.zeros_like(x, dtype=torch.int64), x * 2),
    "scatter_add": lambda x: x.scatter_add(3, torch.ones_like(x, dtype=torch.int64), x),
    "index_add": lambda x: x.index_add(2, ROWS, x[:, :, :3] * 2),
    "index_copy": lambda x: x.index_copy(2, ROWS, x[:, :, 3:6] * 2),
    "index_fill": lambda x: x.index_fill(2, ROWS, 0.3),
    "index with a mask": lambda x: x[:, :, ODD],
    "index_put": lambda x: _put(x, (slice(None), slice(None), ROWS), x[:, :, :3] * 2),
    "index_put, broadcast": lambda x: _put(x, (slice(None), slice(None), ROWS), x[:, :, :1] * 2),
    "index_put, one number": lambda x: _put(x, (slice(None), slice(None), ROWS), torch.tensor(0.3, dtype=x.dtype)),
    "index_put apart": lambda x: _put(x, (FIRST, slice(None), ROWS), x[0, :, :3, 0].T[:, :, None] * 2),
    "index_put with a mask": lambda x: _put(x, (slice(None), slice(None), ODD), x[:, :, :5] * 2),
}


def _embedding(**options) -> nn.Module:
    return nn.Sequential(nn.Embedding(13, 11, **options), nn.Linear(11, 7), nn.ReLU(), nn.Linear(7, 5))


class Positions(nn.Module):
    """Token and position embeddings are added."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position, self.head = nn.Embedding(13, 11), nn.Embedding(7, 11), nn.Linear(11, 5)

    def forward(self, x):
        return self.head(self.token(x) + self.position(torch.arange(x.shape[1])))


def _bag(frozen: bool = False, **options) -> nn.Module:
    model = nn.Sequential(nn.EmbeddingBag(13, 11, **options), nn.Linear(11, 7), nn.ReLU(), nn.Linear(7, 5))
    model[0].requires_grad_(not frozen)
    return model


CASES = {name: (lambda f=f: (between(f), image())) for name, f in FUNCTIONS.items()}
CASES |= {
    "embedding": lambda: (_embedding(), tokens()),
    "embedding with padding": lambda: (_embedding(padding_idx=0), tokens()),
    "positions": lambda: (Positions(), tokens()),
    "bags": lambda: (_bag(), tokens()),
    "maxima of bags, frozen": lambda: (_bag(frozen=True, mode="max"), tokens()),
    "sums of bags with padding": lambda: (_bag(mode="sum", padding_idx=0), tokens()),
}


@pytest.mark.parametrize("name", CASES)
def test_removal_equals_masking(name: str) -> None:
    assert_exact(*CASES[name]())


def test_the_vocabulary_stays() -> None:
    result = assert_exact(_embedding(), tokens())
    assert result.model[0].num_embeddings == 13
    assert result.model[0].embedding_dim == result.model[0].weight.shape[1] < 11
    assert "looks up rows" in frozen_reasons(compress.trace(_embedding(), tokens()), "0.weight")


PICKS = {
    "index_select": lambda x: x.index_select(1, torch.tensor([3, 1, 2])),
    "index": lambda x: x[:, torch.tensor([3, 1, 2])],
    "gather": lambda x: x.gather(1, torch.zeros(2, 3, 9, 7, dtype=torch.int64)),
}


@pytest.mark.parametrize("name", PICKS)
def test_positions_picked_along_the_channels_freeze_them(name: str) -> None:
    graph = compress.trace(between(PICKS[name], 11, 3), image())
    assert not graph.groups
    assert "picks positions" in frozen_reasons(graph, "0.weight")


def test_indices_that_are_activations_freeze_nothing_else() -> None:
    """An index computed from one branch picks from another: only the indexed axis stays."""
    model = nn.Sequential(
        nn.Conv2d(3, 11, 1),
        nn.Conv2d(11, 7, 1),
        Apply(lambda _, x: x[:, :, x.mean((0, 1, 3)).argsort()]),
        nn.Conv2d(7, 5, 1),
    )
    assert any(g.name == "0.weight" for g in compress.trace(model, image()).groups)
