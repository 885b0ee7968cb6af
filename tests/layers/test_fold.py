"""fold_batch_norm computes the same function, and leaves alone what it cannot fold exactly."""

import copy
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn

import layers
from layers import ConvBNAct, fold_batch_norm
from tests.layers.catalogue import EXAMPLES, Example
from tests.layers.models.test_models import inputs as model_inputs

NORMS = (nn.modules.batchnorm._BatchNorm, torchvision.ops.FrozenBatchNorm2d)


def randomise(model: nn.Module) -> nn.Module:
    """Statistics and scales as after training, in float64."""
    model = model.double()
    for module in model.modules():
        if isinstance(module, NORMS):
            for tensor in (module.running_mean, module.bias):
                if tensor is not None:
                    tensor.data.normal_(0, 0.3)
            for tensor in (module.running_var, module.weight):
                if tensor is not None:
                    tensor.data.uniform_(0.5, 1.5)
    return model.eval()


def num_norms(model: nn.Module) -> int:
    return sum(isinstance(module, NORMS) for module in model.modules())


@torch.no_grad()
def check(model: nn.Module, *inputs: Tensor, left: int) -> nn.Module:
    """Folding changes neither the function nor the argument; `left` norms stay."""
    randomise(model)
    state = copy.deepcopy(model.state_dict())
    folded = fold_batch_norm(model)
    expected, actual = model(*inputs), folded(*inputs)
    assert (actual - expected).abs().max() <= 1e-10 * expected.abs().max()
    assert num_norms(folded) == left
    assert not folded.training
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    return folded


def image(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("name", layers.models.__all__)
def test_models_of_layers(name: str) -> None:
    check(getattr(layers.models, name)(), model_inputs(name, 2, torch.float64), left=0)


@pytest.mark.parametrize(
    ("build", "left"),
    [
        (torchvision.models.resnet18, 0),
        (torchvision.models.mobilenet_v2, 0),
        # Norms come before convolutions here. Only the second norm of each of the 58 dense layers, and the stem's,
        # follow a convolution that nothing else reads; 62 of 121 stay.
        (torchvision.models.densenet121, 62),
    ],
)
def test_models_of_torchvision(build: Callable[..., nn.Module], left: int) -> None:
    check(build(weights=None), image(1, 3, 40, 40), left=left)


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Linear(3, 6), nn.BatchNorm1d(6), (5, 3)),
        (nn.Conv1d(3, 6, 2), nn.BatchNorm1d(6), (5, 3, 7)),
        (nn.Conv2d(3, 6, 2, groups=3, bias=False), nn.BatchNorm2d(6, affine=False), (5, 3, 7, 4)),
        (nn.Conv2d(3, 6, 2, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6), (5, 3, 7, 4)),
        (nn.Conv3d(3, 6, 2), nn.BatchNorm3d(6, eps=0.1), (5, 3, 4, 3, 2)),
        (nn.ConvTranspose1d(4, 6, 3, groups=2), nn.BatchNorm1d(6), (5, 4, 7)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, bias=False), nn.BatchNorm2d(6), (5, 4, 3, 2)),
        (nn.ConvTranspose3d(4, 6, 2), nn.BatchNorm3d(6), (2, 4, 3, 2, 2)),
        (nn.Conv2d(3, 6, 2), torchvision.ops.FrozenBatchNorm2d(6), (5, 3, 7, 4)),
    ],
)
def test_every_kind_of_layer(layer: nn.Module, norm: nn.Module, shape: tuple[int, ...]) -> None:
    folded = check(nn.Sequential(layer, norm, nn.ReLU(inplace=True)), image(*shape), left=0)
    assert isinstance(folded[1], nn.Identity)


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (layers.Conv1d(3, 6, 2), layers.BatchNorm1d(6), (5, 3, 7)),
        (layers.Conv2d(3, 6, 2, groups=3), layers.BatchNorm2d(6), (5, 3, 7, 4)),
        (layers.Conv3d(3, 6, 2), layers.BatchNorm3d(6), (5, 3, 4, 3, 2)),
        (layers.ConvTranspose1d(4, 6, 3, groups=2), layers.BatchNorm1d(6), (5, 4, 7)),
        (layers.ConvTranspose2d(4, 6, 3, groups=2), layers.BatchNorm2d(6), (5, 4, 3, 2)),
        (layers.ConvTranspose3d(4, 6, 2), layers.BatchNorm3d(6), (2, 4, 3, 2, 2)),
        (layers.SeparableConv2d(3, 6, 3), layers.BatchNorm2d(6), (5, 3, 7, 4)),
        (layers.LowRankLinear(3, 6, 2), layers.BatchNorm1d(6), (5, 3)),
    ],
)
def test_layers_that_check_their_input(layer: nn.Module, norm: nn.Module, shape: tuple[int, ...]) -> None:
    check(nn.Sequential(layer, norm), image(*shape), left=0)


class Beside(nn.Module):
    """A block of the catalogue in a model that has a norm to fold as well."""

    def __init__(self, example: Example) -> None:
        super().__init__()
        self.block, self.extra = example.make(), example.extra
        self.conv, self.norm = layers.Conv1d(3, 4, 3), layers.BatchNorm1d(4)

    def forward(self, x: Tensor, signal: Tensor) -> tuple[Tensor, Tensor]:
        return self.block(x, *self.extra), self.norm(self.conv(signal))


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_block_of_the_catalogue(name: str) -> None:
    model = randomise(Beside(EXAMPLES[name]))
    x, signal = EXAMPLES[name].input(), image(2, 3, 7)
    folded = fold_batch_norm(model)
    torch.testing.assert_close(folded(x, signal), model(x, signal), rtol=1e-10, atol=1e-10)
    assert num_norms(folded) == isinstance(model.block, NORMS)  # a norm alone has no layer to go into


def test_conv_bn_act_alone_and_inside() -> None:
    assert check(ConvBNAct(3, 4, 3), image(2, 3, 5, 5), left=0).norm.__class__ is nn.Identity
    model = nn.Sequential(ConvBNAct(3, 4, 3), ConvBNAct(4, 5, 1, activation=None), ConvBNAct(5, 5, 3))
    model[1].conv = nn.Sequential(nn.Conv2d(4, 2, 1), nn.Conv2d(2, 5, 3))  # as after a factorisation
    model[2].conv = model[0].norm = nn.Identity()
    check(model, image(2, 3, 5, 5), left=1)


def test_norm_without_statistics_stays() -> None:
    check(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), image(2, 3, 5, 5), left=1)


class SharedConv(nn.Module):
    """One convolution under one norm for each of two inputs, or under the same norm for both."""

    def __init__(self, *, same_norm: bool) -> None:
        super().__init__()
        self.conv, self.first = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.second = self.first if same_norm else nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(self.conv(x)) + 2 * self.second(self.conv(-x))


def test_shared_conv() -> None:
    check(SharedConv(same_norm=False), image(2, 3, 5, 5), left=2)
    folded = check(SharedConv(same_norm=True), image(2, 3, 5, 5), left=0)
    assert folded.first is folded.second


class SharedNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.norm = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.left(x)) + self.norm(self.right(x))


class OtherConsumer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y


class ReadsWeight(nn.Module):
    """Uses the weight of its convolution beside calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) * self.conv.weight.square().sum()


class ReadsStatistics(nn.Module):
    """Uses the running variance of its norm beside calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) * self.norm.running_var.sum()


class TiedWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.tied = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3)
        self.tied.weight = self.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(self.norm(self.conv(x)))


class NotNext(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x).relu())


@pytest.mark.parametrize("build", [SharedNorm, OtherConsumer, ReadsWeight, ReadsStatistics, TiedWeights, NotNext])
def test_what_must_stay(build: Callable[[], nn.Module]) -> None:
    check(build(), image(2, 3, 7, 7), left=1)


class NormThatActivates(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class ConvOfAbsolute(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight.abs(), bias)


class ConvWithDefaults(layers.Conv2d):
    """Made and described in another way, but computes the same."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def extra_repr(self) -> str:
        return f"channels={self.in_channels}"


@pytest.mark.parametrize(
    ("layer", "norm", "left"),
    [
        (nn.Conv2d(3, 3, 3), NormThatActivates(3), 1),
        (ConvOfAbsolute(3, 3, 3), nn.BatchNorm2d(3), 1),
        (ConvWithDefaults(3), nn.BatchNorm2d(3), 0),
    ],
)
def test_subclasses_fold_only_if_they_compute_the_same(layer: nn.Module, norm: nn.Module, left: int) -> None:
    check(nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), layer, norm), image(2, 3, 7, 7), left=left)


def test_forward_of_an_instance_stays() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    model[1].forward = torch.relu
    check(model, image(2, 3, 7, 7), left=1)


def test_hooks_and_parametrisations_stay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    model[0].register_forward_hook(lambda module, args, output: 2 * output)
    nn.utils.parametrizations.weight_norm(model[2])
    check(model, image(2, 3, 7, 7), left=2)


class OptionalArgument(nn.Module):
    """Its control flow depends on an optional argument, and it marks itself in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, early: bool = False, size: tuple[int, ...] = (5, 5)
    ) -> Tensor:
        self.last = x[:, :, : size[0], : size[1]]
        if mask is not None:
            x = x * mask
        y = self.norm(self.conv(x))
        return y if early else y.relu()


def test_optional_arguments_and_marks() -> None:
    folded = check(OptionalArgument(), image(2, 3, 5, 5), left=0)
    assert isinstance(folded.last, Tensor)


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) if x.sum() > 0 else y


def test_untraceable_is_an_error() -> None:
    with pytest.raises(ValueError, match="DataDependent.*cannot trace"):
        fold_batch_norm(DataDependent())


def test_nothing_to_fold_needs_no_trace() -> None:
    model = DataDependent()
    model.norm = nn.Identity()
    assert not fold_batch_norm(model).training


def test_features_on_another_axis_are_refused() -> None:
    model = randomise(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    with pytest.raises(ValueError, match="2 axes.*3, 4, 4"):  # here the norm is over the second axis
        fold_batch_norm(model)(image(3, 4, 4))


def test_float32_and_gradients() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).float()
    model[0].requires_grad_(False)
    folded = fold_batch_norm(model)
    assert {p.dtype for p in folded.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in folded.parameters())
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(folded(x), model(x))
