import pytest
import torch
import torchmetrics
from torch import nn

from mtl import Task
from mtl.metrics import default_metric
from mtl.task import check_tasks


def test_the_template_metric_is_never_updated() -> None:
    task = Task("digit", nn.CrossEntropyLoss())
    metric = task.new_metric()
    metric.update(torch.eye(4), torch.arange(4))
    assert metric.compute() == 1
    assert task.metric is not None
    assert task.metric.update_count == 0
    assert task.new_metric().update_count == 0


@pytest.mark.parametrize("name", ["", "a.b", "a/b"])
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="must not be empty or contain"):
        Task(name, nn.CrossEntropyLoss())


def test_a_loss_without_a_usual_metric_asks_for_one() -> None:
    with pytest.raises(ValueError, match="task 'depth': no default metric for the loss PoissonNLLLoss; pass metric="):
        Task("depth", nn.PoissonNLLLoss())
    assert Task("depth", nn.PoissonNLLLoss(), torchmetrics.MeanSquaredError()).new_metric() is not None


def test_tasks_are_told_apart_by_name() -> None:
    task = Task("digit", nn.CrossEntropyLoss())
    assert check_tasks(task) == (task,)
    with pytest.raises(ValueError, match="two tasks are named 'digit'"):
        check_tasks([task, Task("digit", nn.MSELoss())])
    with pytest.raises(ValueError, match="there is no task"):
        check_tasks([])


def test_default_metrics_are_what_they_are_called() -> None:
    logits, labels = torch.randn(50, 4), torch.randint(4, (50,))
    labels[:10] = -100
    accuracy = default_metric(nn.CrossEntropyLoss())
    assert accuracy is not None
    assert accuracy(logits, labels) == pytest.approx((logits.argmax(1) == labels)[10:].float().mean().item())

    output, target = torch.randn(50), torch.randn(50)
    for loss in (nn.MSELoss(), nn.L1Loss()):
        metric = default_metric(loss)
        assert metric is not None
        assert metric(output, target) == pytest.approx(loss(output, target).item())


def test_logits_between_zero_and_one_are_not_taken_for_probabilities() -> None:
    metric = default_metric(nn.BCEWithLogitsLoss())
    assert metric is not None
    # As probabilities both would be below 1/2, as logits both are above it.
    assert metric(torch.tensor([[0.1], [0.4]]), torch.tensor([[1.0], [0.0]])) == 0.5
