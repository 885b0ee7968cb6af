"""memory_efficient: the same numbers as without, from fewer kept bytes."""

import copy
import inspect
import io
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from layers import memory_efficient, recompute_cheap
from layers.functional import bn_act


def chain(depth: int, channels: int = 8) -> nn.Sequential:
    """Convolutions with batch norm and ReLU after each."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def bottlenecks(depth: int, channels: int = 8) -> nn.Sequential:
    return nn.Sequential(*[torchvision.models.resnet.Bottleneck(channels, channels // 4) for _ in range(depth)])


class Odds(nn.Module):
    """Many ways to use a tensor: branches, products, functions, in-place operators, views, concatenation, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 12, 1)
        self.norm, self.frozen = nn.BatchNorm2d(6), nn.BatchNorm2d(12)
        self.gate, self.last = nn.Linear(12, 12), nn.Linear(24, 5)
        self.scale = nn.Parameter(torch.randn(12, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x))
        y = nn.functional.hardswish(y, inplace=True) + torch.sigmoid(y) * 2
        z = nn.functional.gelu(self.frozen(self.second(y)))
        z.mul_(self.scale).relu_()
        z = nn.functional.dropout(z, 0.3, self.training)
        z = z * torch.sigmoid(self.gate(z.mean((2, 3))))[:, :, None, None]
        z = torch.cat([z, nn.functional.silu(z).exp_()], 1)
        pooled = nn.functional.max_pool2d(z, 2).to(self.last.weight.dtype)
        return self.last(pooled.flatten(2).transpose(1, 2)).tanh().mean(1)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "chain": (lambda: chain(3), (2, 8, 6, 6)),
    "bottlenecks": (lambda: bottlenecks(3), (2, 8, 6, 6)),
    "odds": (Odds, (4, 3, 6, 6)),
    "mobilenet": (lambda: torchvision.models.mobilenet_v2(width_mult=0.25), (2, 3, 32, 32)),
    "densenet": (lambda: torchvision.models.DenseNet(4, (2, 2), 8, num_classes=4), (2, 3, 32, 32)),
    "vit": (lambda: torchvision.models.VisionTransformer(16, 8, 2, 2, 16, 32, dropout=0.1), (2, 3, 16, 16)),
}


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Storages that autograd keeps, without the model's own."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no address is used twice
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in own)


def train(model: nn.Module, x: Tensor, steps: int = 2, autocast: bool = False) -> list[Tensor]:
    """Outputs of a few steps, then gradients of the input and of all parameters, and the buffers."""
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    results = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(x)
        y.float().square().mean().backward()
        optimizer.step()
        results.append(y)
    return [*results, x.grad, *(p.grad for p in model.parameters()), *model.buffers()]


def assert_same(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for a, b in zip(actual, expected, strict=True):
        if b is None:
            assert a is None
        else:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", list(MODELS))
def test_same_training(name: str) -> None:
    build, shape = MODELS[name]
    model, x = build().double(), torch.randn(shape, dtype=torch.float64)
    efficient = memory_efficient(copy.deepcopy(model))
    assert saved_bytes(copy.deepcopy(efficient), x) < 0.95 * saved_bytes(copy.deepcopy(model), x)
    assert_same(train(efficient, x), train(model, x), 1e-10)
    assert_same([efficient.eval()(x)], [model.eval()(x)], 1e-10)
    assert_same(train(efficient, x), train(model, x), 1e-10)  # batch norms with running statistics


@pytest.mark.parametrize("name", ["chain", "bottlenecks", "odds"])
def test_outputs_are_bitwise_equal(name: str) -> None:
    build, shape = MODELS[name]
    model, x = build(), torch.randn(shape)
    actual = train(memory_efficient(copy.deepcopy(model)), x, steps=1)
    assert torch.equal(actual[0], train(model, x, steps=1)[0])


@pytest.mark.parametrize("name", ["chain", "bottlenecks", "odds"])
def test_autocast(name: str) -> None:
    build, shape = MODELS[name]
    model, x = build(), torch.randn(shape)
    efficient = memory_efficient(copy.deepcopy(model))
    actual, expected = train(efficient, x, 1, autocast=True), train(model, x, 1, autocast=True)
    assert torch.equal(actual[0], expected[0])
    for a, b in zip(actual, expected, strict=True):
        assert (a - b).double().norm() <= 0.02 * b.double().norm() + 1e-6


def steady_ratio(build: Callable[[int], nn.Module], x: Tensor) -> float:
    """Bytes that one more block keeps, relative to the model as it is."""
    kept = [saved_bytes(build(depth), x) for depth in (4, 8)]
    efficient = [saved_bytes(memory_efficient(build(depth)), x) for depth in (4, 8)]
    return (efficient[1] - efficient[0]) / (kept[1] - kept[0])


def test_kept_bytes_of_a_chain() -> None:
    """Two tensors a layer become one; 0.001 are the statistics of batch norm, of which there are as many as before."""
    assert steady_ratio(chain, torch.randn(4, 8, 32, 32)) <= 0.501


def test_kept_bytes_of_bottlenecks() -> None:
    assert steady_ratio(bottlenecks, torch.randn(4, 8, 32, 32)) <= 0.501


def test_kept_bytes_of_resnet50() -> None:
    model, x = torchvision.models.resnet50(), torch.randn(2, 3, 64, 64)
    assert saved_bytes(memory_efficient(copy.deepcopy(model)), x) <= 0.55 * saved_bytes(model, x)


def test_tensors_are_freed_in_the_forward_pass() -> None:
    """What is not kept is gone, rather than only hidden from hooks."""
    alive: list[Callable[[], Tensor | None]] = []
    model = chain(3)
    for layer in model:
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_pre_hook(lambda _, args: alive.append(torch.utils.weak.TensorWeakRef(args[0])))
    x = torch.randn(2, 8, 6, 6)
    y = memory_efficient(model)(x)
    assert alive[0]() is x
    assert alive[1]() is None
    assert alive[2]() is None
    y.sum().backward()


def test_second_backward_and_second_derivative() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 2, 3)).double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    expected, actual = model(x), memory_efficient(copy.deepcopy(model))(x)
    for y in (actual, expected):
        y.sum().backward(retain_graph=True)
    first = x.grad.clone()
    actual.sum().backward(retain_graph=True)
    torch.testing.assert_close(x.grad, first * 1.5)
    seconds = []
    for y in (actual, expected):
        (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        seconds.append(torch.autograd.grad(gradient.square().sum(), x)[0])
    torch.testing.assert_close(*seconds)


def test_two_forward_passes_before_one_backward() -> None:
    model = chain(2)
    efficient = memory_efficient(copy.deepcopy(model))
    a, b = torch.randn(2, 8, 6, 6), torch.randn(3, 8, 5, 5)
    for each in (model, efficient):
        (each(a).sum() * each(b).square().sum()).backward()
    for p, q in zip(efficient.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inside", [True, False])
def test_checkpointing(inside: bool) -> None:
    """Checkpointed regions within, and a model within a checkpointed region."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(chain(2).double() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.parts[0](x)
            x = checkpoint(lambda x: torch.relu(self.parts[1](x) * 2), x, use_reentrant=False)
            return self.parts[2](x)

    model, x = Checkpointed(), torch.randn(2, 8, 6, 6, dtype=torch.float64)
    expected = train(copy.deepcopy(model), x, 1)
    if inside:
        efficient: nn.Module = memory_efficient(model)
    else:
        memory_efficient(model.parts[0])
        memory_efficient(model.parts[1])
        efficient = model
    assert_same(train(efficient, x, 1), expected, 1e-10)


def test_overwritten_input_is_an_error_as_without() -> None:
    model = memory_efficient(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)))
    kept: list[Tensor] = []
    model[0].register_forward_hook(lambda module, args, output: kept.append(output))
    y = model(torch.randn(2, 3, 4, 4))
    with torch.no_grad():
        kept[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_copies_keys_and_undoing() -> None:
    model = memory_efficient(chain(2))
    assert memory_efficient(model) is model
    twin = copy.deepcopy(model)
    assert list(twin.state_dict()) == list(chain(2).state_dict())
    with torch.no_grad():
        twin[0].weight.zero_()
    x = torch.randn(2, 8, 6, 6)
    assert not torch.equal(model(x), twin(x))  # the copy runs on its own parameters
    before = saved_bytes(model, x)
    del model.forward
    assert saved_bytes(model, x) > before
    model.forward = lambda x: x
    with pytest.raises(ValueError, match="forward of its own"):
        memory_efficient(model)


def test_pickles_and_states() -> None:
    """As torch.multiprocessing sends a model to a process, and as a checkpoint holds its state."""
    model, x = memory_efficient(chain(2)), torch.randn(2, 8, 6, 6)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    sent = torch.load(file, weights_only=False)
    assert torch.equal(sent(x), model(x))
    assert saved_bytes(sent, x) == saved_bytes(model, x) < saved_bytes(chain(2), x)
    assert memory_efficient(sent) is sent
    with torch.no_grad():
        sent[0].weight.zero_()
    assert not torch.equal(sent(x), model(x))
    torch.save(model.state_dict(), file := io.BytesIO())
    file.seek(0)
    plain = chain(2)
    plain.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(plain.eval()(x), model.eval()(x))


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor, *, shift: float = 0.0) -> Tensor:
        return (x * self.factor + shift).exp().sigmoid()


def test_replicas_of_data_parallel() -> None:
    model, x = memory_efficient(copy.deepcopy(memory_efficient(Scale()))), torch.randn(100)
    replica = model._replicate_for_data_parallel()
    replica.factor = torch.tensor(5.0, requires_grad=True)  # the copy on the replica's device
    assert torch.equal(replica(x, shift=1.0), (x * 5 + 1).exp().sigmoid())
    assert saved_bytes(replica, x) == saved_bytes(model, x) + 4  # its factor is no parameter
    before = saved_bytes(replica, x)
    del model.forward
    plain = model._replicate_for_data_parallel()
    plain.factor = replica.factor
    assert torch.equal(plain(x), replica(x))
    assert saved_bytes(plain, x) > before
    assert inspect.signature(memory_efficient(model).forward) == inspect.signature(Scale().forward)


def test_without_gradients_nothing_is_recorded() -> None:
    model, x = memory_efficient(chain(2)).eval(), torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        assert not model(x).requires_grad
    with torch.inference_mode():
        model(x)


def test_transforms_and_compile_take_the_model() -> None:
    model = memory_efficient(nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 2)))
    x = torch.randn(5, 3)
    jacobian = torch.func.jacrev(lambda x: model(x).sum())(x)
    torch.testing.assert_close(jacobian, torch.autograd.functional.jacobian(lambda x: model(x).sum(), x))
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x), model(x))


def test_fused_operators_inside() -> None:
    x, kernel = torch.randn(2, 4, 5, 5, requires_grad=True), torch.randn(4, 4, 3, 3, requires_grad=True)
    gradients = []
    for efficient in (True, False):
        y = torch.conv2d(x, kernel, padding=1)
        if efficient:
            with recompute_cheap():
                y = torch.conv2d(bn_act(y)[0], kernel).tanh()
        else:
            y = torch.conv2d(bn_act(y)[0], kernel).tanh()
        gradients.append(torch.autograd.grad(y.sum(), (x, kernel)))
    torch.testing.assert_close(*gradients)
