"""Attention of fewer numbers a head: the products that its weights only occur in are factorised, not the weights.

Queries and keys meet in q^T k alone, and values reach the output through W_o v alone. With a change of basis of each
head, q -> T q and k -> T^-T k (v -> T v and W_o -> W_o T^-1), nothing is changed; in the basis where the singular
vectors of the whitened product lie, the first r numbers of a head are the best r there are, and the others are left
out. For second moments A = L L^T of the queries and B = M M^T of the keys, the scores lose least of their squares (over
all pairs) by the truncated SVD of L^T M; keys count without their mean, which adds the same to all scores of a query,
and softmax does not see it. For second moments of what a head sends to the output, the output loses least by that of
W_o L. Source: Wang et al. 2025, "SVD-LLM", section 3 (whitening); Bhojanapalli et al. 2020, "Low-rank bottleneck in
multi-head attention models", section 2 (heads of fewer numbers).

Legend: H heads, D numbers a head, E outputs, r and s ranks of queries and keys and of values. All float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from compress.errors import PruneError
from layers.attention import LowRankAttention

LEVEL = 1e-8  # of the largest second moment: directions below count as if they were there so little


@dataclass(frozen=True)
class Heads:
    """The weights of an attention by head, and second moments of what they give.

    ``query``, ``key``, ``value`` (H, D, inputs + 1) have the bias as the last column, ``output`` is (E, H, D).
    ``queries``, ``keys`` and ``sent`` (H, D, D) are second moments of what meets in the scores (up to their scale), and
    of what enters ``output``; ``importance`` (E,) is what a squared error of one of each output counts.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    queries: Tensor
    keys: Tensor
    sent: Tensor
    importance: Tensor

    @staticmethod
    def of(layer: nn.MultiheadAttention, known: "Moments | None" = None) -> "Heads":
        """Of a layer; as if its inputs were white where nothing is known of them.

        Raises:
            PruneError: numbers are not finite.
        """
        query, key, value = (_by_head(*part, layer.num_heads) for part in _projections(layer))
        weight = layer.out_proj.weight.detach().double().cpu()
        output = weight.unflatten(1, (layer.num_heads, -1))
        if known is None:
            queries, keys, sent = (rows @ rows.mT for rows in (query, key, value))
            known = Moments(queries, keys, sent, weight.new_ones(len(weight)))
        found = Heads(query, key, value, output, known.queries, known.keys, known.sent, known.importance)
        if not all(bool(tensor.isfinite().all()) for tensor in vars(found).values()):
            raise PruneError("the weights of an attention, and what they give, must be finite")
        return found

    @property
    def full_rank(self) -> int:
        """D."""
        return self.query.shape[1]

    @cached_property
    def scores_basis(self) -> tuple[Tensor, Tensor, Tensor]:
        """What queries and keys are to be multiplied by (H, D, D), and the squared singular values (H, D), falling."""
        left, right = _root(self.queries), _root(self.keys)
        outer, values, inner = torch.linalg.svd(left.mT @ right)
        scale = values.sqrt()[:, :, None]
        queries = scale * torch.linalg.solve(left.mT, outer).mT
        return queries, scale * torch.linalg.solve(right.mT, inner.mT).mT, values.square()

    @cached_property
    def output_basis(self) -> tuple[Tensor, Tensor, Tensor]:
        """What values and (on the other side) the output's weights are multiplied by, and squared singular values."""
        root = _root(self.sent)
        sides = (self.output * self.importance.clamp(min=0).sqrt()[:, None, None]).transpose(0, 1) @ root
        _, values, inner = torch.linalg.svd(sides, full_matrices=True)
        values = torch.nn.functional.pad(values, (0, root.shape[1] - values.shape[1]))
        # both sides of alike size, but none above what the other cannot make up for
        scale = values.clamp(min=LEVEL * float(values.max()) + 1e-300).sqrt()[:, :, None]
        return scale * torch.linalg.solve(root.mT, inner.mT).mT, root @ inner.mT / scale.mT, values.square()

    @property
    def total(self) -> float:
        """What is lost by giving nothing at all, in the units of ``importance``."""
        return float(self.output_basis[2].sum())

    def tails(self) -> tuple[Tensor, Tensor]:
        """Squared singular values that are left out at each rank from 0 to D, of scores and of outputs: (D + 1,) each;
        the first are squares of scores, the second are what the outputs lose."""
        return tuple(  # type: ignore[return-value]
            torch.cat([v.sum(0).flip(0).cumsum(0).flip(0), v.new_zeros(1)])
            for v in (self.scores_basis[2], self.output_basis[2])
        )

    def whole(self) -> tuple[Tensor, ...]:
        """As :meth:`factors` of full ranks, in the basis that the layer has: without rounding."""
        return *(rows.flatten(0, 1) for rows in (self.query, self.key, self.value)), self.output.flatten(1)

    def factors(self, ranks: Sequence[int | None]) -> tuple[Tensor, ...]:
        """``query`` (H r, inputs + 1), ``key``, ``value`` (H s, inputs + 1) and ``output`` (E, H s).

        Raises:
            PruneError: a rank is below 1 or above D.
        """
        for rank in ranks:
            if rank is None or not 1 <= rank <= self.full_rank:
                raise PruneError(f"rank {rank} is not between 1 and {self.full_rank}, the numbers of a head")
        scores, values = (rank or 0 for rank in ranks)
        queries, keys, _ = self.scores_basis
        given, taken, _ = self.output_basis
        pairs = ((queries, self.query, scores), (keys, self.key, scores), (given, self.value, values))
        rows = [(basis[:, :rank] @ part).flatten(0, 1) for basis, part, rank in pairs]
        return *rows, torch.einsum("ehd,hdr->ehr", self.output, taken[:, :, :values]).flatten(1)


@dataclass(frozen=True)
class Moments:
    """See :class:`Heads`."""

    queries: Tensor
    keys: Tensor
    sent: Tensor
    importance: Tensor


def made_of(layer: nn.MultiheadAttention, weights: Sequence[Tensor]) -> LowRankAttention:
    """The attention with these weights, from :meth:`Heads.factors`."""
    heads = layer.num_heads
    made = LowRankAttention.from_dense(layer, (len(weights[0]) // heads, len(weights[2]) // heads))
    made = made.to(layer.out_proj.weight)
    with torch.no_grad():
        for part, rows in zip((made.q_proj, made.k_proj, made.v_proj), weights, strict=False):
            part.weight.copy_(rows[:, :-1])
            if part.bias is not None:
                part.bias.copy_(rows[:, -1])
        made.out_proj.weight.copy_(weights[3])
        if made.out_proj.bias is not None:
            made.out_proj.bias.copy_(layer.out_proj.bias)
    return made


def _projections(layer: nn.MultiheadAttention) -> list[tuple[Tensor, Tensor | None]]:
    """Weight and bias of queries, keys and values."""
    if layer._qkv_same_embed_dim:
        weights = layer.in_proj_weight.chunk(3)
    else:
        weights = layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight
    biases = (None,) * 3 if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)
    return list(zip(weights, biases, strict=True))


def _by_head(weight: Tensor, bias: Tensor | None, num_heads: int) -> Tensor:
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    rows = torch.cat([weight.detach(), bias.detach()[:, None]], dim=1).double().cpu()
    return rows.unflatten(0, (num_heads, -1))


def _root(moment: Tensor) -> Tensor:
    """L (H, D, D) with L L^T the second moment, and no direction without any."""
    values, vectors = torch.linalg.eigh((moment + moment.mT) / 2)
    largest = values[:, -1:].clamp(min=1e-30)
    return vectors * values.clamp(min=0).add(LEVEL * largest).sqrt()[:, None, :]
