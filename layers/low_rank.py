"""Thin layers in a row that stand for one wide layer: what a factorisation of its weight puts in its place.

Each is built by sizes (random weights) or from given factors, works like the layer of `torch.nn` that it stands for and
has its sizes, and multiplies back into that layer by `merge()`. Convolutions are in :mod:`layers.low_rank_conv`.
"""

from typing import Self

import torch
from torch import Tensor, nn

from layers._checks import check_positive, check_shape

Layer = nn.Linear | nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d


class LowRankLinear(nn.Module):
    """Two thin linear layers: y = B (A x) + bias with A (rank, in_features) and B (out_features, rank).

    Input (*, in_features), output (*, out_features). Children `reduce` (A, no bias) and `expand` (B and the bias). rank
    (in + out) weights in place of in out. Source: Denil et al.: Predicting Parameters in Deep Learning (2013), section
    2; Xue et al.: Restructuring of Deep Neural Network Acoustic Models with Singular Value Decomposition (2013).

    Raises ValueError for sizes below 1, factors that do not fit, and an input whose last axis is not in_features.

    >>> layer = LowRankLinear(6, 4, rank=2)
    >>> x = torch.ones(3, 6)
    >>> torch.allclose(layer(x), layer.merge()(x), atol=1e-6)
    True
    """

    def __init__(self, in_features: int, out_features: int, rank: int, *, bias: bool = True) -> None:
        super().__init__()
        check_positive(self, in_features=in_features, out_features=out_features, rank=rank)
        self.reduce = nn.Linear(in_features, rank, bias=False)
        self.expand = nn.Linear(rank, out_features, bias=bias)

    @classmethod
    def from_factors(cls, expand: Tensor, reduce: Tensor, bias: Tensor | None = None) -> Self:
        """The layer of weight `expand @ reduce`, (out_features, rank) and (rank, in_features); bias (out_features,)."""
        check_shape(cls.__name__, "expand", expand, ("out_features", "rank"))
        check_shape(cls.__name__, "reduce", reduce, (expand.shape[1], "in_features"))
        layer = cls(reduce.shape[1], expand.shape[0], expand.shape[1], bias=bias is not None)
        give(layer.reduce, reduce)
        give(layer.expand, expand, bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        check_shape(self, "x", x, ("...", self.reduce.in_features))
        return self.expand(self.reduce(x))

    @property
    def in_features(self) -> int:
        """As of the layer that it stands for."""
        return self.reduce.in_features

    @property
    def out_features(self) -> int:
        """As of the layer that it stands for."""
        return self.expand.out_features

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """One linear layer that computes the same."""
        merged = nn.Linear(self.reduce.in_features, self.expand.out_features, bias=self.expand.bias is not None)
        give(merged, self.expand.weight @ self.reduce.weight, self.expand.bias)
        return merged


class LowRankEmbedding(nn.Module):
    """A thin table and a linear layer: y = B T[i] with T (num_embeddings, rank) and B (embedding_dim, rank).

    Input (*) of indices, output (*, embedding_dim). Children `table` and `expand` (no bias). rank (num_embeddings +
    embedding_dim) weights in place of num_embeddings embedding_dim. The row of `padding_idx` is zero and learns
    nothing. Source: Lan et al.: ALBERT: A Lite BERT for Self-supervised Learning of Language Representations (2020),
    section 3.1.

    Raises ValueError for sizes below 1 and factors that do not fit.

    >>> layer = LowRankEmbedding(100, 16, rank=4)
    >>> i = torch.tensor([[3, 5, 99]])
    >>> torch.allclose(layer(i), layer.merge()(i), atol=1e-6)
    True
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, rank: int, *, padding_idx: int | None = None) -> None:
        super().__init__()
        check_positive(self, num_embeddings=num_embeddings, embedding_dim=embedding_dim, rank=rank)
        self.table = nn.Embedding(num_embeddings, rank, padding_idx=padding_idx)
        self.expand = nn.Linear(rank, embedding_dim, bias=False)

    @classmethod
    def from_factors(cls, table: Tensor, expand: Tensor, *, padding_idx: int | None = None) -> Self:
        """The layer of embeddings `table @ expand.T`, (num_embeddings, rank) and (embedding_dim, rank)."""
        check_shape(cls.__name__, "table", table, ("num_embeddings", "rank"))
        check_shape(cls.__name__, "expand", expand, ("embedding_dim", table.shape[1]))
        layer = cls(table.shape[0], expand.shape[0], table.shape[1], padding_idx=padding_idx)
        give(layer.table, table)
        give(layer.expand, expand)
        return layer

    def forward(self, indices: Tensor) -> Tensor:
        return self.expand(self.table(indices))

    @property
    def num_embeddings(self) -> int:
        """As of the layer that it stands for."""
        return self.table.num_embeddings

    @property
    def embedding_dim(self) -> int:
        """As of the layer that it stands for."""
        return self.expand.out_features

    @property
    def padding_idx(self) -> int | None:
        """As of the layer that it stands for."""
        return self.table.padding_idx

    @torch.no_grad()
    def merge(self) -> nn.Embedding:
        """One table that gives the same."""
        table = self.table.weight @ self.expand.weight.T
        merged = nn.Embedding(table.shape[0], table.shape[1], padding_idx=self.table.padding_idx)
        give(merged, table)
        return merged


def give(layer: Layer, weight: Tensor, bias: Tensor | None = None) -> None:
    """Make these the parameters of `layer`, on their device and in their dtype."""
    layer.weight = nn.Parameter(weight.detach().clone().reshape(layer.weight.shape))
    if bias is not None and not isinstance(layer, nn.Embedding):
        check_shape(layer, "bias", bias, (layer.weight.shape[0],))
        layer.bias = nn.Parameter(bias.detach().clone())
