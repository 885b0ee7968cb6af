"""Structures that meet several rules at once: recurrent layers, attention whose scale is computed from sizes."""

import pytest
import torch
from torch import nn

import compress
from tests.compress.helpers import assert_exact


class Tagger(nn.Module):
    def __init__(self, layer: type[nn.RNNBase], *, bidirectional: bool, batch_first: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(31, 11)
        self.recurrent = layer(11, 13, num_layers=2, bidirectional=bidirectional, batch_first=batch_first)
        self.tags = nn.Linear(13 * (2 if bidirectional else 1), 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tags(self.recurrent(self.words(x))[0])


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_hidden_units_of_recurrent_layers_go_from_every_gate(
    layer: type[nn.RNNBase], bidirectional: bool, batch_first: bool
) -> None:
    model = Tagger(layer, bidirectional=bidirectional, batch_first=batch_first)
    result = assert_exact(model, torch.randint(0, 31, (3, 7)), budget=compress.Budget(params=0.5))
    assert result.model.recurrent.hidden_size < 13


class Attention(nn.Module):
    """Three projections, heads, and a scale that is computed while the model runs."""

    def __init__(self, width: int = 24, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.into = nn.Linear(7, width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.into(x).relu()
        batch, length, width = x.shape
        q, k, v = (
            layer(x).view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores = (q @ k.transpose(-2, -1)) * (width // self.heads) ** -0.5
        return self.out((scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(batch, length, width))


def test_heads_go_with_their_part_of_the_width_so_that_the_scale_stays() -> None:
    model = Attention()
    result = assert_exact(model, torch.randn(2, 9, 7))
    assert 1 <= result.model.heads < 4
    assert result.model.into.out_features == 6 * result.model.heads


def test_an_operator_that_mixes_concatenated_nothing_is_no_crash() -> None:
    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(5, 11), nn.Linear(11, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            nothing = torch.cat([x.new_zeros(0), x.new_zeros(0)])
            return self.second(self.first(x).relu()) + nothing.sum()

    result = assert_exact(Empty(), torch.randn(2, 5))
    assert result.model.first.out_features < 11
