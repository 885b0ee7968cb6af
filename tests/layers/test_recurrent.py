"""Recurrent layers against torch.nn's, run on one sequence at a time without filling."""

import pytest
import torch
from torch import Tensor, nn

import layers

D = torch.float64
LENGTHS = torch.tensor([4, 7, 1, 6])
KINDS = {"RNN": (layers.RNN, nn.RNN), "LSTM": (layers.LSTM, nn.LSTM), "GRU": (layers.GRU, nn.GRU)}


def pair(kind: str, num_layers: int, bidirectional: bool) -> tuple[nn.Module, nn.RNNBase]:
    """Ours, and torch's with the same parameters."""
    ours, theirs = KINDS[kind]
    mine = ours(5, 3, num_layers=num_layers, bidirectional=bidirectional).to(D)
    other = theirs(5, 3, num_layers, bidirectional=bidirectional, batch_first=True).to(D)
    directions = (("forwards", ""), ("backwards", "_reverse"))[: 2 if bidirectional else 1]
    with torch.no_grad():
        for layer in range(num_layers):
            for cells, suffix in directions:
                for name, parameter in getattr(mine, cells)[layer].named_parameters():
                    parameter.copy_(getattr(other, f"{name}_l{layer}{suffix}"))
    return mine, other


def one_by_one(other: nn.RNNBase, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Output with zeros in the filling, and the last layer's final states side by side."""
    outputs, finals = [], []
    for sequence, length in zip(x, lengths.tolist(), strict=True):
        output, state = other(sequence[None, :length])
        state = state[0] if isinstance(state, tuple) else state
        outputs.append(nn.functional.pad(output[0], (0, 0, 0, x.shape[1] - length)))
        finals.append(state[-2 if other.bidirectional else -1 :, 0].flatten())
    return torch.stack(outputs), torch.stack(finals)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_is_one_sequence_at_a_time(kind: str, num_layers: int, bidirectional: bool, padded: bool) -> None:
    mine, other = pair(kind, num_layers, bidirectional)
    x = torch.randn(4, 7, 5, dtype=D)
    lengths = LENGTHS if padded else torch.full((4,), 7)
    output, final = mine(x, lengths if padded else None)
    expected, expected_final = one_by_one(other, x, lengths)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(final, expected_final, rtol=1e-12, atol=1e-13)


def test_gradients_do_not_see_the_filling() -> None:
    mine, other = pair("LSTM", 2, True)
    x = torch.randn(4, 7, 5, dtype=D, requires_grad=True)
    weight = torch.randn(4, 7, 6, dtype=D)
    (mine(x, LENGTHS)[0] * weight).sum().backward()
    assert x.grad is not None
    assert all(not gradient[length:].any() for gradient, length in zip(x.grad, LENGTHS.tolist(), strict=True))
    (one_by_one(other, x.detach(), LENGTHS)[0] * weight).sum().backward()
    ours = mine.forwards[1].weight_ih.grad
    torch.testing.assert_close(ours, other.weight_ih_l1.grad, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(mine.backwards[0].bias_hh.grad, other.bias_hh_l0_reverse.grad, rtol=1e-11, atol=1e-13)


def test_dropout_is_between_layers_only() -> None:
    x = torch.randn(4, 7, 5)
    one, two = layers.GRU(5, 3, dropout=0.9), layers.GRU(5, 3, num_layers=2, dropout=0.9)
    assert torch.equal(one(x)[0], one.eval()(x)[0])
    assert not torch.equal(two(x)[0], two.eval()(x)[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layers.LSTM(0, 3), "LSTM: input_size must be an integer of at least 1, but is 0"),
        (lambda: layers.GRU(5, 3, dropout=1.0), r"GRU: dropout must be in \[0, 1\), but is 1.0"),
        (lambda: layers.RNN(5, 3)(torch.zeros(2, 7, 4)), r"RNN: x must have shape \(batch, time, 5\).*\(2, 7, 4\)"),
        (lambda: layers.GRU(5, 3)(torch.zeros(2, 0, 5)), r"GRU: x must have shape .*no axis empty.*\(2, 0, 5\)"),
        (
            lambda: layers.LSTM(5, 3)(torch.zeros(2, 7, 5), torch.tensor([8, 1])),
            "LSTM: lengths must be from 1 to 7, but are from 1 to 8",
        ),
        (
            lambda: layers.LSTM(5, 3)(torch.zeros(2, 7, 5), torch.tensor([7, 0])),
            "LSTM: lengths must be from 1 to 7, but are from 0 to 7",
        ),
    ],
)
def test_bad_arguments(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
