"""Blocks, and models of others, on the fused operators: the numbers of the same models without.

The functions whose name begins with `check` run under the interpreter, in the process of test_operators.
"""

import copy
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, fx, nn

import layers
from layers.functional import bn_act
from layers.inference import kernels as inference
from layers.inference.fuse import Activation, FusedLayer
from layers.kernels import conv_bn_act
from layers.kernels.conv_bn_act import NormArguments, activation_name, batch_norm_act
from layers.models.resnet_cifar import BasicBlock
from tests.compress.helpers import assert_exact

TOLERANCE = 1e-4  # of the norm of a tensor in float32


def trained(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, gradients of input and parameters, and buffers of one step."""
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None), *model.buffers()]


def errors(actual: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Of each tensor, relative to its norm."""
    pairs = zip(actual, expected, strict=True)
    return [float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-3)) for a, b in pairs]


def assert_near(model: nn.Module, plain: nn.Module, x: Tensor) -> None:
    """To `plain` in float64, where `plain` in float32 is: sums that cancel are exact in neither."""
    expected, rounded = (
        trained(copy.deepcopy(plain).to(dtype), x.to(dtype)) for dtype in (torch.float64, torch.float32)
    )
    found, usual = errors(trained(model, x), expected), errors(rounded, expected)
    assert all(error <= max(TOLERANCE, 10 * other) for error, other in zip(found, usual, strict=True)), (found, usual)


@contextmanager
def counted_calls() -> Any:
    """Calls of the kernels: [forward, backward, recomputed]."""
    from layers.kernels import bn_act_triton

    names, counts = ("forward", "backward", "apply"), {"forward": 0, "backward": 0, "apply": 0}
    plain = {name: getattr(bn_act_triton, name) for name in names}

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            counts[name] += 1
            return plain[name](*args)

        return call

    try:
        for name in names:
            setattr(bn_act_triton, name, counting(name))
        yield counts
    finally:
        for name in names:
            setattr(bn_act_triton, name, plain[name])


def image(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


class Spellings(nn.Module):
    """Additions and activations by all names; what must not be joined; and a norm that nothing follows."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(8))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, 0.2, 1)  # at 0 and 1, some gradients are rounding errors alone
        self.relu6 = nn.ReLU6(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        a = self.relu6(self.norms[0](x))
        b = torch.add(a, self.norms[1](x)).relu()
        c = self.norms[2](b).add_(a).relu_()
        d = F.silu(self.norms[3](c) + b)  # a residual, and then the operator has no silu
        e = self.norms[4](d)
        e = F.relu(e) + e  # read twice
        f = self.norms[5](e) + self.norms[5].weight.view(-1, 1, 1)  # broadcast
        g = self.norms[6](f * f)
        return self.norms[7](torch.relu(g) * f)  # nothing follows


def small_resnet() -> nn.Module:
    """torchvision's, with few channels."""
    model = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 0, 0], num_classes=3)
    model.layer3, model.layer4, model.fc = nn.Identity(), nn.Identity(), nn.Linear(512, 3)
    return model


def check_blocks() -> None:
    """Every block is one call of the operator for each batch norm, shortcuts included."""
    body = nn.Sequential(layers.ConvBNAct(4, 8, 3, stride=2), layers.ConvBNAct(8, 6, 3, activation=None))
    residual = layers.Residual(body, layers.projection(4, 6, stride=2), activation="relu")
    cases: list[tuple[nn.Module, int]] = [
        (layers.ConvBNAct(4, 6, 3, activation="relu6"), 1),
        (residual, 3),
        (layers.Bottleneck(4, 2, out_channels=4), 3),
        (BasicBlock(4, 8, 2), 2),
    ]
    for block, count in cases:
        x = image(2, 4, 6, 5)
        expected = trained(copy.deepcopy(block).double(), x.double())  # for which there are no kernels
        with counted_calls() as counts:
            found = errors(trained(block, x), expected)
        assert max(found) < TOLERANCE, found
        assert (counts["forward"], counts["backward"]) == (count, count), counts
    handle = residual.body[1].norm.register_forward_hook(lambda *_: None)
    with counted_calls() as counts:
        trained(residual, image(2, 4, 6, 5))
    assert counts["forward"] == 2, "a norm whose calls somebody watches is called"
    handle.remove()


def check_models() -> None:
    """optimize_for_training and memory_efficient on models that know nothing of `layers`."""
    for build, shape, count in ((Spellings, (2, 4, 5, 3), 5), (small_resnet, (2, 3, 33, 33), 7)):
        model, x = build(), image(*shape)
        optimised = layers.optimize_for_training(copy.deepcopy(model))
        with counted_calls() as counts:
            assert_near(optimised, model, x)
        assert (counts["forward"], counts["backward"]) == (count, count), counts
    with counted_calls() as counts:
        assert_near(layers.memory_efficient(copy.deepcopy(model)), model, x)
    assert counts["apply"] >= 5, counts  # norms are computed again, with their activation


def check_inference() -> None:
    """What optimize_for_inference may choose, and times, on CUDA."""
    conv, options = torch.ops.aten.conv2d.default, ([2, 1], [1, 1], [1, 1], 1)
    x, weight, bias = image(2, 4, 6, 5), torch.randn(8, 4, 3, 3), torch.randn(8)
    rows, matrix = torch.randn(5, 4), torch.randn(8, 4)
    linear = torch.ops.aten.linear.default
    relu6 = Activation("hardtanh", (0.0, 6.0))
    for layer, inputs in (
        (FusedLayer(conv, options, activation=Activation("relu")), (x, weight, bias)),
        (FusedLayer(conv, options, residual=True, activation=relu6), (x, weight, None, image(2, 8, 3, 5))),
        (FusedLayer(linear, residual=True), (rows, matrix, bias, torch.randn(5, 8))),
    ):
        found = {type(kernel): (kernel, constants) for kernel, constants in inference.kernels(layer, *inputs[:3])}
        kernel, constants = found[inference.Fused]
        torch.testing.assert_close(kernel(inputs[0], *constants, *inputs[3:]), layer(*inputs), rtol=1e-4, atol=1e-4)
    unknown = FusedLayer(conv, options, activation=Activation("hardtanh", (-1.0, 1.0)))
    assert inference.Fused not in {type(kernel) for kernel, _ in inference.kernels(unknown, x, weight, bias)}


CHECKS = (check_blocks, check_models, check_inference)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", [None, F.relu, nn.ReLU6(), nn.Tanh(), F.silu])
def test_one_operator_is_the_steps(monkeypatch: pytest.MonkeyPatch, activation: Any, residual: bool) -> None:
    """On the CPU's form of the operator, which is not what blocks choose there."""
    x = torch.randn(3, 4, 5, 2, dtype=torch.float64)
    other = torch.randn_like(x) if residual else None
    results = []
    for joined in (True, False):
        monkeypatch.setattr(conv_bn_act, "fuses", lambda x, joined=joined: joined)
        mean, var = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
        weight = torch.linspace(-1, 2, 4, dtype=torch.float64, requires_grad=True)
        y = batch_norm_act(x, NormArguments(mean, var, weight, training=True, momentum=0.3), activation, other)
        results.append((y, *torch.autograd.grad(y.square().sum(), weight), mean, var))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_names_of_activations() -> None:
    relu = nn.ReLU()
    assert activation_name(relu) == activation_name(torch.relu) == "relu"
    assert activation_name(None) == activation_name(nn.Identity()) == "none"
    assert activation_name(nn.GELU()) is None
    relu.register_forward_hook(lambda *_: None)
    assert activation_name(relu) is None


def test_blocks_can_be_traced_symbolically() -> None:
    for block in (BasicBlock(4, 8, 2), layers.Bottleneck(4, 2, out_channels=4)):
        x = torch.randn(2, 4, 6, 5)
        traced = fx.symbolic_trace(block)
        assert any(isinstance(module, nn.BatchNorm2d) for module in traced.modules())
        torch.testing.assert_close(traced.eval()(x), block.eval()(x))


def test_without_kernels_calls_stay() -> None:
    model, x = Spellings(), torch.randn(2, 4, 5, 3)
    expected = trained(copy.deepcopy(model), x)
    for actual, wanted in zip(trained(layers.optimize_for_training(model), x), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


class Fused(nn.Module):
    """As a block is traced in training on a device with kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if self.training:
            return self.second(bn_act(y, y, weight=self.norm.weight, bias=self.norm.bias)[0])
        return self.second(F.relu(self.norm(y) + y))


def test_compress_sees_through_the_operator() -> None:
    result = assert_exact(Fused(), torch.randn(2, 3, 7, 6))
    assert {"first.weight", "norm.weight", "second.weight"} <= {member.parameter for member in result.plan.members()}
