"""Thin layers compute what their merged layer computes, and what the definition of their factors says."""

import numpy as np
import pytest
import torch
from torch import nn

import compress
import layers

D = torch.float64
OPTIONS = [
    {},
    {"stride": 2, "padding": 1},
    {"stride": (1, 2), "padding": (2, 0), "dilation": (2, 1)},
]


def same(layer: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=D)
    merged = layer.merge()
    assert type(merged).__module__.startswith("torch.nn")
    torch.testing.assert_close(merged(x), layer(x), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias: bool) -> None:
    layer = layers.LowRankLinear(7, 5, 3, bias=bias).to(D)
    same(layer, (2, 4, 7))
    expand, reduce = torch.randn(5, 3, dtype=D), torch.randn(3, 7, dtype=D)
    given = layers.LowRankLinear.from_factors(expand, reduce, torch.ones(5, dtype=D) if bias else None)
    x = torch.randn(4, 7, dtype=D)
    np.testing.assert_allclose(given(x).detach(), x @ (expand @ reduce).T + (1 if bias else 0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("padding_idx", [None, 3])
def test_embedding(padding_idx: int | None) -> None:
    layer = layers.LowRankEmbedding(20, 6, 4, padding_idx=padding_idx).to(D)
    indices = torch.tensor([[3, 19], [0, 3]])
    merged = layer.merge()
    assert type(merged) is nn.Embedding
    assert merged.padding_idx == padding_idx
    torch.testing.assert_close(merged(indices), layer(indices), rtol=1e-11, atol=1e-12)
    table, expand = torch.randn(20, 4, dtype=D), torch.randn(6, 4, dtype=D)
    given = layers.LowRankEmbedding.from_factors(table, expand, padding_idx=padding_idx)
    np.testing.assert_allclose(given(indices).detach(), (table @ expand.T)[indices], rtol=1e-12)
    given(indices).sum().backward()
    assert bool(given.table.weight.grad[3].any()) == (padding_idx is None)


def test_the_rank_of_an_embedding_can_be_pruned() -> None:
    model = nn.Sequential(layers.LowRankEmbedding(20, 6, 8), nn.Linear(6, 3)).to(D)
    graph = compress.trace(model, torch.zeros(2, 5, dtype=torch.long))
    assert any({m.parameter for m in group.members} == {"0.table.weight", "0.expand.weight"} for group in graph.groups)


def test_convolutions_of_three_axes() -> None:
    for ranks in ((2, 3), (None, 3), (2, None)):
        options = {"stride": (1, 2, 1), "padding": 1}
        same(layers.Tucker2Conv(4, 6, (2, 3, 3), ranks, **options).to(D), (2, 4, 5, 6, 7))


@pytest.mark.parametrize("ranks", [(4, 6), (None, 6), (4, None), (None, None)])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_tucker_2d(ranks, groups: int, options: dict, bias: bool) -> None:
    same(layers.Tucker2Conv(8, 10, (3, 2), ranks, groups=groups, bias=bias, **options).to(D), (2, 8, 9, 11))


@pytest.mark.parametrize("ranks", [(4, 6), (None, 6), (4, None)])
def test_tucker_1d(ranks) -> None:
    same(layers.Tucker2Conv(8, 10, (3,), ranks, stride=2, padding=2, dilation=2).to(D), (2, 8, 11))


@pytest.mark.parametrize("first", ["vertical", "horizontal"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_spatial(first: str, groups: int, options: dict, bias: bool) -> None:
    layer = layers.SpatialConv(8, 10, (3, 5), 6, first=first, groups=groups, bias=bias, **options).to(D)
    assert layer.first.kernel_size == ((3, 1) if first == "vertical" else (1, 5))
    same(layer, (2, 8, 9, 11))


def test_tucker_factors_are_those_of_the_definition() -> None:
    core, reduce, expand = (torch.randn(*s, dtype=D) for s in ((4, 3, 3, 3), (3, 6), (8, 4)))
    layer = layers.Tucker2Conv.from_factors(core, reduce=reduce, expand=expand, padding=1)
    weight = torch.einsum("oa,abyx,bi->oiyx", expand, core, reduce)
    torch.testing.assert_close(layer.merge().weight, weight)
    assert layer.merge().padding == (1, 1)
    assert layer.expand.bias is None


@pytest.mark.parametrize("vertical", [True, False])
def test_spatial_factors_are_those_of_the_definition(vertical: bool) -> None:
    shapes = ((4, 6, 3, 1), (8, 4, 1, 5)) if vertical else ((4, 6, 1, 5), (8, 4, 3, 1))
    first, second = (torch.randn(s, dtype=D) for s in shapes)
    layer = layers.SpatialConv.from_factors(first, second, torch.randn(8, dtype=D), stride=2)
    parts = "oaqx,aiyp->oiyx" if vertical else "oayp,aiqx->oiyx"
    torch.testing.assert_close(layer.merge().weight, torch.einsum(parts, second, first))
    same(layer, (2, 6, 9, 11))


def test_svd_of_full_rank_gives_the_layer_back() -> None:
    linear = nn.Linear(6, 4).to(D)
    u, s, v = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
    layer = layers.LowRankLinear.from_factors(u * s, v, linear.bias)
    x = torch.randn(3, 6, dtype=D)
    torch.testing.assert_close(layer(x), linear(x))


def test_given_factors_stay_their_own() -> None:
    expand, reduce = torch.randn(5, 3), torch.randn(3, 7)
    layer = layers.LowRankLinear.from_factors(expand, reduce)
    nn.init.zeros_(layer.expand.weight)
    assert expand.abs().sum() > 0


CONV = {"stride": 2, "padding": (1, 2), "dilation": (1, 2)}
SIZES = ("in_channels", "out_channels", "kernel_size", "groups", "stride", "padding", "dilation")


@pytest.mark.parametrize(
    ("thin", "dense", "names"),
    [
        (layers.LowRankLinear(6, 4, 2), nn.Linear(6, 4), ("in_features", "out_features")),
        (
            layers.LowRankEmbedding(9, 4, 2, padding_idx=1),
            nn.Embedding(9, 4, padding_idx=1),
            ("num_embeddings", "embedding_dim", "padding_idx"),
        ),
        (layers.SpatialConv(6, 8, (3, 5), 4, groups=2, **CONV), nn.Conv2d(6, 8, (3, 5), groups=2, **CONV), SIZES),
        (layers.Tucker2Conv(6, 8, (3, 5), (2, None), **CONV), nn.Conv2d(6, 8, (3, 5), **CONV), SIZES),
        (layers.Tucker2Conv(6, 8, (1, 5), (2, 4), **CONV), nn.Conv2d(6, 8, (1, 5), **CONV), SIZES),
        (layers.Tucker2Conv(6, 8, (3,), (None, 4), padding=1), nn.Conv1d(6, 8, 3, padding=1), SIZES),
    ],
)
def test_sizes_read_as_those_of_the_layer_that_it_stands_for(thin, dense, names: tuple[str, ...]) -> None:
    assert {name: getattr(thin, name) for name in names} == {name: getattr(dense, name) for name in names}
    assert {name: getattr(thin.merge(), name) for name in names} == {name: getattr(dense, name) for name in names}


Z = torch.zeros
BAD = [
    (lambda: layers.LowRankEmbedding(4, 0, 2), "LowRankEmbedding: embedding_dim must be an integer of at least 1"),
    (
        lambda: layers.LowRankEmbedding.from_factors(Z(4, 3), Z(5, 2)),
        r"LowRankEmbedding: expand must have shape \(embedding_dim, 3\)",
    ),
    (lambda: layers.LowRankLinear(4, 4, 0), "LowRankLinear: rank must be an integer of at least 1, but is 0"),
    (
        lambda: layers.LowRankLinear.from_factors(Z(4, 3), Z(2, 5)),
        r"LowRankLinear: reduce must have shape \(3, ",
    ),
    (
        lambda: layers.LowRankLinear.from_factors(Z(4, 3), Z(3, 5), Z(3)),
        r"bias must have shape \(4,\)",
    ),
    (lambda: layers.LowRankLinear(4, 4, 2)(Z(2, 5)), r"LowRankLinear: x must have shape \(\.\.\., 4\)"),
    (lambda: layers.Tucker2Conv(4, 4, (3, 3), (0, 2)), r"Tucker2Conv: ranks\[0\] must be an integer of at least 1"),
    (lambda: layers.Tucker2Conv(4, 4, (3, 3), (3, 2), groups=2), "groups must divide all .* 2 does not divide 3"),
    (lambda: layers.Tucker2Conv(4, 4, (3, 3, 3, 3), (2, 2)), "kernel_size must have 1 to 3 numbers.* but has 4"),
    (lambda: layers.Tucker2Conv(4, 4, (3, 3), (2, 2), strides=2), "strides is no argument; there are stride"),
    (lambda: layers.Tucker2Conv(4, 4, (3, 3), (2, 2), padding="same"), "padding must be an integer.* but is 'same'"),
    (lambda: layers.Tucker2Conv.from_factors(Z(4, 3, 3), reduce=Z(2, 5)), r"reduce must have shape \(3, "),
    (lambda: layers.Tucker2Conv(4, 4, (3, 3), (2, 2))(Z(2, 5, 6, 6)), r"Tucker2Conv: x must have shape \(batch, 4"),
    (lambda: layers.SpatialConv(4, 4, (3, 3), 2, first="up"), "SpatialConv: first must be 'vertical' or 'horizontal'"),
    (lambda: layers.SpatialConv.from_factors(Z(4, 6, 3, 3), Z(8, 4, 3, 1)), "SpatialConv: first must have shape"),
    (lambda: layers.SpatialConv.from_factors(Z(4, 6, 3, 1), Z(8, 5, 1, 3)), "second must have shape"),
    (lambda: layers.SpatialConv(4, 4, (3, 3), 2)(Z(4, 6, 6)), r"SpatialConv: x must have shape \(batch, 4, height"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_arguments(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
