import numpy as np
import pytest
import torch
from torch import nn

import compress
from compress.rules.views import pieces
from tests.compress.helpers import Apply, assert_exact, between, frozen_reasons, image

aten = torch.ops.aten


def _flatten(function) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 11, 3), Apply(lambda _, x: function(x)), nn.Linear(11 * 35, 7), nn.Linear(7, 5))


def _shuffle(x: torch.Tensor, groups: int) -> torch.Tensor:
    b, c, h, w = x.shape
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w)


class Heads(nn.Module):
    """Multi-head attention by views; ``by`` says which integers the views are written with."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(5, 36, bias=False), nn.Linear(12, 5)
        self.by, self.heads, self.size = by, 3, 4

    def forward(self, x):
        b, n, _ = x.shape
        if self.by == "both":
            q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, self.size).permute(2, 0, 3, 1, 4).unbind(0)
        elif self.by == "the number of heads":
            q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = self.qkv(x).reshape(b, n, 3, -1, self.size).permute(2, 0, 3, 1, 4).unbind(0)
        x = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.out(x.transpose(1, 2).flatten(2))


class Sizes(nn.Module):
    """The flattened width is stored as an integer, and asserted."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 11, 3), nn.Linear(11 * 35, 5)
        self.width = 11 * 35

    def forward(self, x):
        x = self.stem(x)
        assert x[0].numel() == self.width
        return self.head(x.view(-1, self.width))


CASES = {
    "flatten": lambda: (_flatten(lambda x: x.flatten(1)), image()),
    "flatten by -1": lambda: (_flatten(lambda x: x.reshape(x.size(0), -1)), image()),
    "flatten by product": lambda: (
        _flatten(lambda x: x.view(x.shape[0], x.shape[1] * x.shape[2] * x.shape[3])), image()),
    "flatten a permuted one": lambda: (_flatten(lambda x: x.permute(0, 2, 3, 1).flatten(1)), image()),
    "flatten all but channels": lambda: (
        between(lambda x: x.flatten(2).unflatten(2, (9, 7))), image()),
    "stored width": lambda: (Sizes(), image()),
    "squeeze": lambda: (
        nn.Sequential(nn.Conv2d(3, 11, (9, 7)), Apply(lambda _, x: x.squeeze(-1).squeeze(-1)), nn.Linear(11, 5)),
        image()),
    "batch and space merged": lambda: (
        nn.Sequential(nn.Conv2d(3, 11, 1), Apply(lambda _, x: x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])),
                      nn.Linear(11, 5)), image()),
    "copies": lambda: (
        between(lambda x: aten.view_copy(aten._reshape_copy(x, [x.shape[0], x.shape[1], 63]), x.shape)), image()),
    "unsafe view, alias": lambda: (
        between(lambda x: aten._unsafe_view(x, [x.shape[0], x.shape[1], 63])[..., None]
                + aten._reshape_alias(x.contiguous(), x.shape, x.stride()).flatten(2)[..., None]), image()),
    "as_strided": lambda: (between(lambda x: x.as_strided(x.shape, x.stride())), image()),
    "expand": lambda: (between(lambda x: x + x.mean((2, 3), keepdim=True).expand(x.shape)), image()),
    "expand by -1": lambda: (between(lambda x: x.mean((2, 3), keepdim=True).expand(-1, -1, 3, 5)), image()),
    "expand copy": lambda: (
        between(lambda x: aten.expand_copy(x.mean((2, 3), keepdim=True), [x.shape[0], x.shape[1], 3, 5])), image()),
    "shuffle in 3 groups": lambda: (between(lambda x: _shuffle(x, 3), 15), image()),
    "shuffle module": lambda: (
        nn.Sequential(nn.Conv2d(3, 15, 1), nn.ChannelShuffle(5), nn.Conv2d(15, 15, 3, groups=3), nn.Conv2d(15, 5, 1)),
        image()),
    "glu by view": lambda: (
        nn.Sequential(nn.Linear(3, 22), Apply(lambda _, x: x.view(*x.shape[:-1], 2, -1)[..., 0, :]), nn.Linear(11, 5)),
        image(7, 3)),
    "heads by both": lambda: (Heads("both"), image(2, 7, 5)),
    "heads by their number": lambda: (Heads("the number of heads"), image(2, 7, 5)),
    "heads by their size": lambda: (Heads("their size"), image(2, 7, 5)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_removal_equals_masking(name: str) -> None:
    assert_exact(*CASES[name](), compress.Budget(channels=0.7))


def test_a_channel_of_a_flattened_image_goes_with_all_its_positions() -> None:
    result = assert_exact(_flatten(lambda x: x.flatten(1)), image())
    assert result.model[2].in_features == 35 * result.model[0].out_channels


def test_a_stored_width_is_lowered() -> None:
    model = assert_exact(Sizes(), image()).model
    assert model.width == model.head.in_features == 35 * model.stem.out_channels < 11 * 35


@pytest.mark.parametrize(
    "function", [lambda x: x.reshape(-1, 11, 63)[..., None], lambda x: x.view(2, 11 * 9, 7).view(x.shape)]
)
def test_a_width_written_in_code_freezes(function) -> None:
    graph = compress.trace(between(function), image())
    assert not graph.groups
    assert "is written in the code" in frozen_reasons(graph, "0.weight")


def test_two_shuffles_that_disagree_freeze() -> None:
    """After a shuffle in 3 groups the positions within a group lie along the 5 groups of the next: 5 must stay."""
    graph = compress.trace(between(lambda x: _shuffle(_shuffle(x, 3).relu(), 5), 15), image())
    assert not graph.groups
    assert "the number 5 is written in the code" in frozen_reasons(graph, "0.weight")


def test_two_axes_that_could_both_shrink_become_one() -> None:
    """An outer product of two sets of channels, flattened: at most one of them may shrink."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(3, 7), nn.Linear(3, 5), nn.Linear(35, 2)

        def forward(self, x):
            return self.head((self.a(x)[:, :, None] * self.b(x)[:, None, :]).flatten(1))

    result = assert_exact(Outer(), image(7, 3), compress.Budget(channels=0.6))
    assert result.model.b.out_features == 5
    assert result.model.head.in_features == 5 * result.model.a.out_features


def test_memory_read_in_another_shape_freezes() -> None:
    graph = compress.trace(between(lambda x: x.as_strided((2, 11, 9, 6), x.stride())), image())
    assert not graph.groups
    assert "memory is read in another shape" in frozen_reasons(graph, "0.weight")


def test_pieces_multiply_to_the_same_and_are_as_short_as_can_be() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        atoms = generator.integers(1, 5, size=generator.integers(1, 7)).tolist()

        def joined(parts=atoms) -> list[int]:
            cuts = np.flatnonzero(generator.random(len(parts) - 1) < 0.5) + 1
            return [int(np.prod(part)) for part in np.split(np.array(parts), cuts)]

        old, new = joined(), joined()
        found = pieces(old, new)
        assert [i for left, _ in found for i in left] == [i for i, n in enumerate(old) if n > 1]
        assert [i for _, right in found for i in right] == [i for i, n in enumerate(new) if n > 1]
        for left, right in found:
            a, b = np.cumprod([old[i] for i in left]), np.cumprod([new[i] for i in right])
            assert a[-1] == b[-1]
            assert set(a[:-1]).isdisjoint(b[:-1]), "the piece could be cut"
