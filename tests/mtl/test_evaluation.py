import pytest
import torch
import torchmetrics
from torch import nn

from mtl import FitOptions, HardShared, Task, evaluate, fit


def test_metrics_are_those_of_the_whole_set_whatever_the_batches() -> None:
    model = HardShared(nn.Sequential(nn.Linear(6, 5), nn.Dropout()), {"a": nn.Linear(5, 3), "b": nn.Linear(5, 1)})
    inputs, targets = torch.randn(40, 6), {"a": torch.randint(3, (40,)), "b": torch.randn(40, 1)}
    tasks = [Task("a", nn.CrossEntropyLoss()), Task("b", nn.MSELoss())]
    parts = [slice(0, 7), slice(7, 39), slice(39, 40)]
    data = [(inputs[part], {name: target[part] for name, target in targets.items()}) for part in parts]

    result = evaluate(model, tasks, data)
    assert model.training
    model.eval()
    with torch.no_grad():
        outputs = model(inputs)
    assert result["a"] == pytest.approx((outputs["a"].argmax(1) == targets["a"]).float().mean().item(), abs=1e-7)
    assert result["b"] == pytest.approx((outputs["b"] - targets["b"]).square().mean().item(), rel=1e-6)


def test_numbers_are_the_shortest_decimals() -> None:
    data = [(torch.eye(10)[[0] * 9 + [1]], torch.zeros(10, dtype=torch.long))]
    assert evaluate(nn.Identity(), Task("a", nn.CrossEntropyLoss()), data) == {"a": 0.9}


def test_no_data_and_metrics_of_many_numbers_are_refused() -> None:
    task = Task("a", nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match="the data to evaluate on are empty"):
        evaluate(nn.Identity(), task, [])
    many = Task("a", nn.CrossEntropyLoss(), torchmetrics.classification.MulticlassAccuracy(3, average=None))
    with pytest.raises(ValueError, match="task 'a': the metric MulticlassAccuracy must give one number"):
        evaluate(nn.Identity(), many, [(torch.eye(3), torch.arange(3))])


def test_maps_in_channels_last_are_measured_as_any_other() -> None:
    model = nn.Conv2d(3, 2, 1).to(memory_format=torch.channels_last)
    x, target = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.randn(2, 2, 4, 5)
    target = target.to(memory_format=torch.channels_last)
    task, error = Task.regression("depth"), nn.functional.mse_loss(model(x), target).item()
    assert not model(x).is_contiguous()
    assert evaluate(model, task, [(x, target)]) == {"depth": pytest.approx(error, rel=1e-6)}
    options = FitOptions(precision="fp32", channels_last="on", progress=False)
    history = fit(model, task, [(x, target)], 1, options=options)
    assert history[0].train == {"depth": pytest.approx(error, rel=1e-6)}
