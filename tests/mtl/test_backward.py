import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtl import FitOptions, GradientWeighting, HardShared, Task, fit
from mtl.backward import Backward, cut_at
from mtl.processes import Processes

OPTIONS = FitOptions(
    device="cpu", progress=False, lr=0.1, momentum=0.0, nesterov=False, weight_decay=0.0, schedule="constant"
)
TASKS = [Task.regression("a"), Task.regression("b"), Task.regression("c")]


class Factors(GradientWeighting):
    """Remembers the Gramian, and returns fixed factors."""

    def __init__(self, factors: Tensor) -> None:
        super().__init__()
        self.fixed = factors
        self.gramians: list[Tensor] = []

    def combine(self, gramian: Tensor, losses: Any) -> Tensor:
        self.gramians.append(gramian)
        return self.fixed.to(gramian)[: len(gramian)]


def network(**arguments: Any) -> HardShared:
    torch.manual_seed(2)
    trunk = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh())
    return HardShared(trunk, {name: nn.Linear(5, 1) for name in "abc"}, **arguments).double()


def batch() -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(12, 6, dtype=torch.float64, generator=generator)
    return inputs, {name: torch.randn(12, dtype=torch.float64, generator=generator) for name in "abc"}


def losses_of(model: HardShared, **arguments: Any) -> list[Tensor]:
    inputs, targets = batch()
    return [F.mse_loss(output[:, 0], targets[name]) for name, output in model(inputs).items()]


class Deep(nn.Module):
    """The same network without a ``representation``."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        return self.inner(inputs)  # type: ignore[no-any-return]


@pytest.mark.parametrize("model", [network(), Deep()], ids=["features", "parameters"])
def test_shared_gradients_are_combined_and_heads_have_their_own(model: Any) -> None:
    factors = torch.tensor([2.0, 0.5, -1.0], dtype=torch.float64)
    weighting, inner = Factors(factors), model.inner if isinstance(model, Deep) else model
    before = {name: parameter.detach().clone() for name, parameter in inner.named_parameters()}
    losses = losses_of(inner)
    shared = list(inner.trunk.parameters())
    rows = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in losses]
    own = {f"heads.{n}.weight": torch.autograd.grad(loss, inner.heads[n].weight, retain_graph=True)[0]
           for n, loss in zip("abc", losses, strict=True)}  # fmt: skip
    captured: list[Tensor] = []
    handle = inner.features.register_forward_hook(lambda module, args, output: captured.append(output))
    again = losses_of(inner)
    handle.remove()
    features = torch.stack([torch.autograd.grad(loss, captured[0], retain_graph=True)[0].flatten() for loss in again])
    flat = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])

    fit(model, TASKS, [batch()], 1, weighting=weighting, options=OPTIONS)
    expected = features if isinstance(model, HardShared) else flat
    torch.testing.assert_close(weighting.gramians[0], expected @ expected.T)
    for index, parameter in enumerate(shared):
        gradient = sum(f * row[index] for f, row in zip(factors, rows, strict=True))
        name = f"trunk.{['0.weight', '0.bias', '2.weight', '2.bias'][index]}"
        torch.testing.assert_close(parameter.detach(), before[name] - 0.1 * gradient)
    for name, gradient in own.items():
        torch.testing.assert_close(inner.get_parameter(name).detach(), before[name] - 0.1 * gradient)


def test_what_two_of_three_tasks_share_is_combined_too() -> None:
    model = HardShared(nn.Linear(6, 5), {"a": nn.Linear(5, 1), "b": nn.Linear(5, 1)}, private=("bias",)).double()
    weighting = Factors(torch.tensor([3.0, 0.0]))
    inputs, targets = batch()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    fit(model, TASKS[:2], [(inputs, targets)], 1, weighting=weighting, options=OPTIONS)
    assert model.trunks is not None
    assert not torch.equal(model.trunks["b"].bias, before["trunks.b.bias"])  # its own, though the factor is 0


def test_tasks_that_share_nothing_cannot_be_combined() -> None:
    model = nn.ModuleDict({"a": nn.Linear(6, 1), "b": nn.Linear(6, 1)}).double()

    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, inputs: Tensor) -> dict[str, Tensor]:
            return {name: part(inputs) for name, part in self.parts.items()}

    with pytest.raises(ValueError, match="no trained parameter serves two tasks"):
        fit(Apart(), TASKS[:2], [batch()], 1, weighting=Factors(torch.ones(2)), options=OPTIONS)


def test_cosines_are_those_of_the_gradients_of_what_is_shared() -> None:
    model = network()
    losses = losses_of(model)
    backward = Backward(Factors(torch.ones(3)), list(model.parameters()), Processes())
    found = backward.cosines(dict(zip("abc", losses, strict=True)), [])
    shared = list(model.trunk.parameters())  # type: ignore[union-attr]
    flat = {n: torch.cat([g.flatten() for g in torch.autograd.grad(loss, shared, retain_graph=True)])
            for n, loss in zip("abc", losses, strict=True)}  # fmt: skip
    assert found == pytest.approx(
        {f"{x}~{y}": F.cosine_similarity(flat[x], flat[y], dim=0).item() for x, y in itertools.combinations("abc", 2)}
    )


def test_a_cut_leaves_evaluation_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with torch.no_grad(), cut_at(model[0]) as cuts:
        model(torch.randn(1, 2))
    assert cuts == []
    assert not model[0]._forward_hooks


METHODS = ("pcgrad", "mgda", "cagrad", "imtl", "nash", "upgrad", "aligned")


def conflicting(num_tasks: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
    inputs, targets = batch()
    names = "abc"[:num_tasks]
    return [(inputs, {name: targets["a"] * (-1) ** i + 0.3 * targets[name] for i, name in enumerate(names)})] * 3


@pytest.mark.parametrize("shared", ["features", "parameters"])
def test_upgrad_is_torchjd_called_by_hand(shared: str) -> None:
    autojac = pytest.importorskip("torchjd.autojac")
    from torchjd.aggregation import UPGrad

    model: Any = network() if shared == "features" else Deep()
    hand = network()
    fit(model, TASKS, conflicting(3), 2, weighting="upgrad", options=OPTIONS)
    optimizer, aggregator = torch.optim.SGD(hand.parameters(), lr=0.1), UPGrad()
    for inputs, targets in conflicting(3) * 2:
        assert hand.trunk is not None
        features = hand.trunk(inputs)
        losses = [F.mse_loss(hand.heads[name](features)[:, 0], targets[name]) for name in "abc"]
        optimizer.zero_grad()
        if shared == "parameters":
            autojac.mtl_backward(losses, features=features)
            autojac.jac_to_grad(hand.trunk.parameters(), aggregator)
        else:
            rows = autojac.jac(losses, [features], retain_graph=True)[0]
            sum(losses).backward(retain_graph=True)  # type: ignore[union-attr]
            for parameter in hand.trunk.parameters():
                parameter.grad = None
            features.backward(aggregator(rows.flatten(1)).view_as(features))
        optimizer.step()
    inner = model.inner if shared == "parameters" else model
    for parameter, expected in zip(inner.parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:.*ECOS.*", "ignore:.*inaccurate.*", "ignore::FutureWarning")
def test_every_method_trains_and_repeats_itself(method: str, tmp_path: Any) -> None:
    pytest.importorskip("torchjd")
    if method in ("cagrad", "nash"):
        pytest.importorskip("cvxpy")
    results = []
    for folder in (None, tmp_path):
        model = network()
        history = fit(
            model, TASKS, conflicting(3), 3, weighting=method, folder=folder, options=replace(OPTIONS, seed=3)
        )
        results.append((history, [parameter.detach().clone() for parameter in model.parameters()]))
        assert history[-1].loss["c"] < history[0].loss["c"]
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))
    assert set(results[1][0][0].cosines) == {"a~b", "a~c", "b~c"}
