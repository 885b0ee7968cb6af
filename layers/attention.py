"""Attention of lower rank: queries, keys and values of fewer numbers a head than `nn.MultiheadAttention` gives them.

Legend: B batch, L queries, S keys, E embed_dim, H heads, D = E / H, r and s ranks a head.
"""

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from layers._checks import check_positive, check_shape, fail


class LowRankAttention(nn.Module):
    """`nn.MultiheadAttention` with `ranks` (r of queries and keys, s of values) a head in place of D.

    A head's scores x W_q^T W_k y have rank D at most, and so has what it adds to the output, W_o W_v y: with both
    products factorised jointly a rank costs two rows of weights, not a layer in between. Scores are still divided by
    the root of D. Called as `nn.MultiheadAttention` is, in its place in `nn.TransformerEncoderLayer` too; `is_causal`
    is a hint beside `attn_mask` and not looked at. Children `q_proj`, `k_proj` (H r rows each), `v_proj` (H s rows) and
    `out_proj`. Source: Bhojanapalli et al.: Low-Rank Bottleneck in Multi-head Attention Models (2020), section 2.

    Raises ValueError for sizes below 1, ranks above D, and a number of heads that does not divide E.

    >>> layer = LowRankAttention(8, 2, (3, 2), batch_first=True)
    >>> x = torch.ones(5, 7, 8)
    >>> torch.allclose(layer(x, x, x)[0], layer.merge()(x, x, x)[0], atol=1e-6)
    True
    """

    # what `nn.TransformerEncoder` asks before it takes a fused path, which knows one shape of heads
    in_proj_weight = in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        ranks: tuple[int, int],
        *,
        dropout: float = 0.0,
        bias: bool = True,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
    ) -> None:
        super().__init__()
        check_positive(self, embed_dim=embed_dim, num_heads=num_heads)
        check_positive(self, **{f"ranks[{side}]": rank for side, rank in enumerate(ranks)})
        if embed_dim % num_heads:
            raise fail(self, f"num_heads must divide embed_dim, but {num_heads} does not divide {embed_dim}")
        if max(ranks) > embed_dim // num_heads:
            raise fail(self, f"ranks must be at most {embed_dim // num_heads}, the size of a head, but are {ranks}")
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.dropout, self.batch_first = dropout, batch_first
        rows = num_heads * ranks[0], num_heads * ranks[1]
        self.q_proj = nn.Linear(embed_dim, rows[0], bias=bias)
        self.k_proj = nn.Linear(embed_dim if kdim is None else kdim, rows[0], bias=bias)
        self.v_proj = nn.Linear(embed_dim if vdim is None else vdim, rows[1], bias=bias)
        self.out_proj = nn.Linear(rows[1], embed_dim, bias=bias)
        # a number and not a function of sizes, which pruning may change
        self.scale = float(embed_dim // num_heads) ** -0.5

    @classmethod
    def from_dense(cls, layer: nn.MultiheadAttention, ranks: tuple[int, int]) -> Self:
        """By the sizes and settings of `layer`, with random weights."""
        return cls(
            layer.embed_dim,
            layer.num_heads,
            ranks,
            dropout=layer.dropout,
            bias=layer.out_proj.bias is not None,
            kdim=layer.kdim,
            vdim=layer.vdim,
            batch_first=layer.batch_first,
        )

    @property
    def ranks(self) -> tuple[int, int]:
        """(r, s)."""
        return self.q_proj.out_features // self.num_heads, self.v_proj.out_features // self.num_heads

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See `nn.MultiheadAttention.forward`."""
        check_shape(self, "query", query, ("...", self.q_proj.in_features))
        single = query.dim() == 2
        given = [query, key, value]
        if single or self.batch_first:  # samples come second, as in the layer of torch: rows of both are alike then
            given = [x.unsqueeze(1) if single else x.transpose(0, 1) for x in given]
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, -1)).permute(1, 2, 0, 3)
            for layer, x in zip((self.q_proj, self.k_proj, self.v_proj), given, strict=True)
        )
        mask = self._mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * self.scale) @ k.mT
            weights = torch.softmax(scores if mask is None else scores + mask, -1)
            weights = nn.functional.dropout(weights, dropout) if dropout else weights
            heads = weights @ v
        else:
            heads = scaled_dot_product_attention(q, k, v, mask, dropout, scale=self.scale)
        output = self.out_proj(heads.permute(2, 0, 1, 3).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if single:
            return output.squeeze(1), None if weights is None else weights.squeeze(0)
        return output.transpose(0, 1) if self.batch_first else output, weights

    def _mask(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, like: Tensor) -> Tensor | None:
        """What is added to the scores (B or 1, H or 1, L, S)."""
        masks = []
        if attn_mask is not None:
            own = attn_mask.unflatten(0, (-1, self.num_heads)) if attn_mask.dim() == 3 else attn_mask
            masks.append(own)
        if key_padding_mask is not None:
            masks.append(key_padding_mask.reshape(-1, 1, 1, key_padding_mask.shape[-1]))
        added = [_added(mask, like) for mask in masks]
        return None if not added else added[0] if len(added) == 1 else added[0] + added[1]

    @torch.no_grad()
    def merge(self) -> nn.MultiheadAttention:
        """The layer of `torch.nn` that computes the same: heads of their full size, filled up with zeros."""
        merged = nn.MultiheadAttention(
            self.embed_dim,
            self.num_heads,
            self.dropout,
            bias=self.out_proj.bias is not None,
            kdim=self.k_proj.in_features,
            vdim=self.v_proj.in_features,
            batch_first=self.batch_first,
        ).to(self.out_proj.weight)
        weights = [self._filled(layer.weight) for layer in (self.q_proj, self.k_proj, self.v_proj)]
        if merged._qkv_same_embed_dim:
            merged.in_proj_weight.copy_(torch.cat(weights))
        else:
            for slot, weight in zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), weights, strict=True):
                getattr(merged, slot).copy_(weight)
        merged.out_proj.weight.copy_(self._filled(self.out_proj.weight.T).T)
        if merged.in_proj_bias is not None:
            biases = [self._filled(layer.bias) for layer in (self.q_proj, self.k_proj, self.v_proj)]
            merged.in_proj_bias.copy_(torch.cat(biases))
            merged.out_proj.bias.copy_(self.out_proj.bias)
        return merged

    def _filled(self, rows: Tensor) -> Tensor:
        """(H r, ...) -> (E, ...)."""
        heads = rows.unflatten(0, (self.num_heads, -1))
        filled = heads.new_zeros(self.num_heads, self.head_dim, *rows.shape[1:])
        filled[:, : heads.shape[1]] = heads
        return filled.flatten(0, 1)

    def extra_repr(self) -> str:
        """What the children do not tell."""
        return f"num_heads={self.num_heads}, ranks={self.ranks}, scale={self.scale:.4g}"


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """A mask as numbers to add: minus infinity where a boolean one is True."""
    if mask.dtype is torch.bool:
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))
    return mask.to(like.dtype)
