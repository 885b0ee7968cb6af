import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import compress
from compress.cost import CostModel, latencies
from tests.compress.helpers import Apply, image, tokens
from tests.compress.random_networks import RandomNetwork


def macs_by_flop_counter(model: nn.Module, *inputs: torch.Tensor) -> int:
    """The count of PyTorch's own tool. Its module tracker needs gradients for some models, so they stay on.

    Attention runs as products of matrices: in some releases the tool has no formula for the CPU's fused kernel.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.eval()(*inputs)
    return counter.get_total_flops() // 2


MODELS = {
    "convolutions": lambda: (
        nn.Sequential(nn.Conv2d(3, 11, 3), nn.ConvTranspose2d(11, 7, 2), nn.Conv2d(7, 7, 3, groups=7)), image()),
    "linear": lambda: (nn.Sequential(nn.Linear(3, 11), nn.Linear(11, 5, bias=False)), image(2, 7, 3)),
    "embedding": lambda: (nn.Sequential(nn.Embedding(13, 11), nn.Linear(11, 5)), tokens()),
    "products": lambda: (nn.Sequential(nn.Linear(3, 11), Apply(lambda _, x: x @ x.transpose(1, 2))), image(2, 7, 3)),
    "attention": lambda: (
        nn.Sequential(nn.Linear(3, 11), Apply(lambda _, x: F.scaled_dot_product_attention(x, x, x))), image(2, 7, 3)),
    **{f"random {seed}": (lambda seed=seed: (RandomNetwork(seed), image(2, 3, 11, 9))) for seed in range(8)},
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_macs_are_those_of_the_flop_counter(name: str) -> None:
    model, inputs = MODELS[name]()
    assert compress.measure(model, inputs).macs == macs_by_flop_counter(model, inputs)


def test_params_and_bytes_count_every_tensor_once() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 3), nn.Linear(3, 5))
    model[3].weight = model[0].weight
    cost = compress.measure(model, image(7, 3))
    assert cost.params == 15 + 5 + 10 + 15 + 3 + 5
    assert cost.bytes == 4 * (cost.params + 10) + 8
    assert compress.measure(model.double(), image(7, 3).double()).bytes == 8 * (cost.params + 10 + 1)


class Uncounted(nn.Module):
    """Products that PyTorch's counter has no formula for: with a vector, and of three tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.vector = nn.Linear(3, 40), nn.Parameter(torch.randn(40))
        self.form, self.last = nn.Bilinear(40, 40, 6), nn.Linear(6, 4)

    def forward(self, x):
        x = self.first(x).relu()
        return x.mv(self.vector), self.last(self.form(x, x))


def test_products_that_are_not_counted_are_not_foretold_either() -> None:
    model, inputs = Uncounted(), image(7, 3)
    assert compress.measure(model, inputs).macs == macs_by_flop_counter(model, inputs) == 7 * (3 * 40 + 6 * 4)
    result = compress.prune(model, inputs, budget=compress.Budget(macs=0.5))
    assert result.after.macs == macs_by_flop_counter(result.model, inputs) <= 0.5 * result.before.macs
    assert result.after.params < 0.5 * result.before.params


@pytest.mark.parametrize("metric", ["macs", "params"])
@pytest.mark.parametrize("seed", range(12))
def test_the_cost_model_is_exact(seed: int, metric: str) -> None:
    """What is predicted from the numbers of kept units is what the pruned model costs."""
    model, inputs = RandomNetwork(seed), image(2, 3, 11, 9)
    graph = compress.trace(model, inputs)
    result = compress.prune(model, inputs, budget=compress.Budget(channels=0.8), criterion="random", seed=seed)
    kept = graph.sizes.copy()
    by_members = {tuple((m.parameter, m.axis) for m in group.members): group.index for group in graph.groups}
    for group in result.plan.groups:
        kept[by_members[tuple((m.parameter, m.axis) for m in group.members)]] -= group.num_removed
    price = CostModel(graph, metric, getattr(result.before, metric))
    assert price(graph.sizes) == getattr(result.before, metric)
    assert price(kept) == getattr(result.after, metric)
    if metric == "macs":
        assert result.after.macs == macs_by_flop_counter(result.model, inputs)
    else:
        assert result.after.params == sum(p.numel() for p in result.model.parameters())


def test_latency_is_positive_and_in_the_order_of_the_models() -> None:
    small, large = nn.Linear(3, 3), nn.Sequential(*(nn.Linear(301, 301) for _ in range(8)))
    assert compress.latency(small, image(2, 3), repeats=3) > 0
    quick = nn.Sequential(nn.Linear(301, 3))
    seconds = latencies([quick, large], image(64, 301), repeats=5)
    assert 0 < seconds[0] < seconds[1]
