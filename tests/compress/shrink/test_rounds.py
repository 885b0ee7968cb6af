"""Rounds that prune and factorise: the budget, one plan over all rounds, a file that loads, and the same path again."""

from pathlib import Path

import pytest
import torch
from torch import nn

import compress
from compress import Budget, PruneError, PrunePlan, ShrinkPlan
from compress.loop import RunResult
from compress.shrink.plan import joined
from tests.compress.factorize.test_factorizing import Net, images
from tests.compress.helpers import assert_same

BATCHES = images(6, 64)


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def train(model: nn.Module) -> None:
    """A few steps towards what the dense model says."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    dense = net()
    for batch in BATCHES[:2]:
        optimizer.zero_grad()
        nn.functional.mse_loss(model(batch), dense(batch).detach()).backward()
        optimizer.step()


def evaluate(model: nn.Module) -> float:
    return 1.0 - float(nn.functional.mse_loss(model(BATCHES[-1]), net()(BATCHES[-1])).detach())


def run(folder: Path, **changes: object) -> RunResult:
    options = {"train": train, "evaluate": evaluate, "budget": Budget(macs=0.3), "rounds": 2, "calibration": BATCHES}
    options |= {"methods": ("prune", "factorize"), "protect": ("stem",)} | changes
    return compress.iterate(net(), BATCHES[0][:1], folder=folder, **options)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunResult]:
    folder = tmp_path_factory.mktemp("run")
    return folder, run(folder)


def test_all_rounds_are_one_plan_and_the_file_loads(done: tuple[Path, RunResult]) -> None:
    folder, result = done
    assert isinstance(result.plan, ShrinkPlan)
    assert {step.kind for step in result.plan.steps} == {"prune", "factorize"}
    assert [record.macs for record in result.rounds] == sorted((r.macs for r in result.rounds), reverse=True)
    assert result.after.macs <= 0.3 * result.before.macs
    loaded = compress.load(net(), folder / "small.safetensors")
    assert_same(loaded, result.model, BATCHES[0], 0.0)
    applied = compress.apply(net(), result.plan)
    assert {n: v.shape for n, v in applied.state_dict().items()} == {n: v.shape for n, v in loaded.state_dict().items()}
    assert list(folder.glob("events.out.tfevents.*"))
    assert (folder / "curve.png").exists()


def test_a_resumed_run_takes_the_same_path(done: tuple[Path, RunResult], tmp_path: Path) -> None:
    """Interrupted in the last round's training."""
    calls = []

    def interrupted(model: nn.Module) -> None:
        calls.append(model)
        if len(calls) == 2:
            raise KeyboardInterrupt
        train(model)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, train=interrupted)
    again = run(tmp_path)
    assert again.plan == done[1].plan
    assert_same(again.model, done[1].model, BATCHES[0], 0.0)


def test_what_is_not_for_both_methods_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(PruneError, match="a run takes no scope="):
        run(tmp_path / "a", scope="uniform")
    with pytest.raises(PruneError, match="'distil' is unknown"):
        run(tmp_path / "a", methods=("prune", "distil"))
    assert not (tmp_path / "a").exists()


def test_prunings_join_to_a_pruning_and_others_to_steps() -> None:
    model = net()
    first = compress.prune(model, BATCHES[0][:1], budget=Budget(macs=0.8))
    second = compress.prune(first.model, BATCHES[0][:1], budget=Budget(macs=0.8))
    both = joined(first.plan, second.plan)
    assert isinstance(both, PrunePlan)
    assert_same(compress.apply(model, both), second.model, BATCHES[0], 0.0)
    thin = compress.factorize(second.model, BATCHES[0][:1], budget=Budget(macs=0.8), calibration=BATCHES, recover=False)
    plan = joined(both, ShrinkPlan((PrunePlan.empty(), thin.plan)))
    assert plan == ShrinkPlan((both, thin.plan))
    assert joined(PrunePlan.empty(), thin.plan) == ShrinkPlan((thin.plan,))
