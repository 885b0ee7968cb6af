"""Who reads a value, where operators write in place."""

import torch
from torch import Tensor, nn

from compress.landing import find_landings
from compress.rules.registry import base_name
from compress.sites import find_sites
from compress.trace import record
from compress.uses import Uses
from tests.compress.helpers import Apply


def test_a_value_has_the_readers_up_to_the_next_one_that_writes_to_it() -> None:
    def forward(_: nn.Module, x: Tensor) -> Tensor:
        y = x * 2
        y.add_(1)  # the only reader of 2 x
        z = y.sigmoid()  # one of two readers of 2 x + 1
        y.relu_()
        return y + z

    trace = record(nn.Sequential(nn.Linear(3, 3), Apply(forward)), torch.zeros(2, 3), training=False)
    uses = Uses(trace)
    doubled, plus_one, sigmoid, relu, total = trace.evaluation[-5:]
    assert base_name(doubled) == "mul"
    assert uses.only_reader(doubled.outputs[0], doubled) is plus_one
    assert uses.only_reader(plus_one.outputs[0], plus_one) is None
    assert uses.only_reader(sigmoid.outputs[0], sigmoid) is total
    assert uses.only_reader(relu.outputs[0], relu) is total
    assert uses.only_reader(total.outputs[0], total) is None, "an output"


class Block(nn.Module):
    """A residual block as torchvision writes it, in place or not."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm_a, self.norm_b = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.relu, self.inplace = nn.ReLU(inplace), inplace

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_b(self.b(self.relu(self.norm_a(self.a(x)))))
        if self.inplace:
            y += x
        else:
            y = y + x
        return self.relu(y)


def test_landings_are_the_same_in_place_and_not() -> None:
    landings = []
    for inplace in (True, False):
        trace = record(nn.Sequential(nn.Conv2d(4, 4, 1), Block(inplace)), torch.zeros(2, 4, 5, 5), training=False)
        found = find_landings(trace, find_sites(trace))
        landings.append({key: (one.adds, one.rectified, one.intercept, len(one.steps)) for key, one in found.items()})
    assert landings[0] == landings[1]
    assert landings[0]["1.b.weight", 0] == (True, True, ("1.norm_b.running_mean", -1), 1)
