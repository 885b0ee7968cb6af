"""Optimiser state goes from round to round, cut with the model, also through a crash; nothing else changes."""

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import compress
from compress import Budget, PruneError
from compress.carry import Carry, OptimizerState, read_state
from compress.rounds import RoundContext
from tests.compress.test_loop import EXAMPLE, data, evaluate, history, new_model

OPTIMIZERS = {
    "momentum": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9),
    "plain": lambda ps: torch.optim.SGD(ps, lr=0.05),
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.01, amsgrad=True),
}


class _Crash(BaseException):
    """Like a kill, it is caught by nobody."""


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    images, labels = data()
    batch = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:32]
    optimizer.zero_grad()
    F.cross_entropy(model(images[batch]), labels[batch]).backward()
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_round_goes_on_as_an_optimizer_that_followed_the_surgery(name: str, tmp_path: Path) -> None:
    """The oracle is one optimiser that lives through the rounds and goes to ``prune`` itself."""
    make = OPTIMIZERS[name]

    def train(model: nn.Module, context: RoundContext) -> None:
        optimizer = make(model.parameters())
        context.carry(optimizer)
        for step in range(4):
            _step(model, optimizer, 10 * context.round + step)

    budget, options = Budget(macs=0.5), {"schedule": "linear", "criterion": "l1", "rounds": 2}
    found = compress.iterate(
        new_model(), EXAMPLE, train=train, evaluate=evaluate, budget=budget, folder=tmp_path, **options
    )
    model = new_model()
    optimizer = make(model.parameters())
    dense, target = found.before.macs, [record.target for record in found.rounds]
    for index in (1, 2):
        fraction = target[index] * dense / compress.measure(model, EXAMPLE).macs
        pruned = compress.prune(model, EXAMPLE, budget=Budget(macs=fraction), criterion="l1", optimizer=optimizer)
        model = pruned.model.train()
        for step in range(4):
            _step(model, optimizer, 10 * index + step)
    expected = model.state_dict()
    for key, value in found.model.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6)


def test_a_crash_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = {"now": 0, "crash": False}

    def train(model: nn.Module, context: RoundContext) -> None:
        optimizer = OPTIMIZERS["momentum"](model.parameters())
        context.carry(optimizer)
        for step in range(4):
            _step(model, optimizer, step)
            attempts["now"] += 1
            if attempts["crash"] and attempts["now"] % 5 == 0:
                raise _Crash

    def run(folder: Path) -> None:
        compress.iterate(
            new_model(), EXAMPLE, train=train, evaluate=evaluate, budget=Budget(macs=0.4), rounds=3, folder=folder
        )

    run(tmp_path / "undisturbed")
    attempts["crash"] = True
    crashes = 0
    rename = os.rename

    def crash_after(source: Path, target: Path) -> None:
        rename(source, target)
        if Path(target).name in ("01", "02.pruned"):
            raise _Crash

    monkeypatch.setattr("compress.folder.os.rename", crash_after)
    while True:
        torch.manual_seed(crashes)
        try:
            run(tmp_path / "crashed")
            break
        except _Crash:
            crashes += 1
    assert crashes > 2
    assert history(tmp_path / "crashed") == history(tmp_path / "undisturbed")
    files = [folder / "rounds" / "03" / "optimizer.safetensors" for folder in tmp_path.iterdir()]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_parameters_of_others_and_options_are_left_alone(tmp_path: Path) -> None:
    model, other = new_model(), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([{"params": [other], "lr": 0.5}, {"params": list(model.parameters())}], lr=0.01)
    (model(data()[0]).square().sum() + other.sum()).backward()
    optimizer.step()
    OptimizerState.of(optimizer, model).save(tmp_path / "state", model)
    state = read_state(tmp_path / "state", model)
    again = torch.optim.Adam([{"params": list(model.parameters())}, {"params": [other], "lr": 0.7}], lr=0.02)
    Carry(model, state)(again)
    assert [group["lr"] for group in again.param_groups] == [0.02, 0.7]
    assert not again.state[other]
    for parameter in model.parameters():
        assert {key: value.tolist() for key, value in again.state[parameter].items()} == {
            key: value.tolist() for key, value in optimizer.state[parameter].items()
        }


def test_what_cannot_be_carried_is_named(tmp_path: Path) -> None:
    model = new_model()
    state = OptimizerState(model, "SGD", {})
    with pytest.raises(PruneError, match="is of SGD, and this is Adam"):
        Carry(model, state)(torch.optim.Adam(model.parameters()))
    carry = Carry(model, None)
    carry(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(PruneError, match="one optimizer a round"):
        carry(torch.optim.SGD(model.parameters(), lr=0.1))
    state = OptimizerState(model, "LBFGS", {"head.weight": {"old_dirs": [torch.ones(1)]}})
    with pytest.raises(PruneError, match="LBFGS keeps 'old_dirs' of head.weight, a list"):
        state.save(tmp_path / "state", model)
    assert not (tmp_path / "state").exists()
