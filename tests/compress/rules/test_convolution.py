import pytest
import torch
import torch.nn.functional as F
from torch import nn

import compress
from tests.compress.helpers import Apply, assert_exact, frozen_reasons, image

CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
SPACE = (9, 7, 5)


def _input(dims: int, channels: int = 3):
    return image(2, channels, *SPACE[:dims])


def _plain(dims: int) -> nn.Module:
    conv = CONV[dims - 1]
    return nn.Sequential(conv(3, 11, 3, stride=2, padding=1, bias=False), nn.ReLU(), conv(11, 7, 1), conv(7, 5, 2))


def _transposed(dims: int) -> nn.Module:
    up, conv = TRANSPOSED[dims - 1], CONV[dims - 1]
    return nn.Sequential(up(3, 11, 3, stride=2, output_padding=1), nn.ReLU(), up(11, 7, 2, bias=False), conv(7, 5, 1))


def _depthwise(multiplier: int, conv=nn.Conv2d) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 7, 1), conv(7, 7 * multiplier, 3, groups=7), nn.ReLU(), nn.Conv2d(7 * multiplier, 5, 1)
    )


def _grouped(per_group_in: int, per_group_out: int, groups: int, conv=nn.Conv2d) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, per_group_in * groups, 1),
        conv(per_group_in * groups, per_group_out * groups, 3, groups=groups, padding=1),
        nn.Conv2d(per_group_out * groups, 5, 1),
    )


class Functional(nn.Module):
    """Raw parameters, used by functional calls; the first weight twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(11, 3, 3, 3)), nn.Parameter(torch.randn(5, 11, 1, 1))
        self.bias = nn.Parameter(torch.randn(11))

    def forward(self, x):
        sum_of_two = F.conv2d(x, self.first, self.bias) + F.conv2d(x.square(), self.first)
        return F.conv2d(sum_of_two.relu(), self.second)


class Shared(nn.Module):
    """One convolution called twice, so that its inputs and outputs are one set of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 11, 1), nn.Conv2d(11, 11, 3, padding=1), nn.Conv2d(11, 5, 1)

    def forward(self, x):
        return self.head(self.body(self.body(self.stem(x)).relu()))


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 11, 3), nn.Conv2d(3, 11, 3), nn.Conv2d(22, 5, 1)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.head(torch.cat([self.a(x), self.b(x.tanh())], 1))


CASES = {
    **{f"plain {d}d": (lambda d=d: (_plain(d), _input(d))) for d in (1, 2, 3)},
    **{f"transposed {d}d": (lambda d=d: (_transposed(d), _input(d))) for d in (1, 2, 3)},
    "depthwise": lambda: (_depthwise(1), image()),
    "depth multiplier 2": lambda: (_depthwise(2), image()),
    "depth multiplier 3, transposed": lambda: (_depthwise(3, nn.ConvTranspose2d), image()),
    "grouped by position": lambda: (_grouped(5, 7, 3), image()),
    "grouped by position, transposed": lambda: (_grouped(5, 7, 3, nn.ConvTranspose2d), image()),
    "whole groups": lambda: (_grouped(2, 3, 7), image()),
    "whole groups, transposed": lambda: (_grouped(2, 3, 7, nn.ConvTranspose2d), image()),
    "two grouped in a row": lambda: (
        nn.Sequential(nn.Conv2d(3, 15, 1), nn.Conv2d(15, 15, 3, groups=3), nn.ReLU(),
                      nn.Conv2d(15, 15, 1, groups=5), nn.Conv2d(15, 5, 1)), image()),
    "dilated": lambda: (nn.Sequential(nn.Conv2d(3, 11, 3, dilation=2, padding="same"), nn.Conv2d(11, 5, 1)), image()),
    "circular": lambda: (
        nn.Sequential(nn.Conv2d(3, 11, 3, padding=1, padding_mode="circular"), nn.Conv2d(11, 5, 1)), image()),
    "functional": lambda: (Functional(), image()),
    "shared": lambda: (Shared(), image()),
    "tied": lambda: (Tied(), image()),
    "kernel as large as the channels": lambda: (
        nn.Sequential(nn.Conv2d(3, 7, 7, padding=3), nn.Conv2d(7, 7, 7, padding=3), nn.Conv2d(7, 5, 1)), image()),
    "channels as many as groups": lambda: (
        nn.Sequential(nn.Conv2d(3, 9, 1), nn.Conv2d(9, 9, 3, groups=3), nn.Conv2d(9, 9, 1), nn.Conv2d(9, 5, 1)),
        image(2, 3, 9, 9)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_removal_equals_masking(name: str) -> None:
    assert_exact(*CASES[name]())


def test_layers_describe_their_new_sizes() -> None:
    result = assert_exact(_depthwise(2), image())
    first, middle, _, last = result.model
    assert middle.groups == middle.in_channels == first.out_channels < 7
    assert middle.out_channels == last.in_channels == 2 * first.out_channels == middle.weight.shape[0]
    up = assert_exact(_transposed(2), image()).model[2]
    assert (up.in_channels, up.out_channels) == up.weight.shape[:2]


def test_grouped_by_position_keeps_the_number_of_groups() -> None:
    middle = assert_exact(_grouped(5, 7, 3), image()).model[1]
    assert middle.groups == 3
    assert middle.in_channels < 15
    assert middle.in_channels % 3 == 0
    assert middle.out_channels % 3 == 0


def test_whole_groups_keep_the_size_of_a_group() -> None:
    middle = assert_exact(_grouped(2, 3, 7), image()).model[1]
    assert middle.groups < 7
    assert middle.in_channels == 2 * middle.groups
    assert middle.out_channels == 3 * middle.groups
    assert middle.weight.shape[1] == 2


def test_members_and_roles_of_a_plain_convolution() -> None:
    first, second = compress.trace(
        nn.Sequential(nn.Conv2d(3, 11, 3), nn.Conv2d(11, 7, 3), nn.Conv2d(7, 5, 1)), image()
    ).groups
    assert {(m.parameter, m.axis, m.role, m.size) for m in first.members} == {
        ("0.weight", 0, "producer", 11), ("0.bias", 0, "carrier", 11), ("1.weight", 1, "consumer", 11)}  # fmt: skip
    assert (first.num_units, second.num_units) == (11, 7)


def test_the_number_of_groups_written_in_code_freezes_depthwise() -> None:
    class Literal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 7, 1), nn.Conv2d(7, 5, 1)
            self.weight = nn.Parameter(torch.randn(7, 1, 3, 3))

        def forward(self, x):
            return self.head(F.conv2d(self.stem(x), self.weight, groups=7))

    graph = compress.trace(Literal(), image())
    assert not graph.groups
    assert "the number 7 is written in the code" in frozen_reasons(graph, "stem.weight")


def test_the_number_of_groups_read_from_the_shape_follows() -> None:
    class Shaped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 7, 1), nn.Conv2d(7, 5, 1)
            self.weight = nn.Parameter(torch.randn(7, 1, 3, 3))

        def forward(self, x):
            x = self.stem(x)
            return self.head(F.conv2d(x, self.weight, groups=x.shape[1]))

    assert_exact(Shaped(), image())


def test_an_unbatched_input_freezes_nothing_wrong() -> None:
    """Convolution of an image without a batch axis: exact or frozen, never wrong."""
    model = nn.Sequential(nn.Conv2d(3, 11, 3), nn.ReLU(), nn.Conv2d(11, 5, 1))
    assert_exact(model, image(3, 9, 7))


def test_space_that_could_shrink_is_frozen() -> None:
    """Channels turned into a spatial axis: the kernel would see other neighbours."""
    model = nn.Sequential(
        nn.Conv2d(3, 11, 1), Apply(lambda _, x: x.transpose(1, 2)), nn.Conv2d(9, 5, 3), Apply(lambda _, x: x.sum(2))
    )
    graph = compress.trace(model, image())
    assert not graph.groups
    assert "slides along the axis" in frozen_reasons(graph, "0.weight")
