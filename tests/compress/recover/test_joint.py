"""Two layers refitted together: better than one after the other, exact where they are linear, and never worse."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import compress
from compress.recover import joint, recover
from compress.recover.chain import find_chains
from compress.sites import find_sites
from compress.trace import record
from tests.compress.helpers import Apply, outputs

BATCHES = 6


def _mlp(act: Callable[[torch.Tensor], torch.Tensor]) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), Apply(lambda _, x: act(x)), nn.Linear(16, 3))


def _block(act: Callable[[torch.Tensor], torch.Tensor]) -> nn.Sequential:
    convs = nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.Conv2d(12, 4, 3, padding=1)
    return nn.Sequential(convs[0], nn.BatchNorm2d(12), Apply(lambda _, x: act(x)), convs[1])


def _separable(act: Callable[[torch.Tensor], torch.Tensor]) -> nn.Sequential:
    wide = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 12, 3, groups=12, padding=1), nn.Conv2d(12, 4, 1)
    return nn.Sequential(wide[0], Apply(lambda _, x: act(x)), wide[1], Apply(lambda _, x: act(x)), wide[2])


MODELS = {"mlp": (_mlp, (6,)), "convolutions": (_block, (3, 6, 6)), "separable": (_separable, (3, 6, 6))}
ACTIVATIONS = {"relu": torch.relu, "gelu": nn.functional.gelu, "in place": lambda x: x.add_(0.1).relu_()}


def _recovered(model: nn.Module, batches: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch, rounds: int) -> float:
    """The squared error on data that nothing was fitted to, as a part of the outputs' variance."""
    monkeypatch.setattr(joint, "ROUNDS", rounds)
    plan = compress.prune(model, batches[0], budget=compress.Budget(channels=0.5)).plan
    pruned = compress.apply(model, plan)
    recover(pruned, model, plan, batches[1:], ("bias", "least_squares"))
    (wanted,), (found,) = outputs(model, batches[0]), outputs(pruned, batches[0])
    return float((found - wanted).square().mean() / wanted.var())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", MODELS)
def test_two_layers_together_miss_less_than_one_after_the_other(
    name: str, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    build, shape = MODELS[name]
    model = build(ACTIVATIONS[activation]).double().eval()
    batches = [torch.randn(256, *shape, dtype=torch.float64) for _ in range(BATCHES)]
    alone = _recovered(model, batches, monkeypatch, 0)
    together = _recovered(model, batches, monkeypatch, 2)
    assert 0 < together < 0.98 * alone


def test_linear_layers_reach_the_best_that_their_rank_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two linear layers of rank 4 cannot do better than the four leading singular values (Eckart & Young 1936)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Linear(8, 6, bias=False)).double().eval()
    batches = [torch.randn(2048, 6, dtype=torch.float64) for _ in range(3)]
    product = (model[1].weight @ model[0].weight).detach()
    values = torch.linalg.svdvals(product).square()
    best = float(values[4:].sum() / values.sum())
    alone, together = (_recovered(model, batches, monkeypatch, rounds) for rounds in (0, 30))
    assert alone > 1.2 * best
    assert best * 0.8 < together < 1.1 * best


def test_chains_are_layers_with_one_reader_and_single_elements_between() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))
            self.norm = nn.BatchNorm2d(4)
            self.head = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.b(self.norm(self.a(x)).sigmoid() * 2)  # a feeds b alone
            z = self.c(y)  # b feeds c, and the sum
            z = self.d(nn.functional.max_pool2d(z + y, 3, 1, 1))
            return self.head(z.mean((2, 3)))

    trace = record(Model(), torch.zeros(2, 4, 5, 5), training=False)
    chains = find_chains(trace, find_sites(trace))
    assert {key[0]: chain.first[0] for key, chain in chains.items()} == {"b.weight": "a.weight"}


def test_a_step_that_does_not_help_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refit that is worse is undone to the last bit."""
    torch.manual_seed(0)
    model = _mlp(torch.relu).double().eval()
    batches = [torch.randn(256, 6, dtype=torch.float64) for _ in range(3)]
    plan = compress.prune(model, batches[0], budget=compress.Budget(channels=0.5)).plan
    states = []
    for rounds in (0, 1):
        monkeypatch.setattr(joint, "ROUNDS", rounds)
        monkeypatch.setattr(joint, "_worse", lambda again, error: True)
        pruned = compress.apply(model, plan)
        recover(pruned, model, plan, batches, ("least_squares",))
        states.append(pruned.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
