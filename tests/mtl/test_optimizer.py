import pytest
import torch
from torch import nn

from mtl import FitOptions
from mtl.optimizer import build_optimizer
from mtl.weighting import Uncertainty


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_only_weights_decay(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    model[3].bias.requires_grad_(False)
    weighting = Uncertainty(["a"])
    optimizer = build_optimizer(model, weighting, FitOptions(optimizer=name, weight_decay=0.1))  # type: ignore[arg-type]
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay[id(model[0].weight)] == decay[id(model[3].weight)] == 0.1
    for parameter in (model[0].bias, model[1].weight, model[1].bias, weighting.log_variance["a"]):
        assert decay[id(parameter)] == 0
    assert id(model[3].bias) not in decay


def test_a_frozen_model_cannot_be_trained() -> None:
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        build_optimizer(model, Uncertainty(["a"]), FitOptions())
    assert torch.is_grad_enabled()
