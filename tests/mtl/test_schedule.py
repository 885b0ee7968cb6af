import itertools

import pytest
import torch

from mtl.schedule import lr_factor

STEPS = 40


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)


@pytest.mark.parametrize("schedule", ["cosine", "onecycle"])
def test_factors_are_those_of_pytorchs_schedulers(schedule: str) -> None:
    sgd = optimizer()
    if schedule == "cosine":
        peer: torch.optim.lr_scheduler.LRScheduler = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, STEPS)
    else:
        # PyTorch reaches the peak at step 0.3 * total - 1 and the end at the last step.
        peer = torch.optim.lr_scheduler.OneCycleLR(
            sgd, max_lr=1.0, total_steps=STEPS + 1, pct_start=13 / 41, cycle_momentum=False
        )
    expected = []
    for _ in range(STEPS):
        expected.append(sgd.param_groups[0]["lr"])
        sgd.step()
        peer.step()
    assert [lr_factor(schedule, step, STEPS) for step in range(STEPS)] == pytest.approx(expected, abs=1e-9)


def test_warmup_rises_in_equal_steps_to_the_start_of_the_schedule() -> None:
    factors = [lr_factor("cosine", step, STEPS, warmup_steps=4) for step in range(STEPS)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(later < earlier for earlier, later in itertools.pairwise(factors[4:]))
    assert lr_factor("constant", STEPS - 1, STEPS, warmup_steps=4) == 1


def test_a_run_that_is_shorter_than_its_warmup_never_leaves_the_range() -> None:
    for schedule in ("cosine", "onecycle", "constant"):
        assert all(0 <= lr_factor(schedule, step, 3, warmup_steps=10.5) <= 1 for step in range(3))
