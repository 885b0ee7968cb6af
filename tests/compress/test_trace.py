import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import compress
from compress.recorder import Trace
from compress.stand_ins import ON_DEVICE, REAL, STAND_INS, RealTensors
from compress.trace import _record, as_arguments, describe, record
from tests.compress.helpers import Apply, image, tokens


def _model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 11, 3), nn.BatchNorm2d(11), nn.ReLU(), nn.Dropout(), nn.Conv2d(11, 5, 1))


class Caches(nn.Module):
    """Keeps tensors, counts calls, draws random numbers of every kind, and adds an attribute and a buffer late."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 11, 3), nn.BatchNorm2d(11), nn.Conv2d(11, 5, 1)
        self.calls, self.seen = 0, []
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("mask", None)
        self.cache = {}

    def forward(self, x):
        self.calls += 1
        self.steps += 1
        self.late = x
        if self.mask is None:
            self.mask = torch.ones(11, 1, 1)
        random.random()
        np.random.rand()
        x = F.dropout(self.norm(self.conv(x)), 0.3, self.training) * self.mask
        self.cache["x"] = x
        return self.head(x)


def _state(model: nn.Module) -> tuple:
    """Everything that an observer could see of a model and of the random generators."""
    attributes = {
        name: {k: v for k, v in vars(module).items() if k not in ("_parameters", "_buffers", "_modules")}
        for name, module in model.named_modules()
    }
    slots = {name: (dict(m._parameters), dict(m._buffers), dict(m._modules)) for name, m in model.named_modules()}
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    return attributes, slots, tensors, states


def _assert_unchanged(before: tuple, model: nn.Module) -> None:
    after = _state(model)
    assert before[0].keys() == after[0].keys()
    for name, attributes in before[0].items():
        assert attributes.keys() == after[0][name].keys(), name
        assert all(after[0][name][k] is v or after[0][name][k] == v for k, v in attributes.items()), name
    for name, slots in before[1].items():
        for old, new in zip(slots, after[1][name], strict=True):
            assert old.keys() == new.keys(), name
            assert all(new[k] is v for k, v in old.items()), name
    assert all(torch.equal(value, after[2][name]) for name, value in before[2].items())
    assert torch.equal(before[3][0], after[3][0])
    assert before[3][1:] == after[3][1:]


USES = {
    "trace": lambda m: compress.trace(m, image()),
    "measure": lambda m: compress.measure(m, image()),
    "prune": lambda m: compress.prune(m, image(), budget=compress.Budget(macs=0.6)),
    "prune by activations": lambda m: compress.prune(
        m, image(), budget=compress.Budget(macs=0.6), criterion="nonzero", calibration=[image(), image(3, 3, 9, 7)]),
    "prune and recover": lambda m: compress.prune(
        m, image(), budget=compress.Budget(macs=0.6), recover=True, calibration=[image()]),
    "mask, apply": lambda m: _masked_and_applied(m),
    "latency": lambda m: compress.latency(m, image(), repeats=1),
}  # fmt: skip


def _masked_and_applied(model: nn.Module) -> None:
    plan = compress.prune(model, image(), budget=compress.Budget(macs=0.6)).plan
    compress.mask(model, plan)
    compress.apply(model, plan)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("mode", ["train", "eval", "mixed"])
@pytest.mark.parametrize("make", [_model, Caches])
def test_the_model_given_is_untouched(make, mode: str, use: str) -> None:
    model = make()
    with torch.no_grad():
        model.train()(image())  # so that statistics, counts and caches are not what they were at first
    model.train(mode != "eval")
    if mode == "mixed":
        next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).eval()
    before = _state(model)
    USES[use](model)
    _assert_unchanged(before, model)


def test_both_modes_are_recorded() -> None:
    trace = record(_model(), image())
    assert len(trace.training) > len(trace.evaluation) > 0, "dropout runs in training only"
    assert {op.arguments.get("train", op.arguments.get("training")) for op in trace.training} >= {True}
    assert record(_model(), image(), training=False).training == []


def test_training_mode_sees_two_samples_so_that_batch_norm_runs() -> None:
    model = nn.Sequential(nn.Linear(3, 11), nn.BatchNorm1d(11), nn.Linear(11, 5))
    trace = record(model, image(1, 3))
    assert trace.training
    assert not trace.notes


def test_heads_that_exist_in_training_only_are_seen() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head, self.extra = nn.Linear(3, 11), nn.Linear(11, 5), nn.Linear(11, 2)

        def forward(self, x):
            x = self.stem(x)
            return (self.head(x), self.extra(x)) if self.training else self.head(x)

    (group,) = compress.trace(Auxiliary(), image(7, 3)).groups
    assert ("extra.weight", 1, "consumer") in {(m.parameter, m.axis, m.role) for m in group.members}


def test_a_model_that_looks_at_its_data_is_run_for_real() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(3, 11), nn.Linear(11, 5)

        def forward(self, x):
            x = self.stem(x)
            return self.head(x * 2 if float(x.sum()) > 0 else x)

    graph = compress.trace(Looks(), image(7, 3))
    assert graph.trace.real
    assert any("real forward pass" in note for note in graph.trace.notes)
    assert [group.num_units for group in graph.groups] == [11]


@pytest.mark.parametrize(
    "inputs",
    [(image(7, 3), image(7, 3, seed=1)), {"a": image(7, 3), "b": image(7, 3, seed=1)}, (image(7, 3), None)],
    ids=["tuple", "dict", "optional"],
)
def test_every_form_of_inputs(inputs) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = nn.Linear(3, 11), nn.Linear(3, 11), nn.Linear(11, 5)

        def forward(self, a, b=None):
            return {"result": self.head(self.one(a) if b is None else self.one(a) + self.two(b))}

    assert compress.trace(Two(), inputs).groups[0].num_units == 11


def test_shared_parameters_have_one_name() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert set(record(model, image(7, 3)).parameters) == {"0.weight", "0.bias", "1.bias"}


def test_arguments_and_descriptions() -> None:
    x = image(2, 3)
    assert as_arguments(x) == ((x,), {})
    assert as_arguments({"x": x}) == ((), {"x": x})
    assert describe({"x": x, "n": 3}) == "(2, 3)"
    assert describe(3) == "no tensors"
    with pytest.raises(compress.TraceError, match="example_inputs is a list: pass a tensor, a tuple"):
        as_arguments([x])


def test_the_wrong_shape_is_one_clear_line() -> None:
    message = r"does not run on its example inputs \(\(2, 4, 9, 7\)\) in module 0: "
    with pytest.raises(compress.TraceError, match=message) as caught:
        compress.trace(_model(), image(2, 4, 9, 7))
    assert "\n" not in str(caught.value)


def test_a_model_without_parameters_is_refused() -> None:
    with pytest.raises(compress.TraceError, match="no parameters"):
        compress.trace(nn.ReLU(), image())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_a_scripted_model_is_refused() -> None:
    with pytest.raises(compress.TraceError, match="TorchScript"):
        compress.trace(torch.jit.script(nn.Linear(3, 5)), image(7, 3))
    with pytest.raises(compress.TraceError, match="module 1 is a TorchScript module"):
        compress.trace(nn.Sequential(nn.ReLU(), torch.jit.script(nn.Linear(3, 5))), image(7, 3))


def test_parameters_without_a_shape_are_refused() -> None:
    with pytest.raises(compress.TraceError, match=r"parameter 1.weight has no shape yet .*: run the model once"):
        compress.trace(nn.Sequential(nn.ReLU(), nn.LazyLinear(5)), image(7, 3))


def test_an_error_leaves_the_model_as_it_was() -> None:
    class Fails(Caches):
        def forward(self, x):
            super().forward(x)
            raise RuntimeError("no\nmore")

    model = Fails()
    before = _state(model)
    with pytest.raises(compress.TraceError, match="example inputs .*: no;"):
        compress.trace(model, image())
    _assert_unchanged(before, model)


def test_in_training_mode_only_errors_are_noted() -> None:
    class NotInTraining(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(3, 11), nn.Linear(11, 5)

        def forward(self, x):
            if self.training:
                raise RuntimeError("for inference only")
            return self.head(self.stem(x))

    graph = compress.trace(NotInTraining(), image(7, 3))
    assert any("training mode was not traced: for inference only" in note for note in graph.trace.notes)
    assert len(graph.groups) == 1


def test_stored_integers_are_known_by_their_place() -> None:
    model = nn.Sequential(Apply(lambda m, x: x, width=3, sizes=[4, 5]), nn.Linear(3, 5))
    stored = {str(leaf): value for leaf, value in record(model, image(7, 3)).stored.items()}
    assert stored["0.width"] == 3
    assert stored["0.sizes[1]"] == 5
    assert stored["1.in_features"] == 3


def test_token_models_are_traced() -> None:
    assert compress.trace(nn.Sequential(nn.Embedding(13, 11), nn.Linear(11, 5)), tokens()).groups[0].num_units == 11


def test_inference_mode_changes_nothing() -> None:
    expected = [(str(op), op.outputs[0].shape) for op in record(_model(), image()).ops]
    with torch.inference_mode():
        model, x = _model(), image()
        assert [(str(op), op.outputs[0].shape) for op in record(model, x).ops] == expected


class Fused(nn.Module):
    """Layers for which PyTorch has kernels of their own on some devices."""

    def __init__(self, *, recurrent: bool) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Hardswish(), nn.MaxPool2d(2))
        self.encoder = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.lstm = nn.LSTM(8, 8, batch_first=True) if recurrent else None
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.encoder(self.stem(x).flatten(2).transpose(1, 2))
        x = F.scaled_dot_product_attention(x, x, x, is_causal=True)
        x = x if self.lstm is None else self.lstm(x)[0]
        return self.head(x.mean(1))


def _operators(trace: Trace) -> list[tuple]:
    return [(str(op), [t.shape for t in op.tensors]) for op in trace.ops]


@pytest.mark.parametrize(
    ("stand_ins", "recurrent"),
    [(STAND_INS, False), (ON_DEVICE, False), (ON_DEVICE, True), (REAL, True)],
    ids=["any", "on device", "recurrent", "real"],
)
def test_operators_are_the_same_with_data_and_without(stand_ins, recurrent: bool) -> None:
    """What is found on shapes is looked for on data: the n-th operator of one run is the n-th of the other."""
    model, x = Fused(recurrent=recurrent).eval(), torch.rand(2, 3, 9, 7)
    real = _record(model, (x,), {}, training=False, stand_ins=RealTensors())
    assert _operators(record(model, x, training=False, stand_ins=stand_ins)) == _operators(real)
