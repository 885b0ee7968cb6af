"""Recovery on models that are no chain of layers of one input."""

import warnings

import pytest
import torch
from torch import Tensor, nn

import compress
from compress import Budget


class Pair(nn.Module):
    """Two inputs by position, one network for both, with a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head((self.net(a) - self.net(b)).abs())


class Mixer(nn.Module):
    """Layers over channels and layers over positions: a removed channel is a row of those."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.tokens = nn.Linear(5, 24), nn.Sequential(nn.Linear(9, 16), nn.GELU(), nn.Linear(16, 9))
        self.channels, self.head = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 24)), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.tokens(x.transpose(1, 2)).transpose(1, 2)
        return self.head((x + self.channels(x)).mean(1))


class OldNorm(nn.Module):
    """Weight norm in the old style keeps a weight that is part of a graph, which deepcopy refuses."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            norm = nn.utils.weight_norm
            self.net = nn.Sequential(
                norm(nn.Linear(6, 24)), nn.ReLU(), norm(nn.Linear(24, 24)), nn.ReLU(), nn.Linear(24, 3)
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


CASES = {
    "two inputs": (Pair, lambda: (torch.randn(32, 6), torch.randn(32, 6))),
    "positions": (Mixer, lambda: torch.randn(32, 9, 5)),
    "old weight norm": (OldNorm, lambda: torch.randn(32, 6)),
}


@pytest.mark.parametrize("name", CASES)
def test_it_recovers_and_shrinks(name: str) -> None:
    torch.manual_seed(0)
    make, inputs = CASES[name]
    model, batches = make().eval(), [(inputs(), None) for _ in range(5)]
    example = batches[0][0]
    model(*example) if isinstance(example, tuple) else model(example)
    budget = Budget(macs=0.6)
    result = compress.prune(model, example, budget=budget, criterion="l2", calibration=batches, recover=True)
    assert result.recovery is not None
    assert result.recovery.after <= result.recovery.before < float("inf")
    shrunk = compress.shrink(model, example, budget=budget, calibration=batches)
    for made in (result, shrunk):
        assert made.after.macs <= 0.6 * made.before.macs
    again = compress.unfactorize(shrunk.model)
    arguments = example if isinstance(example, tuple) else (example,)
    torch.testing.assert_close(again(*arguments), shrunk.model(*arguments), rtol=1e-4, atol=1e-4)
