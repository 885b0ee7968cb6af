import copy

import pytest
import torch
from torch import nn

import compress
from compress import Budget, PrunePlan, apply, mask, prune
from compress.plan import PlanGroup, PlanMember, StoredValue
from tests.compress.helpers import Apply, assert_same, image, lively, masked_by_hand


def _model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 11, 3), nn.BatchNorm2d(11), nn.PReLU(11), nn.Conv2d(11, 7, 1), nn.Conv2d(7, 5, 1))


def _plan(model: nn.Module | None = None) -> PrunePlan:
    return prune(model or _model(), image(), budget=Budget(channels=0.5)).plan


def test_another_instance_is_pruned_alike() -> None:
    plan, other = _plan(), lively(_model(), seed=4)
    pruned = apply(other, plan)
    assert_same(pruned, masked_by_hand(other, plan), image().double())
    assert_same(pruned, mask(other, plan), image().double())
    for name, value in pruned.state_dict().items():
        kept = other.state_dict()[name]
        for (parameter, axis), gone in plan.removed().items():
            if parameter == name:
                keep = [i for i in range(kept.shape[axis]) if i not in gone]
                kept = kept.index_select(axis, torch.tensor(keep))
        assert torch.equal(value, kept), name


def test_the_copy_shares_nothing_with_the_model() -> None:
    model = _model()
    own = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    for other in (apply(model, _plan()), mask(model, _plan())):
        assert own.isdisjoint(t.data_ptr() for t in (*other.parameters(), *other.buffers()))
        assert all(p.is_leaf and p.requires_grad for p in other.parameters())


def test_inplace_prunes_the_model_itself() -> None:
    model, plan = _model(), _plan()
    expected = apply(model, plan)
    assert apply(model, plan, inplace=True) is model
    assert_same(model, expected, image(), 0.0)
    assert (model[0].out_channels, model[1].num_features) == (expected[0].out_channels,) * 2


def test_layers_say_what_they_are() -> None:
    model = apply(_model(), _plan())
    width = model[0].weight.shape[0]
    assert model[0].out_channels == model[1].num_features == model[2].num_parameters == model[3].in_channels == width
    assert f"{width}, " in repr(model[0])


def test_frozen_parameters_and_memory_format_stay() -> None:
    model = _model().to(memory_format=torch.channels_last)
    model[0].weight.requires_grad_(False)
    pruned = apply(model, _plan())
    assert not pruned[0].weight.requires_grad
    assert pruned[3].weight.requires_grad
    assert pruned[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_mode_hooks_and_attributes_are_kept() -> None:
    model = _model().eval()
    model.note = {"a": 1}
    model[0].train()
    pruned = apply(model, _plan())
    assert not pruned.training
    assert pruned[0].training
    assert pruned.note == {"a": 1}


def test_shared_modules_and_tied_weights_stay_shared() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.body = nn.Embedding(13, 11), nn.Linear(11, 7)
            self.back, self.head = nn.Linear(7, 11), nn.Linear(11, 13, bias=False)
            self.head.weight = self.embedding.weight
            self.again = self.body

        def forward(self, x):
            x = self.embedding(x)
            return self.head(self.back(self.body(x) + self.again(x)))

    model, x = Tied(), torch.arange(6).reshape(2, 3)
    plan = prune(model, x, budget=Budget(params=0.6)).plan
    for pruned in (apply(model, plan), apply(copy.deepcopy(model), plan, inplace=True)):
        assert pruned.head.weight is pruned.embedding.weight
        assert pruned.again is pruned.body
        assert pruned.embedding.weight.shape == (13, pruned.embedding.embedding_dim)


def test_integers_are_set_in_lists_tuples_and_dicts() -> None:
    model = nn.Sequential(Apply(lambda m, x: x, sizes=[3, (4, 5)], table={"a": [6]}, width=7), nn.Linear(3, 2))
    given = copy.deepcopy(model)
    plan = PrunePlan((), (StoredValue("0", "sizes", (1, 0), 2), StoredValue("0", "table", ("a", 0), 1),
                         StoredValue("0", "width", (), 5)))  # fmt: skip
    pruned = apply(model, plan)
    assert (pruned[0].sizes, pruned[0].table, pruned[0].width) == ([3, (2, 5)], {"a": [1]}, 5)
    assert (model[0].sizes, model[0].table, model[0].width) == (given[0].sizes, given[0].table, given[0].width)


def _assert_refused(model: nn.Module, plan: PrunePlan, match: str) -> None:
    before = copy.deepcopy(model.state_dict())
    for function in (apply, mask, lambda m, p: apply(m, p, inplace=True)):
        with pytest.raises(compress.PruneError, match=match) as caught:
            function(model, plan)
        assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_parameter_that_is_missing_is_named() -> None:
    _assert_refused(nn.Linear(3, 5), _plan(), r"removes part of '0\.weight', which the model does not have")


def test_a_parameter_of_another_size_is_named() -> None:
    model = _model()
    model[3] = nn.Conv2d(13, 7, 1)
    _assert_refused(
        model, _plan(), r"made for '3\.weight' with 11 elements along axis 1, here it has shape \(7, 13, 1, 1\)"
    )


def test_an_axis_that_is_missing_is_named() -> None:
    plan = PrunePlan((PlanGroup("0.bias", 11, 1, (PlanMember("0.bias", 1, (0,), "carrier", 11),)),))
    _assert_refused(_model(), plan, r"'0\.bias' with 11 elements along axis 1")


@pytest.mark.parametrize(
    ("module", "name", "path"), [("9", "a", ()), ("0", "b", ()), ("0", "a", (5,)), ("0", "a", ("x",))]
)
def test_an_integer_that_is_missing_is_named(module: str, name: str, path: tuple) -> None:
    model = nn.Sequential(Apply(lambda m, x: x, a=[1]), nn.Linear(3, 2))
    _assert_refused(
        model, PrunePlan((), (StoredValue(module, name, path, 2),)), f"the plan changes '{module}.{name}', which"
    )


def test_pruning_twice_with_one_plan_is_refused() -> None:
    plan = _plan()
    _assert_refused(apply(_model(), plan), plan, "apply it to an unpruned instance")


def test_masking_zeroes_the_consumers_alone() -> None:
    model, plan = lively(_model()), _plan()
    masked = mask(model, plan)
    consumers = plan.removed("consumer")
    for name, value in masked.state_dict().items():
        expected = model.state_dict()[name].clone()
        for (parameter, axis), gone in consumers.items():
            if parameter == name:
                expected.index_fill_(axis, torch.from_numpy(gone), 0)
        assert torch.equal(value, expected), name
    assert consumers


def test_tensors_that_a_module_computed_and_kept_are_no_obstacle() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.last = _model(), None

        def forward(self, x):
            self.last = self.body(x)
            return self.last

    model = Keeps()
    model(image())  # part of a graph
    result = prune(model, image(), budget=Budget(channels=0.5))
    assert torch.equal(result.model.last, model.last)
    assert model.last.grad_fn is not None
    assert mask(model, result.plan).last.shape == model.last.shape
