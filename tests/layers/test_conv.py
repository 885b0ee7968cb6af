"""ConvBNAct against the composition of the modules of torch.nn that it stands for."""

import copy

import pytest
import torch
from torch import Tensor, nn

from layers import ConvBNAct


def composition(layer: ConvBNAct) -> nn.Sequential:
    """The same three modules, each called by itself."""
    layer = copy.deepcopy(layer)
    return nn.Sequential(layer.conv, layer.norm, layer.activation or nn.Identity())


def randomise(layer: ConvBNAct) -> None:
    for tensor in (*layer.parameters(), layer.norm.running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(layer.norm.running_var, 0.1, 2)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("activation", ["relu", None, nn.SiLU()])
def test_is_the_composition(training: bool, momentum: float | None, activation: str | nn.Module | None) -> None:
    layer = ConvBNAct(6, 4, 3, stride=2, dilation=2, groups=2, activation=activation, dtype=torch.float64).train(
        training
    )
    randomise(layer)
    layer.norm.momentum = momentum
    expected = composition(layer)
    for _ in range(3):  # the running statistics and the count move with every batch
        x = torch.randn(5, 6, 9, 7, dtype=torch.float64)
        torch.testing.assert_close(layer(x), expected(x), rtol=1e-12, atol=1e-12)
    for name, buffer in layer.norm.named_buffers():
        torch.testing.assert_close(buffer, expected[1].get_buffer(name))


@pytest.mark.parametrize(("affine", "track"), [(False, True), (True, False)])
def test_norm_without_parameters_or_statistics(affine: bool, track: bool) -> None:
    layer = ConvBNAct(3, 5, 1)
    layer.norm = nn.BatchNorm2d(5, affine=affine, track_running_stats=track)
    expected = composition(layer)
    x = torch.randn(4, 3, 6, 6)
    for training in (True, False):
        torch.testing.assert_close(layer.train(training)(x), expected.train(training)(x))


def test_gradients_are_those_of_the_composition() -> None:
    layer = ConvBNAct(3, 5, 3, dtype=torch.float64)
    randomise(layer)
    expected = composition(layer)
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    target = torch.randn(4, 5, 6, 6, dtype=torch.float64)
    for module in (layer, expected):
        (module(x) * target).sum().backward()
    for actual, wanted in zip(layer.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, wanted.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("kernel_size", "dilation"), [(1, 1), (3, 1), (5, 1), (3, 3)])
def test_default_padding_keeps_the_size(kernel_size: int, dilation: int) -> None:
    layer = ConvBNAct(2, 3, kernel_size, dilation=dilation)
    assert layer(torch.zeros(2, 2, 11, 8)).shape == (2, 3, 11, 8)


def test_children_may_be_replaced() -> None:
    layer = ConvBNAct(3, 4, 3).eval()
    layer.conv = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Conv2d(2, 4, 3, padding=1))
    layer.norm = nn.GroupNorm(2, 4)
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(layer(x), composition(layer)(x))


@pytest.mark.parametrize("child", ["conv", "norm"])
def test_hooks_of_the_children_run(child: str) -> None:
    layer = ConvBNAct(3, 4, 3).eval()
    seen: list[Tensor] = []
    handle = getattr(layer, child).register_forward_hook(
        lambda module, args, output: seen.append(output.detach().clone())
    )
    x = torch.randn(2, 3, 5, 5)
    watched = layer(x)
    handle.remove()
    assert len(seen) == 1
    torch.testing.assert_close(watched, layer(x))


def test_weight_norm_is_respected() -> None:
    layer = ConvBNAct(3, 4, 3).eval()
    nn.utils.parametrizations.weight_norm(layer.conv)
    with torch.no_grad():
        layer.conv.parametrizations.weight.original0.mul_(3)
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(layer(x), composition(layer)(x))


def test_unknown_activation() -> None:
    with pytest.raises(ValueError, match="'swish'.*torch.nn.Module"):
        ConvBNAct(3, 4, 3, activation="swish")
