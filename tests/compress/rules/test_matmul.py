import pytest
import torch
import torch.nn.functional as F
from torch import nn

import compress
from tests.compress.helpers import Apply, assert_exact, image, tokens


class Bare(nn.Module):
    """A network of raw matrices around ``function(x, first, second, bias)``; x is (7, 3), the result (7, 5)."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.first, self.second = nn.Parameter(torch.randn(3, 11)), nn.Parameter(torch.randn(11, 5))
        self.bias, self.vector = nn.Parameter(torch.randn(11)), nn.Parameter(torch.randn(11))

    def forward(self, x):
        return self.function(self, x)


class Attention(nn.Module):
    """One head, with separate projections: q and k share their width, v and the output theirs."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(5, 7, bias=bias), nn.Linear(5, 7, bias=bias), nn.Linear(5, 11)
        self.out = nn.Linear(11, 3)

    def forward(self, x):
        weights = torch.softmax(self.q(x) @ self.k(x).transpose(1, 2), -1)
        return self.out(weights @ self.v(x))


class Interactions(nn.Module):
    """Products of all features with each other; each feature is made by a layer or a table of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other, self.table = nn.Linear(3, 11), nn.Linear(3, 11, bias=False), nn.Embedding(13, 11)
        self.shift, self.head = nn.Parameter(torch.randn(11)), nn.Linear(11 + 9, 5)

    def forward(self, x):
        places = (x[:, 0] * 3).long().clamp(0, 12)
        sums = (self.layer(x) + self.other(x)) + (self.shift + self.layer(-x))
        features = torch.stack([sums, self.table(places), self.other(x) - self.shift], 1)
        return self.head(torch.cat([features[:, 0], (features @ features.transpose(1, 2)).flatten(1)], 1))


class Decoder(nn.Module):
    """A bias that is added to what is no matrix any more: attention of one recurrent layer's outputs to another's."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = (nn.GRU(3, 11, batch_first=True) for _ in range(2))
        self.query, self.head = nn.Linear(11, 11), nn.Linear(22, 5)

    def forward(self, x):
        read, last = self.encoder(x)
        said, _ = self.decoder(x.flip(1), last)
        weights = torch.softmax(self.query(said) @ read.transpose(1, 2), -1)
        return self.head(torch.cat([said, weights @ read], -1))


class TiedHead(nn.Module):
    """The output projection is the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body = nn.Embedding(13, 11), nn.Linear(11, 7)
        self.back = nn.Linear(7, 11)
        self.head = nn.Linear(11, 13, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        x = self.embedding(x)
        return self.head(x + self.back(self.body(x).relu()))


class Pairs(nn.Module):
    """A form of two branches, or of one with itself."""

    def __init__(self, same: bool = False) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 11), nn.Linear(3, 11 if same else 7)
        self.form, self.head = nn.Bilinear(11, 11 if same else 7, 6), nn.Linear(6, 5)
        self.same = same

    def forward(self, x):
        left = self.left(x).relu()
        return self.head(self.form(left, left if self.same else self.right(x).tanh()).relu())


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 11), nn.ReLU(), nn.Linear(11, 7, bias=False), nn.ReLU(), nn.Linear(7, 5))


CASES = {
    "mlp": lambda: (_mlp(), image(3, 3)),
    "mlp on sequences": lambda: (_mlp(), image(2, 7, 3)),
    "products of sums, stacked": lambda: (Interactions(), image(7, 3)),
    "attention between recurrent layers": lambda: (Decoder(), image(2, 7, 3)),
    "bilinear": lambda: (Pairs(), image(7, 3)),
    "bilinear of sequences": lambda: (Pairs(), image(2, 7, 3)),
    "bilinear with itself": lambda: (Pairs(same=True), image(7, 3)),
    "mlp on one vector": lambda: (_mlp(), image(3)),
    "mm": lambda: (Bare(lambda m, x: (x @ m.first).relu() @ m.second), image(7, 3)),
    "addmm": lambda: (Bare(lambda m, x: torch.addmm(m.bias, x, m.first, beta=0.5) @ m.second), image(7, 3)),
    "mv": lambda: (Bare(lambda m, x: (x @ m.first).relu().mv(m.vector)), image(7, 3)),
    "addmv": lambda: (
        Bare(lambda m, x: torch.addmv(m.bias, m.first.t(), x[0]).relu() @ m.second), image(7, 3)),
    "dot": lambda: (Bare(lambda m, x: (x @ m.first)[0].relu().dot(m.vector)), image(7, 3)),
    "vdot": lambda: (Bare(lambda m, x: torch.vdot(m.vector, (x @ m.first)[0].relu())), image(7, 3)),
    "bmm": lambda: (
        Bare(lambda m, x: torch.bmm(torch.bmm(x[None], m.first[None]).relu(), m.second[None])), image(7, 3)),
    "baddbmm": lambda: (
        Bare(lambda m, x: torch.baddbmm(m.bias[None, None], x[None], m.first[None]).relu() @ m.second), image(7, 3)),
    "einsum": lambda: (
        Bare(lambda m, x: torch.einsum("nd,de->ne", torch.einsum("nc,cd->nd", x, m.first).relu(), m.second)),
        image(7, 3)),
    "functional linear": lambda: (
        Bare(lambda m, x: F.linear(F.linear(x, m.first.t(), m.bias).relu(), m.second.t())), image(7, 3)),
    "two weights multiplied": lambda: (Bare(lambda m, x: x @ (m.first @ m.second)), image(7, 3)),
    "attention": lambda: (Attention(), image(2, 7, 5)),
    "tied head": lambda: (TiedHead(), tokens()),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_removal_equals_masking(name: str) -> None:
    assert_exact(*CASES[name]())


def test_of_two_activations_the_first_is_the_consumer() -> None:
    groups = {group.num_units: group for group in compress.trace(Attention(), image(2, 7, 5)).groups}
    assert set(groups) == {7, 11}
    roles = {(m.parameter, m.axis): m.role for m in groups[7].members}
    assert roles[("q.weight", 0)] == "consumer"
    assert roles[("k.weight", 0)] != "consumer"


def test_attention_with_bias() -> None:
    result = assert_exact(Attention(bias=True), image(2, 7, 5))
    assert any(member.parameter == "q.bias" for member in result.plan.members())


def test_a_sum_over_the_batch_is_refused_not_guessed() -> None:
    model = Bare(lambda m, x: torch.addbmm(torch.zeros(7, 11, dtype=x.dtype), x[None], m.first[None]).relu() @ m.second)
    graph = compress.trace(model, image(7, 3))
    if graph.groups:
        assert_exact(model, image(7, 3))
    else:
        assert any("sum over the batch" in axis.reason for axis in graph.frozen)


def test_channels_contracted_with_space_stay() -> None:
    """x @ x.transpose over positions leaves channels as both axes of the result: they meet the output."""
    model = nn.Sequential(nn.Conv2d(3, 11, 1), Apply(lambda _, x: x.flatten(2) @ x.flatten(2).transpose(1, 2)))
    assert not compress.trace(model, image()).groups
