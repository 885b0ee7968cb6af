"""ConvBNAct against the composition that it stands for; convolutions against their formula."""

import copy
import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import layers
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


def test_even_kernel_without_padding() -> None:
    with pytest.raises(ValueError, match="ConvBNAct: kernel_size must be odd .* but is 4"):
        ConvBNAct(3, 4, 4)
    assert ConvBNAct(3, 4, 4, padding=1).conv.padding == (1, 1)


def by_hand(x: np.ndarray, conv: nn.Module) -> np.ndarray:
    """The formula of the docstrings: one dot product for each output position."""
    weight, bias = conv.weight.detach().numpy(), conv.bias.detach().numpy()
    pads = [(0, 0), (0, 0), *((p, p) for p in conv.padding)]
    x = np.pad(x, pads)
    window = [d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    steps = [range(0, n - w + 1, s) for n, w, s in zip(x.shape[2:], window, conv.stride, strict=True)]
    y = np.zeros((x.shape[0], weight.shape[0], *map(len, steps)))
    per_in, per_out = weight.shape[1], weight.shape[0] // conv.groups
    for place in itertools.product(*(range(len(s)) for s in steps)):
        cut = tuple(slice(s[i], s[i] + w, d) for s, i, w, d in zip(steps, place, window, conv.dilation, strict=True))
        patch = x[(slice(None), slice(None), *cut)]
        for o in range(weight.shape[0]):
            group = o // per_out
            channels = patch[:, group * per_in : (group + 1) * per_in]
            y[(slice(None), o, *place)] = (channels * weight[o]).sum(tuple(range(1, x.ndim))) + bias[o]
    return y


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: layers.Conv1d(4, 6, 3, stride=2, padding=2, dilation=3, groups=2), (2, 4, 11)),
        (lambda: layers.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(0, 1), dilation=(2, 1), groups=2), (2, 4, 9, 7)),
        (lambda: layers.Conv2d(3, 5, 2, stride=3), (2, 3, 9, 7)),
        (lambda: layers.Conv3d(4, 2, (1, 3, 2), stride=(2, 1, 1), padding=(0, 1, 1)), (2, 4, 3, 4, 5)),
    ],
)
def test_convolution_is_the_formula(layer: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    conv, x = layer().double(), torch.randn(shape, dtype=torch.float64)
    np.testing.assert_allclose(conv(x).detach().numpy(), by_hand(x.numpy(), conv), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "shape"), [("1d", (2, 4, 11)), ("2d", (2, 4, 9, 8)), ("3d", (2, 4, 5, 3, 5))], ids=["1d", "2d", "3d"]
)
def test_transposed_convolution_is_the_adjoint(kind: str, shape: tuple[int, ...]) -> None:
    options = {"stride": 2, "padding": 1, "groups": 2, "bias": False}
    conv = getattr(layers, f"Conv{kind}")(4, 6, 3, **options).double()
    transposed = getattr(layers, f"ConvTranspose{kind}")(6, 4, 3, **options).double()
    transposed.weight = conv.weight
    x = torch.randn(shape, dtype=torch.float64)
    y = conv(x)
    z = torch.randn_like(y)
    back = transposed(z, output_size=shape[2:])
    torch.testing.assert_close((y * z).sum(), (x * back).sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["1d", "2d", "3d"])
def test_separable_convolution_is_one_of_rank_one(kind: str) -> None:
    num_axes = int(kind[0])
    layer = getattr(layers, f"SeparableConv{kind}")(4, 6, 3, stride=2).double()
    dense = getattr(layers, f"Conv{kind}")(4, 6, 3, stride=2, padding=1).double()
    with torch.no_grad():
        depthwise, pointwise = layer.depthwise.weight, layer.pointwise.weight
        dense.weight.copy_(pointwise.reshape(6, 4, *(1,) * num_axes) * depthwise[:, 0])
        dense.bias.copy_(layer.pointwise.bias)
    x = torch.randn(2, 4, *(7, 5, 6)[:num_axes], dtype=torch.float64)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-12, atol=1e-12)


def test_input_smaller_than_the_kernel() -> None:
    conv = layers.Conv2d(3, 4, 3, dilation=2, padding=1)
    assert conv(torch.zeros(1, 3, 3, 5)).shape == (1, 4, 1, 3)
    with pytest.raises(ValueError, match="Conv2d: input with its padding must be at least 5 x 5, but is 4 x 7"):
        conv(torch.zeros(1, 3, 2, 5))
