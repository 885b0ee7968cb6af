"""What errors of one layer make of the next: against noise that is put there."""

import pytest
import torch
from torch import nn

from compress.factorize.importance import passed_on
from compress.gram import GramCollector, GramSums
from compress.sites import Key, find_sites
from compress.trace import record
from compress.watch import gather


def _sums(model: nn.Module, x: torch.Tensor) -> tuple[dict[Key, GramSums], dict[Key, GramSums]]:
    """As gathered, and passed on."""
    trace = record(model, x, training=False)
    (grams,) = gather(model, trace, [x], [lambda: GramCollector(find_sites(trace), 1, row_share=1e6)])
    return dict(grams.sums), passed_on(grams.sums, trace, dict(model.named_parameters()))


class Residual(nn.Module):
    """Two convolutions with a batch norm between them, added to the input."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.outer = nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3)
        with torch.no_grad():
            self.norm.weight.uniform_(0.1, 3.0)
            self.inner.weight.mul_(torch.rand(6, 1, 1, 1) * 5)

    def forward(self, x, noise=None):
        y = self.inner(x)
        return x[:, :, 1:-1, 1:-1] + self.outer(self.norm(y if noise is None else y + noise))


@pytest.mark.parametrize("channel", [0, 3, 5])
def test_noise_on_a_channel_counts_what_it_makes_of_the_stream(channel: int) -> None:
    torch.manual_seed(0)
    model = Residual().double().eval()
    x = torch.randn(256, 4, 8, 8, dtype=torch.float64)
    gathered, known = _sums(model, x)
    noise = torch.zeros(256, 6, 8, 8, dtype=torch.float64)
    noise[:, channel] = 0.3 * torch.randn(256, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        stream = model(x)
        error = (model(x, noise) - stream).square().mean((0, 2, 3)).sum() / stream.var((0, 2, 3)).sum()
    predicted = 0.09 * float(known["inner.weight", 0].output_share[0, channel])
    assert predicted == pytest.approx(float(error), rel=0.1)
    assert torch.equal(known["outer.weight", 0].output_share, gathered["outer.weight", 0].output_share)


def test_it_goes_on_over_several_layers_and_dead_channels_count_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 3)).double().eval()
    with torch.no_grad():
        model[2].weight[:, 4] = 0  # nobody reads it
        model[0].weight[1], model[0].bias[1] = 0, -1  # it gives nothing
    x = torch.randn(500, 5, dtype=torch.float64)
    gathered, known = _sums(model, x)
    share = known["0.weight", 0].output_share[0]
    assert share[4] == 0
    assert share[1] == 0
    assert bool(share.isfinite().all())
    assert bool((share[[0, 2, 3, 5]] > 0).all())
    assert torch.equal(known["4.weight", 0].output_share, gathered["4.weight", 0].output_share)


def test_a_layer_that_several_read_is_judged_by_its_own_outputs() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.left, self.right = nn.Linear(5, 6), nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x):
            x = self.first(x).relu()
            return self.left(x) * self.right(x)

    torch.manual_seed(0)
    gathered, known = _sums(Fork().eval(), torch.randn(100, 5))
    assert all(torch.equal(known[key].output_share, gathered[key].output_share) for key in gathered)
