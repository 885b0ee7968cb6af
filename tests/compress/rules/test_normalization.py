import pytest
import torch
import torch.nn.functional as F
from torch import nn

import compress
from layers.functional import bn_act
from tests.compress.helpers import Apply, assert_exact, assert_trains, between, image, lively, outputs

aten = torch.ops.aten
BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _norm(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 15, 3), norm, nn.ReLU(), nn.Conv2d(15, 5, 1))


def _batch_norm(dims: int) -> nn.Module:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    return nn.Sequential(conv(3, 11, 1, bias=False), BATCH_NORM[dims - 1](11), nn.ReLU(), conv(11, 5, 1))


class Functional(nn.Module):
    """Statistics as buffers and the affine pair as raw parameters."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.stem, self.head = nn.Conv2d(3, 11, 3), nn.Conv2d(11, 5, 1)
        self.gamma, self.beta = nn.Parameter(torch.ones(11)), nn.Parameter(torch.zeros(11))
        self.register_buffer("running_mean", torch.zeros(11))
        self.register_buffer("running_var", torch.ones(11))

    def forward(self, x):
        return self.head(self.function(self.stem(x), self.running_mean, self.running_var, self.gamma, self.beta))


CASES = {
    **{f"batch norm {d}d": (lambda d=d: (_batch_norm(d), image(2, 3, *(9, 7, 5)[:d]))) for d in (1, 2, 3)},
    "batch norm of vectors": lambda: (
        nn.Sequential(nn.Linear(3, 11), nn.BatchNorm1d(11), nn.Linear(11, 5)),
        image(3, 3),
    ),
    "without affine": lambda: (_norm(nn.BatchNorm2d(15, affine=False)), image()),
    "without statistics": lambda: (_norm(nn.BatchNorm2d(15, track_running_stats=False)), image()),
    "cumulative average": lambda: (_norm(nn.BatchNorm2d(15, momentum=None)), image()),
    "neither": lambda: (_norm(nn.BatchNorm2d(15, affine=False, track_running_stats=False)), image()),
    "instance norm": lambda: (_norm(nn.InstanceNorm2d(15)), image()),
    "instance norm with all": lambda: (_norm(nn.InstanceNorm2d(15, affine=True, track_running_stats=True)), image()),
    "functional": lambda: (Functional(lambda x, m, v, g, b: F.batch_norm(x, m, v, g, b)), image()),
    "in training mode": lambda: (Functional(lambda x, m, v, g, b: F.batch_norm(x, m, v, g, b, training=True)), image()),
    "native": lambda: (
        Functional(lambda x, m, v, g, b: aten.native_batch_norm(x, g, b, m, v, False, 0.1, 1e-5)[0]),
        image(),
    ),
    "legit": lambda: (
        Functional(lambda x, m, v, g, b: aten._native_batch_norm_legit(x, g, b, m, v, False, 0.1, 1e-5)[0]),
        image(),
    ),
    "legit functional": lambda: (
        Functional(lambda x, m, v, g, b: aten._native_batch_norm_legit_functional(x, g, b, m, v, False, 0.1, 1e-5)[0]),
        image(),
    ),
    "no training": lambda: (
        Functional(lambda x, m, v, g, b: aten._native_batch_norm_legit_no_training(x, g, b, m, v, 0.1, 1e-5)[0]),
        image(),
    ),
    "whole groups": lambda: (_norm(nn.GroupNorm(5, 15)), image()),
    "group norm of as many groups as channels": lambda: (_norm(nn.GroupNorm(15, 15)), image()),
    "group norm without affine": lambda: (_norm(nn.GroupNorm(5, 15, affine=False)), image()),
    "layer norm over space": lambda: (_norm(nn.LayerNorm((7, 5))), image()),
    "layer norm beside": lambda: (
        nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 11), nn.GELU(), nn.Linear(11, 5), nn.LayerNorm(5)),
        image(2, 7, 3),
    ),
}


def _weight_norm() -> nn.Module:
    """Every filter of the first layer has a length of its own; the second consumes as usual."""
    first = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 11, 3))
    return nn.Sequential(first, nn.ReLU(), nn.Conv2d(11, 5, 1))


CASES["weight norm"] = lambda: (_weight_norm(), image())


class Fused(nn.Module):
    """The operator that layers use where kernels are fused."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 15, 3), nn.Conv2d(15, 5, 1)
        self.weight, self.bias = nn.Parameter(torch.rand(15) + 0.5), nn.Parameter(torch.randn(15))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(bn_act(x, x.sigmoid(), weight=self.weight, bias=self.bias, activation="relu")[0])


CASES["fused with residual and activation"] = lambda: (Fused(), image())


@pytest.mark.parametrize("name", CASES)
def test_removal_equals_masking(name: str) -> None:
    assert_exact(*CASES[name]())


def test_whole_groups_keep_the_size_of_a_group() -> None:
    norm = assert_exact(_norm(nn.GroupNorm(5, 15)), image()).model[1]
    assert norm.num_groups < 5
    assert norm.num_channels == 3 * norm.num_groups == norm.weight.shape[0]


# the statistics of these are taken over channels: removing some changes the others
MIXING = {
    "layer norm": lambda: (
        nn.Sequential(nn.Linear(3, 11), nn.LayerNorm(11), nn.Linear(11, 7), nn.ReLU(), nn.Linear(7, 5)),
        image(2, 7, 3),
    ),
    "layer norm without affine": lambda: (
        nn.Sequential(nn.Linear(3, 11), nn.LayerNorm(11, elementwise_affine=False), nn.Linear(11, 7), nn.Linear(7, 5)),
        image(2, 7, 3),
    ),
    "functional layer norm": lambda: (
        nn.Sequential(
            nn.Linear(3, 11), Apply(lambda _, x: F.layer_norm(x, x.shape[-1:])), nn.Linear(11, 7), nn.Linear(7, 5)
        ),
        image(2, 7, 3),
    ),
    "one group": lambda: (
        nn.Sequential(nn.Conv2d(3, 11, 3), nn.GroupNorm(1, 11), nn.Conv2d(11, 7, 1), nn.Conv2d(7, 5, 1)),
        image(),
    ),
}


@pytest.mark.parametrize("name", MIXING)
def test_norms_over_the_channels_are_not_exact_and_say_so(name: str) -> None:
    model, inputs = MIXING[name]()
    lively(model).float()
    result = compress.prune(model, inputs, budget=compress.Budget(channels=0.5))
    assert not result.plan.exact
    assert any("takes its statistics over the channels" in group.inexact for group in result.plan.groups)
    assert outputs(result.model, inputs)[0].shape == outputs(model, inputs)[0].shape
    assert_trains(result.model, inputs)


@pytest.mark.parametrize("name", MIXING)
def test_exact_only_leaves_them_whole(name: str) -> None:
    model, inputs = MIXING[name]()
    result = assert_exact(model, inputs, compress.Budget(channels=0.7), exact_only=True)
    assert not any(member.parameter.startswith("0.") for member in result.plan.members())
    assert any(member.parameter.startswith("2.") for member in result.plan.members())


def test_rms_norm_is_not_exact_either() -> None:
    model = nn.Sequential(nn.Linear(3, 11), nn.RMSNorm(11), nn.Linear(11, 5))
    groups = compress.trace(model, image(2, 7, 3)).groups
    assert all(not group.exact for group in groups)


def test_a_normalized_shape_written_in_code_freezes() -> None:
    model = nn.Sequential(nn.Linear(3, 11), Apply(lambda _, x: F.layer_norm(x, (11,))), nn.Linear(11, 5))
    assert not compress.trace(model, image(2, 7, 3)).groups


def test_batch_norm_alone_before_the_output_stays() -> None:
    assert not compress.trace(between(lambda x: x)[:1].append(nn.BatchNorm2d(11)), image()).groups


class Standardised(nn.Conv2d):
    """Weight standardisation by batch norm, as in timm's ``StdConv2d``: (1, rows, the rest) over the rest."""

    def forward(self, x):
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias)


def test_weights_standardised_by_batch_norm_go_exactly_by_row_and_not_by_column() -> None:
    model = nn.Sequential(nn.Conv2d(3, 13, 1), nn.ReLU(), Standardised(13, 11, 3), nn.ReLU(), nn.Conv2d(11, 5, 1))
    exact = {group.num_units: group.exact for group in compress.trace(model, image()).groups}
    assert exact == {13: False, 11: True}
    result = assert_exact(model, image(), compress.Budget(channels=0.6), exact_only=True)
    assert result.model[2].out_channels < 11
    both = compress.prune(model.float(), image(), budget=compress.Budget(channels=0.5))
    assert not both.plan.exact
    assert_trains(both.model, image())


class TokensNormed(nn.Module):
    """Batch norm whose channels are the tokens: the features are what its statistics would be taken over."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Linear(3, 11), nn.BatchNorm1d(7), nn.Linear(11, 5)

    def forward(self, x):
        return self.head(self.norm(self.stem(x)))


def test_batch_norm_with_running_statistics_mixes_nothing() -> None:
    result = assert_exact(TokensNormed(), image(2, 7, 3), compress.Budget(channels=0.5))
    assert result.model.stem.out_features < 11


def test_the_sizes_of_an_rms_norm_follow() -> None:
    """It is taken apart before operators are seen, but asks for the sizes that it was made with."""
    model = nn.Sequential(nn.Linear(3, 11), nn.RMSNorm(11), nn.Linear(11, 5))
    result = compress.prune(model, image(2, 7, 3), budget=compress.Budget(channels=0.5))
    assert result.model[1].normalized_shape == (result.model[0].out_features,)
    assert result.model[0].out_features < 11
    assert not result.plan.exact
    assert_trains(result.model, image(2, 7, 3))
