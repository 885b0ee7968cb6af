"""Refitting without data: against least squares on the rows themselves."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from compress.gram import GramCollector
from compress.shrink.narrow import narrow
from compress.sites import find_sites
from compress.trace import record
from compress.watch import gather


def _known(model: nn.Module, x: torch.Tensor):
    """All that is known of the model's only weight that is called "1.weight"."""
    trace = record(model, x, training=False)
    sites = [site for site in find_sites(trace) if site.parameter == "1.weight"]
    (grams,) = gather(model, trace, [x], [lambda: GramCollector(sites, 1, row_share=1e6)])
    return grams.sums["1.weight", 0]


def _rows(x: torch.Tensor, layer: nn.Conv2d) -> torch.Tensor:
    """(N, D) patches."""
    return nn.functional.unfold(x, layer.kernel_size, padding=layer.padding).transpose(1, 2).flatten(0, 1)


@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_that_lost_inputs_and_outputs_is_that_of_lstsq(bias: bool) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 5, 3, padding=1, bias=bias).double()
    model = nn.Sequential(nn.Conv2d(8, 6, 1).double(), conv).eval()
    x = torch.randn(64, 8, 8, 8, dtype=torch.float64)
    metric = torch.randn(5, 5, dtype=torch.float64)
    known = replace(_known(model, x), output_metric=metric[None])
    stays = torch.ones_like(conv.weight, dtype=torch.bool)
    stays[:, [1, 4]] = False
    stays[2] = False
    found = narrow(known, conv.weight.detach(), stays)
    assert found is not None
    inputs, outputs = [0, 2, 3, 5], [0, 1, 3, 4]
    with torch.no_grad():
        middle = model[0](x)
        rows, wanted = _rows(middle[:, inputs], conv), conv(middle)[:, outputs].movedim(1, -1).flatten(0, 2)
    ones = torch.ones(len(rows), 1, dtype=torch.float64)
    if bias:
        wanted = wanted - conv.bias.detach()[outputs]
        rows = torch.cat([rows, ones], 1)
    solution = torch.linalg.lstsq(rows, wanted).solution
    matrix = found.matrix[0] if bias else found.matrix[0, :, :-1]
    torch.testing.assert_close(matrix, solution.T, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.sums.gram[0, :-1, :-1], rows[:, :36].T @ rows[:, :36])
    assert found.sums.output_metric is not None
    assert torch.equal(found.sums.output_metric[0], metric[outputs][:, outputs])


def test_nothing_gone_changes_nothing_and_copies_stand_in_without_loss() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3)).double().eval()
    with torch.no_grad():
        model[0].weight[5], model[0].bias[5] = model[0].weight[2], model[0].bias[2]
    x = torch.randn(200, 8, dtype=torch.float64)
    known = _known(model, x)
    weight = model[1].weight.detach()
    same = narrow(known, weight, torch.ones_like(weight, dtype=torch.bool))
    assert same is not None
    torch.testing.assert_close(same.matrix[0, :, :-1], weight)
    stays = torch.ones_like(weight, dtype=torch.bool)
    stays[:, 5] = False
    found = narrow(known, weight, stays)
    assert found is not None
    torch.testing.assert_close(found.matrix[0, :, 2], weight[:, 2] + weight[:, 5], rtol=1e-3, atol=1e-4)


def test_grouped_convolutions_keep_the_same_of_each_group_or_are_refused() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=2)).double().eval()
    x = torch.randn(32, 3, 6, 6, dtype=torch.float64)
    known, weight = _known(model, x), model[1].weight.detach()
    stays = torch.ones_like(weight, dtype=torch.bool)
    stays[:, 1] = False
    found = narrow(known, weight, stays)
    assert found is not None
    assert found.matrix.shape == (2, 4, 3 * 9 + 1)
    stays[:4] = False  # a whole group
    found = narrow(known, weight, stays)
    assert found is not None
    assert found.matrix.shape == (1, 4, 3 * 9 + 1)
    stays[:] = True
    stays[0] = False
    assert narrow(known, weight, stays) is None
