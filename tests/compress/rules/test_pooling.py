import pytest
import torch
import torch.nn.functional as F
from torch import nn

import compress
from tests.compress.helpers import Apply, assert_exact, between, frozen_reasons, image

aten = torch.ops.aten
SPACE = (9, 7, 5)

# function, number of spatial axes
FUNCTIONS = {
    **{f"max pool {d}d": (lambda x, d=d: getattr(F, f"max_pool{d}d")(x, 2, ceil_mode=True), d) for d in (1, 2, 3)},
    **{f"avg pool {d}d": (lambda x, d=d: getattr(F, f"avg_pool{d}d")(x, 2), d) for d in (1, 2, 3)},
    **{f"adaptive avg {d}d": (lambda x, d=d: getattr(F, f"adaptive_avg_pool{d}d")(x, 2), d) for d in (1, 2, 3)},
    **{f"adaptive avg to one {d}d": (lambda x, d=d: getattr(F, f"adaptive_avg_pool{d}d")(x, 1), d) for d in (1, 2, 3)},
    **{f"adaptive max {d}d": (lambda x, d=d: getattr(F, f"adaptive_max_pool{d}d")(x, 2), d) for d in (1, 2, 3)},
    **{f"nearest {d}d": (lambda x: F.interpolate(x, scale_factor=2, mode="nearest"), d) for d in (1, 2, 3)},
    **{
        f"nearest exact {d}d": (lambda x: F.interpolate(x, scale_factor=1.5, mode="nearest-exact"), d)
        for d in (1, 2, 3)
    },
    "linear": (lambda x: F.interpolate(x, 5, mode="linear"), 1),
    "bilinear": (lambda x: F.interpolate(x, (5, 11), mode="bilinear", align_corners=True), 2),
    "bicubic": (lambda x: F.interpolate(x, (5, 11), mode="bicubic"), 2),
    "trilinear": (lambda x: F.interpolate(x, (5, 3, 7), mode="trilinear"), 3),
    "bilinear antialias": (lambda x: F.interpolate(x, (5, 4), mode="bilinear", antialias=True), 2),
    "bicubic antialias": (lambda x: F.interpolate(x, (5, 4), mode="bicubic", antialias=True), 2),
    **{f"reflect {d}d": (lambda x, d=d: F.pad(x, (1, 2) * d, mode="reflect"), d) for d in (1, 2, 3)},
    **{f"replicate {d}d": (lambda x, d=d: F.pad(x, (1, 2) * d, mode="replicate"), d) for d in (1, 2, 3)},
    "max pool with indices": (lambda x: aten.max_pool2d_with_indices(x, [3, 3])[0], 2),
    "lp pool": (lambda x: F.lp_pool2d(x, 2, 3), 2),
    "global max": (lambda x: x.amax((2, 3), keepdim=True), 2),
}

CASES = {name: (lambda f=f, d=d: (between(f, dims=d), image(2, 3, *SPACE[:d]))) for name, (f, d) in FUNCTIONS.items()}
CASES |= {
    "modules": lambda: (
        nn.Sequential(nn.Conv2d(3, 11, 3, padding=1), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2, ceil_mode=True),
                      nn.Upsample(scale_factor=2), nn.ReflectionPad2d(1), nn.Conv2d(11, 5, 1)), image()),
    "to a stored size": lambda: (
        nn.Sequential(nn.Conv2d(3, 5, 1), nn.AdaptiveAvgPool2d(5), nn.Conv2d(5, 5, 1)), image()),
    "unpooling": lambda: (
        nn.Sequential(nn.Conv2d(3, 11, 1), Apply(lambda _, x: F.max_pool2d(x, 3, return_indices=True)[0]),
                      nn.Conv2d(11, 5, 1)), image()),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_removal_equals_masking(name: str) -> None:
    assert_exact(*CASES[name]())


def test_fractional_pooling_draws_for_every_channel() -> None:
    """Its windows are random for each channel: only the shapes can be promised, so only the graph is checked."""
    graph = compress.trace(between(lambda x: F.fractional_max_pool2d(x, 2, output_ratio=(0.5, 0.5))), image())
    assert [group.num_units for group in graph.groups] in ([11], [])


def test_channels_under_the_window_stay() -> None:
    """A pool over (H, C) as its two spatial axes: neighbours of a channel meet."""
    model = nn.Sequential(nn.Linear(3, 11), Apply(lambda _, x: F.max_pool2d(x, 2)), nn.Linear(5, 5))
    graph = compress.trace(model, image(2, 2, 4, 3))
    assert not any(group.name == "0.weight" for group in graph.groups)
    assert "slides along the axis" in frozen_reasons(graph, "0.weight")


def test_a_size_that_equals_the_channels_by_chance_stays() -> None:
    result = assert_exact(*CASES["to a stored size"]())
    assert result.model[1].output_size == 5
    assert result.model[0].out_channels < 5
