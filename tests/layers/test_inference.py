"""optimize_for_inference: the same function as the model in evaluation mode, for any module that runs."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import layers
from layers import optimize_for_inference
from layers.inference import optimize
from layers.inference.backends import BACKENDS
from layers.inference.capture import Call, capture
from layers.inference.fuse import fuse_layers
from layers.inference.lower import choose_kernels
from layers.inference.norms import fold_norms
from layers.inference.runner import Program
from layers.inference.script import script
from layers.inference.simplify import simplify
from layers.inference.verify import difference

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
DTYPES = (torch.float32, torch.float64)
NEEDS = {"onnxruntime": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",)}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimize, "_TIMING", 0.0)  # which one is faster is not what is tested
    monkeypatch.setattr(optimize._Work, "_times", _always_the_backend)


def _always_the_backend(self: Any, module: Any, call: Any, fast: Any, tensors: Any) -> dict[str, float]:
    return {**{program.name: 1.0 for program in fast.programs}, "eager": 2.0}


def trained(model: nn.Module) -> nn.Module:
    """Statistics and scales as after training."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.running_mean, module.bias):
                tensor.data.normal_(0, 0.3)
            for tensor in (module.running_var, module.weight):
                tensor.data.uniform_(0.5, 1.5)
    return model.eval()


def agree(model: nn.Module, fast: nn.Module, *args: Any, **kwargs: Any) -> None:
    with torch.no_grad():
        expected, actual = model(*args, **kwargs), fast(*args, **kwargs)
    assert difference([x.contiguous() for x in _flat(expected)], _flat(actual)) is None


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in values for tensor in _flat(item)]


class Random(nn.Module):
    """A small network of everything that is folded or fused, in an order that depends on the seed."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        choose = torch.Generator().manual_seed(seed)
        self.kinds = torch.randint(0, 8, (6,), generator=choose).tolist()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=bool(seed % 2))
        self.parts = nn.ModuleList(self._part(kind) for kind in self.kinds)
        self.shared = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 5)

    def _part(self, kind: int) -> nn.Module:
        return {
            0: lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()),
            1: lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.SiLU()),
            2: lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2), nn.Hardswish()),
            3: lambda: nn.Sequential(nn.ConvTranspose2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8), nn.Tanh()),
            4: lambda: nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1, groups=4), nn.LeakyReLU(0.1)),
            5: lambda: nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1), nn.GELU()),
            6: lambda: nn.Sequential(nn.Conv2d(8, 8, (1, 3), padding="same"), nn.Dropout(), nn.Hardsigmoid()),
            7: lambda: nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 8, 1), nn.Sigmoid()),
        }[kind]()

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = self.stem(x)
        for kind, part in zip(self.kinds, self.parts, strict=True):
            y = part(x)
            if kind % 3 == 0:
                x = F.relu(y + self.shared(x), inplace=True)
            elif kind % 3 == 1:
                x = torch.cat((x[:, :4], y[:, 4:]), 1) + 1
            else:
                x = self.shared(y) + x
        pooled = x.mean((2, 3))
        return {"logits": self.head(pooled.view(len(pooled), -1)), "features": (x, None, 3)}


@pytest.mark.parametrize(
    ("seed", "dtype"),
    [
        (0, torch.float32),
        *(pytest.param(seed, dtype, marks=pytest.mark.slow) for seed in range(1, 6) for dtype in DTYPES),
    ],
)
def test_random_networks(seed: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    model = trained(Random(seed)).to(dtype)
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(2, 3, 7, 9, dtype=dtype)
    fast = optimize_for_inference(model, x)
    assert fast.report.pieces, str(fast.report)
    assert not any("Python" in note for note in fast.report.pieces[0].passes)
    for shape in ((2, 3, 7, 9), (5, 3, 7, 9), (1, 3, 7, 9), (2, 3, 8, 8)):
        agree(model, fast, torch.randn(shape, dtype=dtype))
    assert fast(x)["features"][1:] == (None, 3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("build", "shape", "lines"),
    [
        (
            lambda: nn.Sequential(nn.Conv1d(3, 4, 2), nn.BatchNorm1d(4), nn.ReLU()),
            (2, 3, 9),
            ["before", "conv1d + relu"],
        ),
        (lambda: nn.Sequential(nn.Conv3d(3, 4, 2), nn.BatchNorm3d(4), nn.ReLU()), (2, 3, 5, 4, 6), ["conv3d + relu"]),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Sigmoid()), (5, 3), ["linear + sigmoid"]),
        (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 2)), (2, 3, 5, 5), ["layers after"]),
        (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3), nn.Linear(3, 4)), (2, 3), ["layers after"]),
        # padding does not pass through the norm; a norm over the length of a sequence is none over features
        (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)), (2, 3, 5, 5), ["left 1"]),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(3)), (2, 3, 4), ["left 1"]),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), (2, 3, 5, 5), ["precomputed"]),
    ],
)
def test_what_is_folded_and_fused(build: Callable[[], nn.Module], shape: tuple[int, ...], lines: list[str]) -> None:
    torch.manual_seed(0)
    model = trained(build()).double()
    fast = optimize_for_inference(model, torch.randn(shape, dtype=torch.float64))
    agree(model, fast, torch.randn(shape, dtype=torch.float64))
    assert all(line in str(fast.report) for line in lines), str(fast.report)


@pytest.mark.parametrize(
    ("activation", "residual"),
    [
        ("relu", True),
        ("relu6", False),
        *(
            pytest.param(name, residual, marks=pytest.mark.slow)
            for name in ("relu", "relu6", "silu", "hardswish", "hardsigmoid", "sigmoid", "tanh", "gelu")
            for residual in (False, True)
        ),
    ],
)
def test_every_kernel_computes_the_layer(activation: str, residual: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.point = nn.Conv2d(5, 6, 3, stride=(1, 2), padding=1), nn.Conv2d(6, 6, 1)
            self.dense = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            act = getattr(F, activation, None) or getattr(torch, activation)
            y = act(self.conv(x))
            y = act(self.point(y) + y if residual else self.point(y))
            return act(self.dense(y.mean((2, 3))))

    model, x = Layer().eval(), torch.randn(3, 5, 6, 7)
    captured = capture(model, Call.of(model, x))
    from layers.inference import kernels

    for kind in kernels.KERNELS:
        graph = copy.deepcopy(captured.graph)
        simplify(graph)
        fuse_layers(graph)
        monkeypatch.setattr(kernels, "KERNELS", tuple({kernels.Plain, kind}))
        monkeypatch.setattr(
            "layers.inference.lower.seconds", lambda runs, *_, kind=kind: {name: name != kind.__name__ for name in runs}
        )
        choose_kernels(graph, [x])
        with torch.no_grad():
            assert difference([model(x)], list(script(graph)(x))) is None, kind


@pytest.mark.slow
def test_models_of_the_zoo() -> None:
    model = trained(layers.models.resnet20_cifar())
    fast = optimize_for_inference(model, torch.randn(1, 3, 32, 32))
    agree(model, fast, torch.randn(1, 3, 32, 32))
    agree(model, fast, torch.randn(3, 3, 32, 32))
    text = str(fast.report)
    assert "folded 19 batch norm(s)" in text
    assert "fused 9 x conv2d + add + relu" in text


@dataclass
class Output:
    mean: Tensor
    parts: list[Tensor]
    label: str = "two"


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(3, 4)

    def forward(self, a: Tensor, *, b: Tensor, scale: float = 2.0) -> Output:
        parts = [self.a(a), self.b(b) * scale]
        return Output(parts[0] + parts[1], parts)


def test_several_inputs_and_a_dataclass() -> None:
    model = Several()
    example = {"a": torch.randn(2, 4), "b": torch.randn(2, 3)}
    fast = optimize_for_inference(model, example)
    assert fast.report.pieces
    for scale in ({}, {"scale": 3.0}):  # another constant than the example's runs the model
        call = {"a": torch.randn(5, 4), "b": torch.randn(5, 3), **scale}
        wanted, found = model(**call), fast(call["a"], **{key: call[key] for key in call if key != "a"})
        assert isinstance(found, Output)
        assert found.label == "two"
        torch.testing.assert_close([found.mean, *found.parts], [wanted.mean, *wanted.parts])


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.second = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU())])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second[0](x) if x.mean() > 0.5 else x * self.second[0][0].bias.sum()


def test_control_flow_by_values_leaves_the_model_and_optimises_its_parts() -> None:
    model = trained(Branching())
    fast = optimize_for_inference(model, torch.randn(2, 3, 8, 8) + 5)
    assert [piece.name for piece in fast.report.pieces][:1] == ["first"]
    assert "" in fast.report.unchanged
    for shift in (-5, 0, 5):
        agree(model, fast, torch.randn(2, 3, 8, 8) + shift)


class ByBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return -y if len(x) % 2 else y if len(x) < 6 else y * 2


def test_control_flow_by_batch_size() -> None:
    model = ByBatch()
    for size in (1, 4):
        fast = optimize_for_inference(model, torch.randn(size, 3))
        for other in range(1, 10):
            agree(model, fast, torch.randn(other, 3))


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.inner = nn.Sequential(nn.Linear(3, 3), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x) * self.calls.clamp(max=1)


def test_buffers_that_change_are_not_frozen() -> None:
    fast = optimize_for_inference(Counting(), torch.randn(2, 3))
    assert "changes calls" in fast.report.unchanged[""]
    assert [piece.name for piece in fast.report.pieces] == ["inner"]
    before = fast.calls.item()
    fast(torch.randn(2, 3))
    assert fast.calls.item() == before + 1


def test_a_scripted_part_stays_as_it_is() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    model = nn.Sequential(scripted, nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    agree(model, optimize_for_inference(model, torch.randn(2, 3)), torch.randn(4, 3))
    with pytest.raises(ValueError, match="model is scripted"):
        optimize_for_inference(scripted, torch.randn(2, 3))


def test_hooks_go_on_being_called() -> None:
    model, seen = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.ReLU())), []
    model.register_forward_hook(lambda *_: seen.append(1))
    fast = optimize_for_inference(model, torch.randn(2, 3))
    assert "hooks" in fast.report.unchanged[""]
    seen.clear()
    fast(torch.randn(2, 3))
    assert seen == [1]


def test_a_model_in_training_mode_stays_in_it() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout())
    statistics = model[1].running_mean.clone()
    fast = optimize_for_inference(model, torch.randn(2, 3, 5, 5))
    assert model.training
    assert torch.equal(model[1].running_mean, statistics)
    agree(copy.deepcopy(model).eval(), fast, torch.randn(2, 3, 5, 5))


def test_a_result_is_for_inference_and_says_so() -> None:
    model, x = nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.randn(2, 3)
    fast = optimize_for_inference(model, x)
    assert not fast(x.requires_grad_()).requires_grad
    agree(model, copy.deepcopy(fast), x)
    assert fast.eval() is fast
    with pytest.raises(ValueError, match="for inference only"):
        fast.train()
    with pytest.raises(ValueError, match="stays in its device"):
        fast.double()
    with pytest.raises(TypeError, match="cannot be saved"):
        pickle.dumps(fast)
    expected = fast(x).clone()
    model[0].weight.data.zero_()
    assert torch.equal(fast(x), expected)  # later changes of the model do not reach it


def test_what_is_returned_belongs_to_the_caller() -> None:
    model, x = nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.randn(2, 3)
    fast = optimize_for_inference(model, x)
    first = fast(x)
    kept = first.clone()
    fast(torch.randn(2, 3))
    assert torch.equal(first, kept)
    first.zero_()
    assert torch.equal(fast(x), kept)


def test_a_pass_that_is_wrong_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(graph: Any) -> list[str]:
        fold_norms(graph)
        for name, value in graph.named_buffers():
            setattr(graph, name, value * 1.01)
        return ["wrong"]

    monkeypatch.setattr(optimize, "_PASSES", (simplify, wrong))
    model, x = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))), torch.randn(2, 3, 5, 5)
    fast = optimize_for_inference(model, x)
    assert "dropped wrong: it gives an error of" in str(fast.report)
    agree(model, fast, x)


def test_a_backend_that_is_wrong_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        optimize,
        "BACKENDS",
        {**BACKENDS, "inductor": lambda graph, _: Program("inductor", lambda x: [graph(x)[0] + 1])},
    )
    for missing in ("onnxruntime", "openvino"):
        monkeypatch.delitem(optimize.BACKENDS, missing)
    model, x = nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.randn(2, 3)
    fast = optimize_for_inference(model, x, backend="auto")
    assert "an error of" in fast.report.pieces[0].skipped["inductor"]
    agree(model, fast, x)
    with pytest.raises(ValueError, match="'inductor' cannot run Sequential: an error of"):
        optimize_for_inference(model, x, backend="inductor")


@pytest.mark.slow
@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_every_backend_that_is_installed(backend: str) -> None:
    missing = [name for name in NEEDS.get(backend, ()) if find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    model, x = trained(Random(1)), torch.randn(2, 3, 7, 9)
    fast = optimize_for_inference(model, x, backend=backend)
    for size in (2, 5):
        agree(model, fast, torch.randn(size, 3, 7, 9))
    assert backend in ("auto", fast.report.pieces[0].backend)
