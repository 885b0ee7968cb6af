import pytest
import torch.nn.functional as F
from torch import nn

import compress
from tests.compress.helpers import assert_exact, image


class Attention(nn.Module):
    """Fused attention over heads of stored number and size, one projection for all three."""

    def __init__(self, heads: int = 3, size: int = 4, scale: float | None = None, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.size, self.scale, self.causal = heads, size, scale, causal
        self.qkv, self.out = nn.Linear(5, 3 * heads * size), nn.Linear(heads * size, 5)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, self.size).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v, scale=self.scale, is_causal=self.causal)
        return self.out(x.transpose(1, 2).reshape(b, n, self.heads * self.size))


class Separate(nn.Module):
    """Separate projections; values have a size of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(5, 7), nn.Linear(5, 7), nn.Linear(5, 11)
        self.out = nn.Linear(11, 5)

    def forward(self, x):
        q, k, v = (layer(x)[:, None] for layer in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v, scale=0.3)[:, 0])


CASES = {
    "heads": lambda: (Attention(), image(2, 7, 5)),
    "causal": lambda: (Attention(causal=True), image(2, 7, 5)),
    "own scale": lambda: (Attention(scale=0.3), image(2, 7, 5)),
    "separate": lambda: (Separate(), image(2, 7, 5)),
}


@pytest.mark.parametrize("name", CASES)
def test_removal_equals_masking(name: str) -> None:
    assert_exact(*CASES[name](), compress.Budget(channels=0.7))


def test_the_default_scale_keeps_the_size_of_a_head_and_heads_go() -> None:
    model = assert_exact(Attention(), image(2, 7, 5), compress.Budget(channels=0.7)).model
    assert (model.heads, model.size) == (2, 4)
    assert model.qkv.out_features == 3 * 8
    assert model.out.in_features == 8


def test_values_may_shrink_where_queries_may_not() -> None:
    groups = {group.num_units for group in compress.trace(Separate(), image(2, 7, 5)).groups}
    assert groups == {7, 11}


@pytest.mark.parametrize("heads", [4, 6, 2])
def test_as_many_heads_in_the_batch_as_elements_in_a_head_confuse_nothing(heads: int) -> None:
    """``nn.MultiheadAttention`` merges batch and heads into one axis, which training doubles."""
    layer = nn.TransformerEncoderLayer(24, heads, 18, batch_first=True, norm_first=True, dropout=0.0)
    model = nn.Sequential(nn.Linear(5, 24), layer, nn.Linear(24, 5))
    graph = compress.trace(model, image(1, 7, 5))
    assert {"1.self_attn.in_proj_weight", "1.linear1.weight", "0.weight"} <= {group.name for group in graph.groups}
    result = assert_exact(model, image(1, 7, 5), compress.Budget(channels=0.7), exact_only=True)
    assert result.model[1].linear1.out_features < 18
