import torch
import torch.nn.functional as F
from torch import nn

from compress.origins import origin, origins
from compress.provenance import AxisSize, Computed, Stored
from compress.trace import Op, record
from tests.compress.helpers import Apply, image


def _op(function, name: str, inputs=None, **stored) -> Op:
    """The first operator ``name`` of a model that is ``function(self, x)``."""
    model = nn.Sequential(Apply(function, **stored))
    model.register_parameter("unused", nn.Parameter(torch.zeros(1)))
    trace = record(model, image() if inputs is None else inputs, training=False)
    return next(op for op in trace.evaluation if op.func._schema.name == f"aten::{name}")


def test_a_stored_integer_is_found_among_literals() -> None:
    op = _op(lambda m, x: x.view(2, m.width, 63), "view", width=3)
    assert origins(op, "size") == [2, Stored("0", "width"), 63]


def test_arithmetic_on_shapes_is_found() -> None:
    op = _op(lambda m, x: x.view(x.shape[0], x.shape[1], x.shape[2] * x.shape[3]), "view")
    first, second, third = origins(op, "size")
    assert isinstance(first, AxisSize)
    assert (second.tensor, second.axis) == (first.tensor, 1)
    assert isinstance(third, Computed)
    assert third.operator == "*"


def test_minus_one_follows_by_itself() -> None:
    op = _op(lambda m, x: x.reshape(x.size(0), -1), "view")
    assert isinstance(origins(op, "size")[0], AxisSize)
    assert origins(op, "size")[1] is None


def test_what_pytorch_computes_has_no_origin() -> None:
    assert origins(_op(lambda m, x: x.flatten(1), "view"), "size") == [None, None]


def test_of_two_equal_arguments_options_come_last() -> None:
    weight = torch.ones(3, 1, 3, 3)
    op = _op(lambda m, x: F.conv2d(x, weight, None, (1, 1), 0, 1, m.groups), "convolution", groups=3)
    assert origin(op, "groups") == Stored("0", "groups")


def test_a_literal_is_a_number_and_not_an_equal_stored_one() -> None:
    """Repair by equal value would take ``width`` for the 3 in the code."""
    op = _op(lambda m, x: x.narrow(1, 0, 3), "slice", width=3)
    assert origin(op, "end") in (3, None)


def test_bounds_of_slices_are_found() -> None:
    op = _op(lambda m, x: x[:, m.first :], "slice", first=2)
    assert origin(op, "start") == Stored("0", "first")


def test_new_axes_of_unflatten_are_found_in_their_place() -> None:
    model = nn.Sequential(Apply(lambda m, x: x.flatten(2).unflatten(2, (m.height, -1)), height=9), nn.Linear(7, 1))
    views = [op for op in record(model, image(), training=False).evaluation if op.func._schema.name == "aten::view"]
    assert origins(views[1], "size") == [None, None, Stored("0", "height"), None]


def test_sizes_beside_other_integers_are_found() -> None:
    op = _op(lambda m, x: x + torch.zeros(m.width, 1, 1), "zeros", width=3)
    assert origins(op, "size") == [Stored("0", "width"), 1, 1]


def test_a_missing_argument_has_no_origin() -> None:
    assert origin(_op(lambda m, x: x[:, 1:], "slice"), "start") == 1
