"""Batches in parts: only where the examples are treated one by one, and then with the same results."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.inference import parts
from layers.inference.backends.torch_backend import torch_program
from layers.inference.capture import Call, capture
from layers.inference.examples import batched_inputs
from layers.inference.parts import InParts, best_size
from layers.inference.simplify import simplify


class Of(nn.Module):
    """A function of tensors as a module."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.function(*tensors)


def windows(x: Tensor) -> Tensor:
    """Softmax within the halves of every image, which are rows of their own for a while."""
    rows = x.unflatten(3, (2, 3)).permute(0, 3, 1, 2, 4).reshape(-1, 18, 3)
    attended = F.scaled_dot_product_attention(rows, rows, rows).softmax(-1)
    return attended.reshape(-1, 2, 3, 6, 3).permute(0, 2, 3, 1, 4).reshape(x.shape)


KEPT_APART: dict[str, Callable[[Tensor], Tensor]] = {
    "elementwise": lambda x: (x * 2 - 1).relu() + x.sigmoid(),
    "convolution": lambda x: F.avg_pool2d(F.conv2d(x, torch.ones(4, 3, 3, 3)), 2).flatten(1),
    "norm over features": lambda x: F.layer_norm(x, x.shape[2:]) + F.group_norm(x, 3),
    "statistics of every example": lambda x: x - x.mean((1, 2, 3), keepdim=True),
    "softmax over features": lambda x: x.flatten(1).softmax(-1),
    "products of two": lambda x: x @ x.transpose(2, 3),
    "branches": lambda x: torch.cat([part.relu() for part in x.chunk(3, 1)], 1),
    "view": lambda x: x.view(x.shape[0], -1)[:, 3:],
    "a token for all": lambda x: torch.cat((torch.ones(1, 1, 6).expand(x.shape[0], 1, 6), x.mean(1)), 1),
    "windows": windows,
}
MIXED: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax over the batch": lambda x: x.softmax(0),
    "cumulative sum": lambda x: x.cumsum(-4),
    "statistics of the batch": lambda x: x - x.mean(0),
    "of everything": lambda x: x / x.abs().sum(),
    "flip": lambda x: x.flip(0),
    "shift": lambda x: x.roll(1, 0),
    "order": lambda x: x.sort(0).values,
    "similarities": lambda x: x.flatten(1) @ x.flatten(1).T,
    "attention over the batch": lambda x: F.scaled_dot_product_attention(*[x.flatten(1)] * 3),
    "batch norm by its statistics": lambda x: F.batch_norm(x, None, None, training=True),
    "the batch's size": lambda x: x / x.shape[0],
    "numbered": lambda x: x * torch.arange(x.shape[0]).view(-1, 1, 1, 1),
    "rows dealt out": lambda x: torch.cat(x.reshape(-1, 9, 6).chunk(2, 0), 1),
    "repeated": lambda x: x.repeat(2, 1, 1, 1).view(-1, 2, 3, 6, 6),
    "moved": lambda x: x.transpose(0, 1),
}


def graph_of(function: Callable[..., Tensor], *tensors: Tensor) -> torch.fx.GraphModule:
    model = Of(function).eval()
    graph = capture(model, Call.of(model, *tensors)).graph
    simplify(graph)
    return graph


def some_slow(names: dict[str, Any], quick: set[str]) -> list[Any]:
    """Tracing takes half a second each."""
    assert quick <= set(names)
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", some_slow(KEPT_APART, {"convolution", "view", "a token for all", "windows"}))
def test_examples_kept_apart_are_found_to_be(name: str) -> None:
    x = torch.randn(6, 3, 6, 6)
    graph = graph_of(KEPT_APART[name], x)
    assert batched_inputs(graph) == (True,)
    torch.testing.assert_close(InParts(graph, (True,), 2)(x)[0], KEPT_APART[name](x))


@pytest.mark.parametrize("name", some_slow(MIXED, {"softmax over the batch", "of everything", "rows dealt out"}))
def test_mixed_examples_are_never_taken_for_separate_ones(name: str) -> None:
    assert batched_inputs(graph_of(MIXED[name], torch.randn(6, 3, 6, 6))) is None


def test_inputs_for_all_examples_go_to_every_part() -> None:
    x, shared = torch.randn(7, 6), torch.randn(6, 6)
    graph = graph_of(lambda x, shared: F.linear(x, shared).tanh(), x, shared)
    assert batched_inputs(graph) in (None, (True, False))  # where its first axis may vary too, nothing is claimed
    run = InParts(graph, (True, False), 3)
    torch.testing.assert_close(run(x, shared)[0], F.linear(x, shared).tanh())


@pytest.mark.parametrize("length", [2, 3, 4, 7, 8, 9, 31])
def test_parts_are_never_smaller_than_asked(length: int) -> None:
    seen = []

    def run(x: Tensor) -> list[Tensor]:
        seen.append(len(x))
        return [x + 1]

    x = torch.randn(length, 2)
    assert torch.equal(InParts(run, (True,), 4)(x)[0], x + 1)
    assert sum(seen) == length
    assert len(seen) == 1 or all(4 <= size < 8 for size in seen)


def test_the_size_that_takes_the_least_time_for_an_example(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = {32: 64.0, 16: 31.5, 8: 12.0, 4: 5.9, 2: 4.0}  # 4 gains less over 8 than a call more may cost
    monkeypatch.setattr(parts, "seconds", lambda runs, *_: {name: costs[int(name)] for name in runs})
    assert best_size(lambda x: [x], [torch.zeros(32, 1)], (True,)) == 8
    assert best_size(lambda x: [x], [torch.zeros(1, 1)], (True,)) == 1


def test_a_program_in_parts_is_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layers.inference.backends.torch_backend.best_size", lambda *_: 2)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 5)).eval()
    x = torch.randn(9, 3, 6, 6)
    with torch.no_grad():
        graph = capture(model, Call.of(model, x)).graph
        simplify(graph)
        program = torch_program(graph, [x])
        assert any("parts of 2" in note for note in program.notes)
        for length in (9, 2, 3, 5):
            torch.testing.assert_close(program.run(x[:length])[0], model(x[:length]))
