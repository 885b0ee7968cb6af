import numpy as np
import pytest
import torch
from torch import nn

from compress import Budget, prune
from compress.recover.batch_norm import reestimate_batch_norm
from tests.compress.helpers import image, lively

BATCHES = [image(5, 3, 9, 7, seed=1), image(5, 3, 9, 7, seed=2), image(5, 3, 9, 7, seed=3)]


def _model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 11, 3), nn.BatchNorm2d(11), nn.ReLU(), nn.Dropout(), nn.Conv2d(11, 7, 3), nn.BatchNorm2d(7),
        nn.Conv2d(7, 5, 1),
    )  # fmt: skip


def test_statistics_become_averages_over_the_data() -> None:
    model = lively(_model()).float()
    reestimate_batch_norm(model, BATCHES)
    with torch.no_grad():
        batches = [model[0](batch).transpose(0, 1).flatten(1).numpy() for batch in BATCHES]
    assert model[1].running_mean.numpy() == pytest.approx(np.mean([b.mean(1) for b in batches], 0), rel=1e-4, abs=1e-6)
    assert model[1].running_var.numpy() == pytest.approx(np.mean([b.var(1, ddof=1) for b in batches], 0), rel=1e-4)
    assert int(model[1].num_batches_tracked) == 3


def test_everything_else_stays() -> None:
    model = lively(_model()).float().train()
    model[1].eval()
    model[1].momentum = 0.3
    modes, weights = [m.training for m in model.modules()], [p.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    reestimate_batch_norm(model, BATCHES)
    assert [m.training for m in model.modules()] == modes
    assert (model[1].momentum, model[5].momentum) == (0.3, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_models_without_statistics_are_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5, track_running_stats=False))
    reestimate_batch_norm(model, iter([]))  # the data are not even looked at
    assert model[1].running_mean is None


def test_an_error_leaves_the_model_as_it_was() -> None:
    model = lively(_model()).float()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError):
        reestimate_batch_norm(model, [BATCHES[0], image(2, 4, 9, 7)])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model[1].momentum == 0.1


def test_pruning_with_recovery_restores_the_statistics_of_what_is_left() -> None:
    model = lively(_model()).float()
    reestimate_batch_norm(model, BATCHES)
    batches = [*BATCHES, BATCHES[0]]  # nothing is fitted to the last
    plain = prune(model, BATCHES[0], budget=Budget(channels=0.5))
    recovered = prune(model, BATCHES[0], budget=Budget(channels=0.5), recover=["batch_norm"], calibration=batches)
    assert plain.plan == recovered.plan
    with torch.no_grad():
        normed = torch.cat([recovered.model.eval()[:5](batch) for batch in BATCHES])
        mean = normed.mean((0, 2, 3))
    assert torch.allclose(recovered.model[5].running_mean, mean, atol=0.05)
    assert not torch.allclose(plain.model[5].running_mean, mean, atol=0.05)
    for name, value in plain.model.state_dict().items():
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(value, recovered.model.state_dict()[name]), name
