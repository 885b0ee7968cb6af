"""What every block of the catalogue promises, by a walk over all of them."""

import inspect
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import layers
from mtl import FitOptions, Task, fit
from tests.compress.helpers import assert_exact
from tests.layers.catalogue import EXAMPLES, OTHERS, Example

STRICT = torch.float64


def test_every_public_name_has_an_example() -> None:
    assert set(EXAMPLES) | OTHERS == set(layers.__all__)
    assert not set(EXAMPLES) & OTHERS


@pytest.mark.parametrize("name", layers.__all__)
def test_every_block_of_ours_says_what_it_does(name: str) -> None:
    public = getattr(layers, name)
    if not inspect.isclass(public) or not public.__module__.startswith("layers"):
        return
    assert public.__doc__
    if issubclass(public, nn.Module):
        assert ">>> " in public.__doc__, "an example"
        module = inspect.getdoc(inspect.getmodule(public)) or ""
        told = public.__doc__ + module
        assert re.search(r"Source:|source:|as for|\b(19|20)\d\d\b", told), "where it comes from"


def call(example: Example, block: nn.Module, x: Tensor) -> Tensor:
    result = block(x, *example.extra)
    return result[0] if isinstance(result, tuple) else result


def double(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    return make().to(STRICT)


@pytest.mark.parametrize("name", EXAMPLES)
def test_gradients_are_those_of_differences(name: str) -> None:
    example = EXAMPLES[name]
    block = double(example.make).train(name != "Dropout")
    names = [name for name, _ in block.named_parameters()]

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        result = torch.func.functional_call(block, dict(zip(names, parameters, strict=True)), (x, *example.extra))
        return result[0] if isinstance(result, tuple) else result

    parameters = [p.detach().requires_grad_() for p in block.parameters()]
    assert torch.autograd.gradcheck(function, (example.input().requires_grad_(), *parameters), fast_mode=True)


@pytest.mark.parametrize("name", EXAMPLES)
def test_strides_of_the_input_do_not_matter(name: str) -> None:
    example = EXAMPLES[name]
    block, x = double(example.make).eval(), example.input()
    spread = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)[..., ::2].transpose(0, -1)
    spread = spread.transpose(0, -1).copy_(x)
    turned = x.transpose(1, -1).contiguous().transpose(1, -1)
    assert not spread.is_contiguous()
    for strided in (spread, turned):
        torch.testing.assert_close(call(example, block, strided), call(example, block, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != "AvgPool3d"])  # PyTorch has none on CPUs
def test_half_precision_is_near(name: str) -> None:
    example = EXAMPLES[name]
    block = double(example.make).eval()
    expected = call(example, block, example.input())
    found = call(example, block.bfloat16(), example.input().bfloat16())
    assert found.dtype is torch.bfloat16
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.05 * scale)


CHECKED = [name for name, example in EXAMPLES.items() if example.checked]


@pytest.mark.parametrize("name", CHECKED)
def test_empty_inputs_are_errors(name: str) -> None:
    example = EXAMPLES[name]
    with pytest.raises(ValueError, match=r"\w+: \w+ must have shape .*but has shape \(0, "):
        call(example, double(example.make), example.input()[:0])


@pytest.mark.parametrize("name", [name for name in CHECKED if EXAMPLES[name].fixed and name not in ("Residual", "MLP")])
def test_another_number_of_channels_is_an_error(name: str) -> None:
    example = EXAMPLES[name]
    x = example.input()
    more = torch.cat([x, x], dim=example.axis)
    with pytest.raises(ValueError, match=r"\w+: .*must have shape .*but has shape|does not fit|Linear"):
        call(example, double(example.make), more)


@pytest.mark.parametrize("name", [name for name in CHECKED if name not in ("Dropout", "GLU", "Residual")])
def test_another_rank_is_an_error(name: str) -> None:
    example = EXAMPLES[name]
    x = example.input()
    wrong = x[:, 0, 0] if x.dim() > 2 else x[0, 0]  # a vector of the batch, or a number
    with pytest.raises(ValueError, match=r"\w+: \w+ must have shape .*but has shape"):
        call(example, double(example.make), wrong)


class OnAxis(nn.Module):
    """A linear layer along one axis."""

    def __init__(self, axis: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.axis, self.linear = axis, nn.Linear(in_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.movedim(self.axis, -1)).movedim(-1, self.axis)


class Around(nn.Module):
    """A block between two linear layers along the channels."""

    def __init__(self, example: Example) -> None:
        super().__init__()
        block = example.make()
        self.before = OnAxis(example.axis, 3, example.shape[example.axis])
        self.block = block
        y = call(example, block, example.input(torch.float32))
        self.after = OnAxis(example.out_axis, y.shape[example.out_axis], 5)

    def forward(self, x: Tensor, *extra: Tensor) -> Tensor:
        y = self.block(self.before(x), *extra)
        return self.after(y[0] if isinstance(y, tuple) else y).contiguous()


class Tagger(nn.Module):
    """The CRF gives a number for each sequence; its tags stay, so that there is a hidden layer to prune."""

    def __init__(self, crf: nn.Module) -> None:
        super().__init__()
        self.before, self.emissions, self.crf = nn.Linear(3, 9), nn.Linear(9, 4), crf

    def forward(self, x: Tensor, tags: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        emissions = self.emissions(self.before(x).tanh())
        return self.crf(emissions, tags, mask), self.crf.marginals(emissions, mask), *self.crf.viterbi(emissions, mask)


def network(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A network with the block in it, and inputs of 3 channels."""
    torch.manual_seed(0)
    example = EXAMPLES[name]
    x = example.input(torch.float32).narrow(example.axis, 0, 3)
    return (Tagger(example.make()) if name == "CRF" else Around(example)), (x, *example.extra)


@pytest.mark.parametrize("name", EXAMPLES)
def test_compress_prunes_it_exactly(name: str) -> None:
    model, inputs = network(name)
    result = assert_exact(model, inputs)
    assert any(member.parameter.startswith("before") and member.removed for member in result.plan.members())


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != "CRF"])
def test_mtl_trains_it(name: str) -> None:
    model, inputs = network(name)
    with torch.no_grad():
        target = torch.zeros_like(model(*inputs))
    before = [p.detach().clone() for p in model.parameters()]
    history = fit(model, Task("zero", nn.MSELoss()), [(inputs, target)], 1, options=FitOptions(progress=False))
    assert history[-1].loss["zero"] > 0
    assert all(p.isfinite().all() for p in model.parameters())
    assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


COMPILED = ["Conv2d", "Dense", "Dropout", "Highway", "KMaxOverTime", "PoolOverTime", "RNN", "SpatialConv"]


def assert_compiles(name: str) -> None:
    """One graph, with the result of the block itself; the backend changes nothing, as graphs are what is tested."""
    example = EXAMPLES[name]
    block, x = double(example.make).eval(), example.input()
    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    torch.testing.assert_close(call(example, compiled, x), call(example, block, x))


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_to_one_graph(name: str) -> None:
    assert_compiles(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(EXAMPLES) - set(COMPILED)))
def test_compiles_to_one_graph_as_well(name: str) -> None:
    assert_compiles(name)
