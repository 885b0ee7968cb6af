import math

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from torch import nn

from mtl import Task, delta_m
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


def test_missing_labels_count_neither_in_loss_nor_in_metric() -> None:
    nan = math.nan
    output, target = torch.randn(5, 1), torch.tensor([1.0, nan, 0.0, nan, 1.0])
    for task, expected in (
        (Task.regression("x"), F.mse_loss(output[::2, 0], target[::2])),
        (Task.binary("x"), F.binary_cross_entropy_with_logits(output[::2, 0], target[::2])),
    ):
        labels = task.labels(target)
        assert labels.count == 3
        pair = task.pair(output, labels)
        torch.testing.assert_close(task.loss(*pair), expected)
        metric = task.new_metric()
        metric.update(*pair)
        assert torch.isfinite(metric.compute())


def test_each_label_of_many_may_be_missing() -> None:
    task = Task.multi_label("tags")
    output = torch.tensor([[3.0, -2.0, 1.0], [-1.0, 2.0, -3.0]])
    target = torch.tensor([[1.0, math.nan, 0.0], [math.nan, 1.0, 1.0]])
    labels = task.labels(target)
    pair = task.pair(output, labels)
    assert labels.count == 4
    known = ~target.isnan()
    torch.testing.assert_close(task.loss(*pair), F.binary_cross_entropy_with_logits(output[known], target[known]))
    metric = task.new_metric()
    metric.update(*pair)
    # said yes: right, wrong, right; said no to one that is: F1 = 2 TP / (2 TP + FP + FN)
    assert metric.compute() == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))


def test_booleans_and_integers_serve_as_binary_targets() -> None:
    task, output = Task.binary("x"), torch.randn(4)
    expected = F.binary_cross_entropy_with_logits(output[:3], torch.tensor([1.0, 0.0, 1.0]))
    for target in (torch.tensor([1, 0, 1, -100]), torch.tensor([1.0, 0.0, 1.0, math.nan])):
        torch.testing.assert_close(task.loss(*task.pair(output, task.labels(target))), expected)
    assert task.labels(torch.tensor([True, False])).count == 2
    assert Task.regression("x").labels(torch.tensor([-100, 3])).count == 2


def test_tags_have_their_classes_on_the_last_axis() -> None:
    task = Task.tagging("tag")
    output, target = torch.randn(3, 7, 7), torch.randint(7, (3, 7))
    target[0, 4:] = -100
    labels = task.labels(target)
    assert labels.count == 18
    pair = task.pair(output, labels)
    torch.testing.assert_close(task.loss(*pair), F.cross_entropy(output.transpose(1, 2), target))
    metric = task.new_metric()
    metric.update(*pair)
    known = target >= 0
    assert metric.compute() == pytest.approx((output.argmax(-1) == target)[known].float().mean().item())


def test_labels_beyond_the_head_are_named() -> None:
    for task, output in (
        (Task.classification("x"), torch.zeros(2, 3)),
        (Task.tagging("x"), torch.zeros(1, 2, 3)),
    ):
        shape = (2,) if output.dim() == 2 else (1, 2)
        task.check(output, task.labels(torch.tensor([2, -100]).view(shape)))
        for wrong in (3, -1):
            with pytest.raises(ValueError, match=f"task 'x': there is a label {wrong}, but the head gives 3 classes"):
                task.check(output, task.labels(torch.tensor([0, wrong]).view(shape)))


def test_labels_that_are_neither_yes_nor_no_are_named() -> None:
    for task, missing in ((Task.binary("x"), -100), (Task.multi_label("x"), math.nan)):
        task.check(torch.zeros(3), task.labels(torch.tensor([0, 1, missing])))
        for wrong in (2, -1):
            with pytest.raises(ValueError, match=f"task 'x': there is a label {wrong}, but BCEWithLogitsLoss takes 0"):
                task.check(torch.zeros(2), task.labels(torch.tensor([1, wrong])))


def test_shapes_that_would_broadcast_are_refused() -> None:
    task = Task.regression("x")
    with pytest.raises(ValueError, match=r"the output has shape \(4, 2\), the target \(4,\)"):
        task.pair(torch.zeros(4, 2), task.labels(torch.zeros(4)))


def test_the_metric_says_which_direction_is_better() -> None:
    assert Task.classification("x").direction == "max"
    assert Task.regression("x").direction == "min"
    assert Task.regression("x", metric=torchmetrics.R2Score()).direction == "max"
    with pytest.raises(ValueError, match="direction is 'up'"):
        Task.regression("x", direction="up")
    with pytest.raises(ValueError, match="weight is 0"):
        Task.regression("x", weight=0.0)


def test_delta_m_is_the_mean_relative_gain() -> None:
    directions = {"a": "max", "b": "min"}
    assert delta_m({"a": 0.55, "b": 3.0}, {"a": 0.5, "b": 4.0}, directions) == pytest.approx((10 + 25) / 2)
    assert delta_m({"a": 0.55, "b": 3.0}, {"b": 4.0}, directions) == pytest.approx(25)
    with pytest.raises(ValueError, match="the reference of task 'a' is 0"):
        delta_m({"a": 0.55}, {"a": 0.0}, directions)
