"""Attention of lower rank against `nn.MultiheadAttention` with heads filled up with zeros."""

import pytest
import torch
from torch import nn

import layers

D = torch.float64


def lively(ranks: tuple[int, int] = (3, 2), **options) -> tuple[nn.Module, nn.MultiheadAttention]:
    torch.manual_seed(0)
    layer = layers.LowRankAttention(8, 2, ranks, **options).to(D).eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer, layer.merge().eval()


def draw(batch_first: bool, width: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries (5, 6, 8) and keys (5, 7, width), samples first or second."""
    torch.manual_seed(1)
    pair = torch.randn(5, 6, 8, dtype=D), torch.randn(5, 7, width, dtype=D)
    return pair if batch_first else (pair[0].transpose(0, 1), pair[1].transpose(0, 1))


MASKS = {
    "none": dict,
    "fused": lambda: {"need_weights": False},
    "each head": lambda: {"attn_mask": torch.randn(10, 6, 7, dtype=D), "average_attn_weights": False},
    "forbidden": lambda: {"attn_mask": torch.ones(6, 7).triu(1).bool()},
    "padding": lambda: {"key_padding_mask": torch.arange(7) > torch.arange(2, 7)[:, None], "need_weights": False},
    "both": lambda: {"key_padding_mask": torch.arange(7) > torch.arange(2, 7)[:, None],
                     "attn_mask": torch.ones(6, 7).triu(1).bool()},
}  # fmt: skip


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("options", [{"batch_first": True}, {}, {"kdim": 3, "vdim": 3}, {"bias": False}])
def test_it_is_called_as_the_layer_of_torch_and_computes_the_same(masks: str, options: dict) -> None:
    layer, dense = lively(**options)
    query, key = draw("batch_first" in options, options.get("kdim", 8))
    given = MASKS[masks]()
    found, expected = (each(query, key, key, **given) for each in (layer, dense))
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-12)
    assert (found[1] is None) == (expected[1] is None)
    if found[1] is not None:
        torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-12)


def test_one_sample_alone() -> None:
    layer, dense = lively()
    query, key = (each[:, 0] for each in draw(batch_first=False))
    for found, expected in zip(layer(query, key, key), dense(query, key, key), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_it_runs_and_learns_in_an_encoder_of_torch_with_padding() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dtype=D), 1)
    layer, dense = lively(batch_first=True)
    query = draw(batch_first=True)[0]
    encoder.use_nested_tensor = False
    outputs = []
    for attention in (dense, layer):
        encoder.layers[0].self_attn = attention
        with torch.no_grad():
            outputs.append(encoder.eval()(query, src_key_padding_mask=torch.arange(6) > torch.arange(2, 7)[:, None]))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-10)
    encoder.train()(query).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: layers.LowRankAttention(8, 3, (1, 1)), "num_heads must divide embed_dim"),
        (lambda: layers.LowRankAttention(8, 2, (5, 1)), "ranks must be at most 4, the size of a head"),
        (lambda: layers.LowRankAttention(8, 2, (1, 0)), r"ranks\[1\] must be an integer of at least 1"),
        (lambda: layers.LowRankAttention(8, 2, (1, 1))(*[torch.zeros(2, 3, 7)] * 3), r"query must have shape"),
    ],
)
def test_bad_input_is_said(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
