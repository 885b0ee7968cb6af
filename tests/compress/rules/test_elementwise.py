import pytest
import torch
import torch.nn.functional as F
from torch import nn

import compress
from compress.rules.elementwise import pointwise
from compress.rules.registry import RULES
from tests.compress.helpers import Apply, assert_exact, between, frozen_reasons, image

aten = torch.ops.aten

# between two convolutions: each function is given an activation of 11 channels
FUNCTIONS = {
    "where": lambda x: torch.where(x > 0, x, x * 0.1),
    "copy": lambda x: torch.empty_like(x).copy_(x),
    "addcmul": lambda x: torch.addcmul(x, x, x, value=0.5),
    "addcdiv": lambda x: torch.addcdiv(x, x, x.square() + 1),
    "masked_fill": lambda x: x.masked_fill(x < 0, -0.3),
    "lerp": lambda x: torch.lerp(x, x.square(), 0.3),
    "threshold_backward": lambda x: aten.threshold_backward(x, x, 0.1),
    "clone": lambda x: x.clone(),
    "alias": lambda x: aten.alias(x) + x.detach(),
    "to": lambda x: x.to(torch.float32).to(torch.float64),
    "lift_fresh": lambda x: aten.lift_fresh(x) + aten.lift_fresh_copy(x),
    "native_dropout": lambda x: aten.native_dropout(x, 0.5, False)[0],
    "bernoulli": lambda x: x * torch.bernoulli(torch.ones_like(x)),
    "random in place": lambda x: x + 0 * (
        torch.empty_like(x).uniform_() + torch.empty_like(x).normal_()
        + torch.empty_like(x).exponential_() + torch.empty_like(x).random_(5)
    ),
    "zero, fill": lambda x: x + x.clone().zero_() + x.clone().fill_(0.2),
    "likes": lambda x: x + torch.zeros_like(x) + torch.ones_like(x) + torch.full_like(x, 0.3)
             + 0 * torch.rand_like(x) + 0 * torch.randn_like(x),
    "cumsum": lambda x: x.cumsum(2) + x.cumprod(-1),
    "flip": lambda x: x.flip(3, -2),
    "in place": lambda x: x.clone().sin_().mul_(2.0).add_(x).sub_(1),
    "integers as numbers": lambda x: (x * 3 + 2).div(4).clamp(-1, 1),
    "activations without a tag": lambda x: F.hardswish(x) + F.logsigmoid(x) + torch.floor_divide(x.detach(), 0.25),
    "activations without one in some releases": lambda x: (
        F.leaky_relu(x) + F.elu(x) + F.celu(x) + F.selu(x) + F.hardtanh(x) + F.hardsigmoid(x)
    ),
    "such activations in place": lambda x: sum(
        f(x + 0, inplace=True) for f in (F.leaky_relu, F.elu, F.celu, F.selu, F.hardtanh, F.hardsigmoid)
    ),
    "bool": lambda x: x * (x > 0.2).logical_not() * ((x < 1) & (x > -1)),
    "maximum": lambda x: torch.maximum(x, -x) + torch.fmin(x, x * 2) + torch.atan2(x, x + 9),
}  # fmt: skip


class Residual(nn.Module):
    """Two branches meet: their channels go together."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.head = nn.Conv2d(3, 11, 1), nn.Conv2d(11, 11, 3, padding=1), nn.Conv2d(11, 5, 1)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.head(x + self.branch(x))


class Gate(nn.Module):
    """Squeeze and excitation: a channel axis meets itself through a bottleneck, broadcast over space."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 11, 3), nn.Conv2d(11, 5, 1)
        self.down, self.up = nn.Conv2d(11, 7, 1), nn.Conv2d(7, 11, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.head(x * self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid())


class Scale(nn.Module):
    """Raw parameters of several broadcast shapes meet one activation; the last adds a leading axis."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 11, 3), nn.Conv2d(11, 5, 1)
        self.gamma, self.shift = nn.Parameter(torch.ones(11, 1, 1)), nn.Parameter(torch.zeros(1, 11, 1, 1))
        self.map, self.number = nn.Parameter(torch.ones(1, 1, 7, 5)), nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return self.head((self.stem(x) * self.gamma + self.shift) * self.map + self.number)


CASES = {name: (lambda f=f: (between(f), image())) for name, f in FUNCTIONS.items()}
CASES |= {
    "residual": lambda: (Residual(), image()),
    "gate": lambda: (Gate(), image()),
    "scale": lambda: (Scale(), image()),
    "prelu": lambda: (nn.Sequential(nn.Conv2d(3, 11, 3), nn.PReLU(11), nn.Conv2d(11, 5, 1)), image()),
    "gated linear unit": lambda: (nn.Sequential(nn.Conv2d(3, 22, 3), nn.GLU(1), nn.Conv2d(11, 5, 1)), image()),
    "dropout": lambda: (nn.Sequential(nn.Conv2d(3, 11, 3), nn.Dropout2d(), nn.Dropout(), nn.Conv2d(11, 5, 1)), image()),
}


@pytest.mark.parametrize("name", CASES)
def test_removal_equals_masking(name: str) -> None:
    assert_exact(*CASES[name]())


def test_residual_branches_form_one_group() -> None:
    graph = compress.trace(Residual(), image())
    (group,) = graph.groups
    members = {(m.parameter, m.axis): m.role for m in group.members}
    assert members[("stem.weight", 0)] == members[("branch.weight", 0)] == "producer"
    assert members[("branch.weight", 1)] == members[("head.weight", 1)] == "consumer"


def test_a_gate_has_its_own_group_in_the_bottleneck() -> None:
    assert sorted(group.num_units for group in compress.trace(Gate(), image()).groups) == [7, 11]


@pytest.mark.parametrize("function", [lambda x: x.cumsum(1), lambda x: x.flip(1)])
def test_order_along_the_channels_freezes_them(function) -> None:
    graph = compress.trace(between(function), image())
    assert not graph.groups
    assert "depends on the order along the axis" in frozen_reasons(graph, "0.weight")


def test_a_constant_along_the_channels_freezes_them() -> None:
    """A tensor that is no parameter cannot be sliced: its channels stay."""
    constant = torch.ones(11, 1, 1)
    model = nn.Sequential(nn.Conv2d(3, 11, 1), Apply(lambda _, x: x + constant), nn.Conv2d(11, 5, 1))
    assert not compress.trace(model, image()).groups


def _unary_pointwise() -> list[str]:
    """ATen operators that carry the pointwise tag, take one tensor and fall under the general rule."""
    found = []
    for name in dir(aten):
        packet = getattr(aten, name)
        if not hasattr(packet, "overloads") or name.endswith("_") or RULES.get(name, pointwise) is not pointwise:
            continue
        for overload in (getattr(packet, o) for o in packet.overloads()):
            needed = [a for a in overload._schema.arguments if not a.has_default_value()]
            if torch.Tag.pointwise in overload.tags and [str(a.type) for a in needed] == ["Tensor"]:
                found.append(f"{name}.{overload._overloadname}")
    return found


def test_the_pointwise_tag_is_truthful() -> None:
    """The general rule trusts the tag: what a channel becomes does not depend on the others."""
    x = torch.rand(2, 7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
    kept = [0, 2, 5]
    checked = 0
    for name in _unary_pointwise():
        packet, _, overload = name.partition(".")
        function = getattr(getattr(aten, packet), overload)
        try:
            whole = function(x)
        except RuntimeError:  # integers or complex numbers only
            continue
        if not isinstance(whole, torch.Tensor) or whole.shape != x.shape:
            continue
        part = function(x[:, kept].contiguous())
        whole, part = whole[:, kept].nan_to_num().double(), part.nan_to_num().double()
        assert torch.allclose(whole, part, rtol=1e-13, atol=0), name  # vector and scalar code differ in the last bit
        checked += 1
    assert checked > 60


def test_the_halves_of_a_gated_linear_unit_go_together() -> None:
    model = nn.Sequential(nn.Linear(3, 22), nn.GLU(), nn.Linear(11, 5))
    (group,) = compress.trace(model, torch.randn(2, 3)).groups
    assert group.num_units == 11
    rows = {tuple(row) for m in group.members if m.parameter == "0.weight" for row in m.indices.tolist()}
    assert rows == {(i, i + 11) for i in range(11)}
