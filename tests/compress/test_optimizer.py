"""A step of the pruned model with the optimiser that followed is the step of the masked model, cut."""

import copy

import pytest
import torch
from torch import nn

import compress
from compress import Budget, PruneError, apply, mask, prune
from tests.compress.helpers import image, lively
from tests.compress.test_pruning import Net

OPTIMIZERS = {
    "momentum": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True),
    "plain": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.01, amsgrad=True),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.01),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=0.01, momentum=0.9, centered=True),
}


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    optimizer.zero_grad()
    model(image(5, 3, 9, 7, seed=seed).double()).square().mean().backward()
    optimizer.step()


def _trained(make):
    """A network and its optimiser in two groups, with momenta."""
    model = lively(Net()).train()
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    optimizer = make([{"params": [p for p in model.parameters() if all(p is not n for n in norms)]},
                      {"params": norms, "lr": 0.003}])  # fmt: skip
    for seed in range(3):
        _step(model, optimizer, seed)
    return model, optimizer


def _cut(tensor: torch.Tensor, name: str, plan: compress.PrunePlan) -> torch.Tensor:
    for (parameter, axis), gone in plan.removed().items():
        if parameter == name:
            kept = [i for i in range(tensor.shape[axis]) if i not in gone]
            tensor = tensor.index_select(axis, torch.tensor(kept))
    return tensor


@pytest.mark.parametrize("way", ["copy", "inplace", "prune"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_the_masked_model(name: str, way: str) -> None:
    make = OPTIMIZERS[name]
    model, optimizer = _trained(make)
    budget = Budget(macs=0.5)
    plan = prune(model, image().double(), budget=budget).plan
    assert plan.exact
    twin = mask(model, plan)
    of = dict(zip(model.parameters(), twin.parameters(), strict=True))
    followed = make([{**group, "params": [of[p] for p in group["params"]]} for group in optimizer.param_groups])
    followed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    if way == "prune":
        pruned = prune(model, image().double(), budget=budget, optimizer=optimizer).model
    else:
        pruned = apply(model, plan, inplace=way == "inplace", optimizer=optimizer)
    held = {p for group in optimizer.param_groups for p in group["params"]}
    assert held == set(pruned.parameters())
    assert set(optimizer.state) <= held
    _step(pruned.train(), optimizer, 9)
    _step(twin.train(), followed, 9)
    before = dict(model.named_parameters()) if way != "inplace" else {}
    for key, expected in twin.named_parameters():
        found = pruned.get_parameter(key)
        torch.testing.assert_close(found, _cut(expected, key, plan), rtol=1e-9, atol=1e-12)
        if key in before and "weight" in key:  # the bias before a batch norm has no gradient
            assert not torch.equal(found, _cut(before[key], key, plan)), "nothing moved"


def test_what_is_kept_by_rows_and_columns_is_cut_along_them() -> None:
    model = lively(Net()).train()
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.01)
    _step(model, optimizer, 0)
    old = {name: dict(optimizer.state[p]) for name, p in model.named_parameters()}
    plan = prune(model, image().double(), budget=Budget(macs=0.5)).plan
    pruned = apply(model, plan, optimizer=optimizer)
    cut = 0
    for name, parameter in pruned.named_parameters():
        for key, value in optimizer.state[parameter].items():
            whole = old[name][key]
            if not isinstance(value, torch.Tensor) or whole.numel() <= 1:
                continue
            assert all(n in (1, size) for n, size in zip(value.shape, parameter.shape, strict=True))
            cut += value.numel() < whole.numel()
    assert cut > 4
    _step(pruned, optimizer, 1)


def test_schedulers_and_parameters_of_others_go_on() -> None:
    model, other = lively(Net()).train(), nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = torch.optim.SGD([*model.parameters(), other], lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    other.grad = torch.ones_like(other)
    optimizer.step()
    pruned = prune(model, image().double(), budget=Budget(macs=0.5), optimizer=optimizer).model
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert optimizer.param_groups[0]["params"][-1] is other
    assert optimizer.state[other]["momentum_buffer"].tolist() == [1, 1, 1]
    _step(pruned, optimizer, 0)


def test_tied_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.body, self.embedding = (
                nn.Linear(11, 13, bias=False),
                nn.Linear(11, 11),
                nn.Embedding(13, 11),
            )
            self.embedding.weight = self.head.weight

        def forward(self, x):
            return self.head(self.body(self.embedding(x)))

    model, x = Tied(), torch.arange(6).reshape(2, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model(x).square().mean().backward()
    optimizer.step()
    pruned = prune(model, x, budget=Budget(params=0.6), optimizer=optimizer).model
    assert optimizer.state[pruned.head.weight]["exp_avg"].shape == pruned.head.weight.shape
    assert pruned.head.weight.shape[1] < 11
    pruned(x).square().mean().backward()
    optimizer.step()


def test_an_optimizer_of_another_model_is_refused() -> None:
    model = Net()
    optimizer = torch.optim.SGD(Net().parameters(), lr=0.1)
    before = list(optimizer.param_groups[0]["params"])
    plan = prune(model, image(), budget=Budget(macs=0.5)).plan
    for inplace in (True, False):
        with pytest.raises(PruneError, match="the optimizer holds none of the model's parameters"):
            apply(model, plan, inplace=inplace, optimizer=optimizer)
    assert model.stem.out_channels == 17
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], before, strict=True))


def test_state_that_belongs_to_no_one_parameter_is_refused() -> None:
    model = lively(Net())
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1e-3, max_iter=2)

    def closure():
        optimizer.zero_grad()
        loss = model(image().double()).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    before = model.stem.weight
    with pytest.raises(PruneError, match="LBFGS keeps .*: make a new optimizer after pruning"):
        apply(model, prune(model, image().double(), budget=Budget(macs=0.5)).plan, inplace=True, optimizer=optimizer)
    assert model.stem.weight is before
    assert model.stem.out_channels == 17
