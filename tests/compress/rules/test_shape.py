import pytest
import torch
import torch.nn.functional as F
from torch import nn

import compress
from tests.compress.helpers import Apply, assert_exact, between, frozen_reasons, image

aten = torch.ops.aten


class Cat(nn.Module):
    """Unequal parts, the input among them, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 11, 1), nn.Conv2d(3, 7, 1)
        self.norm, self.head = nn.BatchNorm2d(21), nn.Conv2d(21, 5, 1)

    def forward(self, x):
        return self.head(self.norm(torch.cat([self.a(x), x, self.b(x)], dim=1)).relu())


class Dense(nn.Module):
    """DenseNet: every layer sees all layers before it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(7 + 5 * i, 5, 3, padding=1) for i in range(4))
        self.stem, self.head = nn.Conv2d(3, 7, 1), nn.Conv2d(27, 3, 1)

    def forward(self, x):
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)).relu())
        return self.head(torch.cat(features, 1))


class Split(nn.Module):
    """The halves (or ranges) of one convolution's channels go different ways and meet again by product."""

    def __init__(self, function, channels: int, first: int, **stored: object) -> None:
        super().__init__()
        self.function = function
        self.stem = nn.Conv2d(3, channels, 1)
        self.a, self.b = nn.Conv2d(first, 7, 1), nn.Conv2d(channels - first, 7, 1)
        self.head = nn.Conv2d(7, 5, 1)
        for name, value in stored.items():
            setattr(self, name, value)

    def forward(self, x):
        a, b = self.function(self, self.stem(x))
        return self.head(self.a(a) * self.b(b).relu())


class PaddedShortcut(nn.Module):
    """Option A of CIFAR ResNets: the shortcut is strided and padded with zero channels, by a stored number."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 7, 1), nn.Conv2d(7, 15, 3, stride=2, padding=1)
        self.head, self.extra = nn.Conv2d(15, 5, 1), 4

    def forward(self, x):
        x = self.stem(x).relu()
        return self.head(self.body(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra, self.extra)))


def _upscale() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 28, 1), nn.PixelShuffle(2), nn.Conv2d(7, 5, 3))


def _space_to_depth() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 7, 1), nn.PixelUnshuffle(2), nn.Conv2d(28, 5, 1))


def _two(function) -> nn.Module:
    """``function`` on three activations of equal size, made by three layers."""

    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 11, 1), nn.Conv2d(3, 11, 1), nn.Conv2d(3, 11, 1)
            self.head = nn.Conv2d(11, 5, 1)

        def forward(self, x):
            return self.head(function([self.a(x), self.b(x), self.c(x)]))

    return Three()


CASES = {
    "cat": lambda: (Cat(), image()),
    "cat along space": lambda: (_two(lambda xs: torch.cat(xs, 3)), image()),
    "cat with an empty vector": lambda: (
        _two(lambda xs: torch.cat([torch.zeros(0, dtype=xs[0].dtype), *xs], -1)),
        image(),
    ),
    "dense": lambda: (Dense(), image()),
    "stack": lambda: (_two(lambda xs: torch.stack(xs, 1).amax(1)), image()),
    "stack and unbind": lambda: (_two(lambda xs: sum(torch.stack(xs, -1).unbind(-1))), image()),
    "select": lambda: (_two(lambda xs: torch.stack(xs)[1] + torch.stack(xs, 2).select(2, -1)), image()),
    "select copies": lambda: (
        _two(lambda xs: aten.select_copy(torch.stack(xs), 0, 1) + sum(aten.unbind_copy(torch.stack(xs)))),
        image(),
    ),
    "permute": lambda: (between(lambda x: x.permute(0, 2, 3, 1).sin().movedim(-1, 1)), image()),
    "transpose": lambda: (between(lambda x: x.transpose(1, -1).sin().transpose(-1, 1)), image()),
    "copies": lambda: (
        between(
            lambda x: (
                aten.permute_copy(aten.transpose_copy(x, 1, 2), [0, 2, 1, 3])
                + aten.squeeze_copy(aten.unsqueeze_copy(x, 2), 2)
            )
        ),
        image(),
    ),
    "squeeze": lambda: (between(lambda x: x.unsqueeze(1).unsqueeze(-1).squeeze(1).squeeze(-1)), image()),
    "squeeze in place": lambda: (between(lambda x: x.clone().unsqueeze_(1).squeeze_(1)), image()),
    "t": lambda: (nn.Sequential(nn.Linear(3, 11), Apply(lambda _, x: x.t().sin().t()), nn.Linear(11, 5)), image(7, 3)),
    "slice of space": lambda: (between(lambda x: x[:, :, 1:-2, ::2]), image()),
    "narrow by a stored integer": lambda: (
        Split(lambda m, x: (x.narrow(1, 0, m.part), x[:, m.part :]), 15, 4, part=4),
        image(),
    ),
    "slices by a stored integer": lambda: (
        Split(lambda m, x: (x[:, : m.part], x[:, m.part :]), 15, 4, part=4),
        image(),
    ),
    "slices from the end": lambda: (Split(lambda m, x: (x[:, : -m.part], x[:, -m.part :]), 15, 11, part=4), image()),
    "slices by half the shape": lambda: (
        Split(lambda m, x: (x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]), 14, 7),
        image(),
    ),
    "slice copy": lambda: (
        Split(lambda m, x: (aten.slice_copy(x, 1, 0, x.shape[1] // 2), x[:, x.shape[1] // 2 :]), 14, 7),
        image(),
    ),
    "chunk": lambda: (Split(lambda m, x: x.chunk(2, 1), 14, 7), image()),
    "split by a stored size": lambda: (Split(lambda m, x: x.split(m.part, 1), 14, 7, part=7), image()),
    "split by stored sizes": lambda: (Split(lambda m, x: x.split(m.parts, 1), 15, 4, parts=[4, 11]), image()),
    "split by sizes of layers": lambda: (
        Split(lambda m, x: x.split([m.a.in_channels, m.b.in_channels], 1), 15, 4),
        image(),
    ),
    "split by half the shape": lambda: (Split(lambda m, x: x.split(x.shape[1] // 2, 1), 14, 7), image()),
    "unsafe split": lambda: (Split(lambda m, x: x.unsafe_split(m.part, 1), 14, 7, part=7), image()),
    "unsafe split by sizes": lambda: (
        Split(lambda m, x: x.unsafe_split_with_sizes(m.parts, 1), 15, 4, parts=[4, 11]),
        image(),
    ),
    "split copies": lambda: (Split(lambda m, x: aten.split_copy(x, m.part, 1), 14, 7, part=7), image()),
    "split copies by sizes": lambda: (
        Split(lambda m, x: aten.split_with_sizes_copy(x, m.parts, 1), 15, 4, parts=[4, 11]),
        image(),
    ),
    "glu": lambda: (
        nn.Sequential(
            nn.Conv2d(3, 22, 1), Apply(lambda _, x: x.chunk(2, 1)[0] * x.chunk(2, 1)[1].sigmoid()), nn.Conv2d(11, 5, 1)
        ),
        image(),
    ),
    "pad space": lambda: (between(lambda x: F.pad(x, (1, 2, 0, -1))), image()),
    "padded shortcut": lambda: (PaddedShortcut(), image()),
    "roll along space": lambda: (between(lambda x: x.roll((1, 2), (2, 3))), image()),
    "repeat space": lambda: (between(lambda x: x.mean((2, 3), keepdim=True).repeat(1, 1, 3, 2)), image()),
    "repeat channels": lambda: (between(lambda x: x.repeat(1, 2, 1, 1), 11, 22), image()),
    "pixel shuffle": lambda: (_upscale(), image()),
    "pixel unshuffle": lambda: (_space_to_depth(), image(2, 3, 6, 10)),
}


@pytest.mark.parametrize("name", CASES)
def test_removal_equals_masking(name: str) -> None:
    assert_exact(*CASES[name](), compress.Budget(channels=0.6))


@pytest.mark.parametrize("name", ["narrow by a stored integer", "slices by a stored integer"])
def test_a_stored_bound_follows_what_is_removed_before_it(name: str) -> None:
    model = assert_exact(*CASES[name](), compress.Budget(channels=0.4)).model
    assert model.part == model.a.in_channels < 4 or model.part == model.a.in_channels == 4
    assert model.stem.out_channels == model.a.in_channels + model.b.in_channels < 15


def test_stored_sizes_in_a_list_follow() -> None:
    model = assert_exact(*CASES["split by stored sizes"](), compress.Budget(channels=0.4)).model
    assert model.parts == [model.a.in_channels, model.b.in_channels]
    assert sum(model.parts) == model.stem.out_channels < 15


def test_halves_stay_equal() -> None:
    model = assert_exact(*CASES["chunk"](), compress.Budget(channels=0.4)).model
    assert model.a.in_channels == model.b.in_channels < 7


def test_padding_follows_the_two_sides() -> None:
    """15 = 4 + 7 + 4: the padded zeros go as channels of the body do, and the stored number with them."""
    model = assert_exact(*CASES["padded shortcut"](), compress.Budget(channels=0.4)).model
    assert 2 * model.extra + model.stem.out_channels == model.body.out_channels < 15


LITERALS = {
    "slice": lambda x: (x[:, :4], x[:, 4:]),
    "narrow": lambda x: (x.narrow(1, 0, 4), x.narrow(1, 4, 11)),
    "split": lambda x: x.split([4, 11], 1),
}


@pytest.mark.parametrize("name", LITERALS)
def test_bounds_written_in_code_freeze(name: str) -> None:
    graph = compress.trace(Split(lambda _, x: LITERALS[name](x), 15, 4), image())
    assert "is written in the code" in frozen_reasons(graph, "stem.weight")
    assert_exact(Split(lambda _, x: LITERALS[name](x), 15, 4), image(), compress.Budget(channels=0.7))


def test_what_lies_behind_a_literal_bound_may_go() -> None:
    """Only the elements before the bound are counted by it: of x[:, 4:] any may go."""
    result = assert_exact(Split(lambda _, x: (x[:, :4], x[:, 4:]), 15, 4), image(), compress.Budget(channels=0.7))
    assert result.model.a.in_channels == 4
    assert result.model.b.in_channels < 11


FREEZING = {
    "select": (lambda x: x.select(1, 3)[:, None], 1, "picks positions"),
    "unbind": (lambda x: sum(x.unbind(1))[:, None], 1, "picks positions"),
    "roll": (lambda x: x.roll(1, 1), 11, "moves elements"),
    "roll flat": (lambda x: x.roll(1), 11, "moves elements"),
    "every second": (lambda x: x[:, ::2], 6, "takes every 2th element"),
    "crop": (lambda x: F.pad(x, (0, 0, 0, 0, -2, 0)), 9, "crops the axis"),
    "unequal chunks": (lambda x: x.chunk(2, 1)[0], 6, "unequal parts"),
    "pad by a literal": (lambda x: F.pad(x, (0, 0, 0, 0, 2, 2)), 15, ""),
}


@pytest.mark.parametrize("name", FREEZING)
def test_positions_along_the_channels(name: str) -> None:
    function, after, why = FREEZING[name]
    graph = compress.trace(between(function, 11, after), image())
    if why:
        assert not graph.groups
        assert why in frozen_reasons(graph, "0.weight")
    else:  # zeros of a fixed number may stay beside channels that go
        assert_exact(between(function, 11, after), image())


def test_pixel_shuffle_removes_whole_blocks() -> None:
    up = assert_exact(_upscale(), image()).model
    assert up[0].out_channels == 4 * up[2].in_channels < 28
    down = assert_exact(_space_to_depth(), image(2, 3, 6, 10)).model
    assert down[2].in_channels == 4 * down[0].out_channels < 28
