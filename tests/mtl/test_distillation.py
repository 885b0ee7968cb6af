import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mtl import Distillation, FitOptions, HardShared, Task, fit
from mtl.batch import read

QUIET = FitOptions(progress=False, device="cpu", precision="fp32", channels_last="off", weight_decay=0.0)


def _batches(num: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(8, 5), torch.randint(3, (8,))) for _ in range(num)]


def test_the_loss_of_a_classification_is_hintons() -> None:
    student, teacher = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    task, temperature = Task("class", nn.CrossEntropyLoss()), 3.0
    distillation = Distillation(teacher=nn.Identity(), weight=0.7, temperature=temperature)
    hard = torch.tensor(1.25, dtype=torch.float64)
    mixed = distillation.mixed({"class": hard}, {"class": student}, {"class": teacher}, [task])["class"]
    p, q = F.softmax(teacher / temperature, dim=1), F.softmax(student / temperature, dim=1)
    divergence = (p * (p / q).log()).sum(dim=1).mean()
    assert torch.allclose(mixed, 0.3 * hard + 0.7 * temperature**2 * divergence)


def test_a_regression_is_pulled_to_the_teachers_values() -> None:
    distillation = Distillation(teacher=nn.Identity(), weight=1.0)
    output, taught = torch.randn(4, 2), torch.randn(4, 2)
    mixed = distillation.mixed(
        {"value": torch.tensor(9.0)}, {"value": output}, {"value": taught}, [Task("value", nn.MSELoss())]
    )
    assert torch.allclose(mixed["value"], ((output - taught) ** 2).mean())


def test_weight_zero_is_training_without_a_teacher() -> None:
    model, teacher, data = nn.Linear(5, 3), nn.Linear(5, 3), _batches()
    alone, taught = copy.deepcopy(model), copy.deepcopy(model)
    task = Task("class", nn.CrossEntropyLoss())
    fit(alone, task, data, epochs=2, options=QUIET)
    fit(taught, task, data, epochs=2, options=QUIET, distillation=Distillation(teacher=teacher, weight=0.0))
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), taught.parameters(), strict=True))


def test_a_student_learns_its_teacher_without_usable_labels_and_leaves_it_as_it_was() -> None:
    teacher = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)).train()
    before = copy.deepcopy(teacher.state_dict())
    student = copy.deepcopy(teacher)
    nn.init.zeros_(student[0].weight)
    data = [(inputs, torch.zeros_like(labels)) for inputs, labels in _batches(16)]
    distillation = Distillation(teacher=teacher, weight=1.0)
    options = FitOptions(optimizer="adamw", lr=0.03, progress=False, device="cpu", precision="fp32", weight_decay=0.0)
    fit(student, Task("class", nn.CrossEntropyLoss()), data, epochs=30, options=options, distillation=distillation)
    assert teacher.training
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    inputs = torch.cat([batch for batch, _ in data])
    agreement = (student.eval()(inputs).argmax(1) == teacher.eval()(inputs).argmax(1)).float().mean()
    assert agreement > 0.9


def test_several_tasks_are_taught_side_by_side() -> None:
    model = HardShared(nn.Linear(5, 4), heads={"a": nn.Linear(4, 3), "b": nn.Linear(4, 1)})
    tasks = [Task("a", nn.CrossEntropyLoss()), Task("b", nn.MSELoss())]
    data = [(torch.randn(6, 5), {"a": torch.randint(3, (6,)), "b": torch.randn(6, 1)}) for _ in range(3)]
    distillation = Distillation(teacher=copy.deepcopy(model))
    history = fit(model, tasks, data, epochs=1, options=QUIET, distillation=distillation)
    assert set(history[-1].loss) == {"a", "b"}


def test_features_are_compared_channel_by_channel_as_parts_of_the_teachers() -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(5, 4, dtype=torch.float64), nn.Linear(4, 3, dtype=torch.float64))
    student = nn.Sequential(nn.Linear(5, 2, dtype=torch.float64), nn.Linear(2, 3, dtype=torch.float64))
    task = Task("class", nn.CrossEntropyLoss())
    kept = [3, 1]
    distillation = Distillation(teacher=teacher, weight=0.0, features={"0": kept}, feature_weight=0.5)
    inputs, hard = torch.randn(6, 5, dtype=torch.float64), torch.tensor(1.25, dtype=torch.float64)
    batch = read((inputs, torch.zeros(6, dtype=torch.long)), [task])
    with distillation.watched(student) as features:
        outputs = {"class": student(inputs)}
    found = distillation.losses({"class": hard}, batch, outputs, features, [task])["class"]
    target = (inputs @ teacher[0].weight.T + teacher[0].bias)[:, kept]
    distance = ((student[0](inputs) - target) ** 2).mean() / (target**2).mean()
    assert torch.allclose(found, hard + 0.5 * distance)
    assert not any(part._forward_hooks for part in (*teacher.modules(), *student.modules()))


def test_a_student_learns_what_is_inside_its_teacher() -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    student = copy.deepcopy(teacher)
    nn.init.normal_(student[0].weight)
    distillation = Distillation(teacher=teacher, weight=0.0, features={"1": None}, feature_weight=100.0)
    options = FitOptions(optimizer="adamw", lr=0.02, progress=False, device="cpu", precision="fp32", weight_decay=0.0)
    fit(student, Task("class", nn.CrossEntropyLoss()), _batches(16), 30, options=options, distillation=distillation)
    inputs = torch.randn(100, 5)
    assert (student[:2](inputs) - teacher[:2](inputs)).square().mean() < 0.01


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight": 1.5}, r"weight is 1\.5"),
        ({"temperature": 0}, "above 0"),
        ({"feature_weight": -1}, "feature_weight is -1"),
        ({"features": {"nowhere": None}}, "the teacher has no such module"),
    ],
)
def test_values_out_of_range_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Distillation(teacher=nn.Identity(), **given)


def test_a_teacher_of_another_task_is_refused() -> None:
    task = Task("class", nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match=r"teacher gives \(8, 4\), the model \(8, 3\)"):
        fit(nn.Linear(5, 3), task, _batches(1), 1, options=QUIET, distillation=Distillation(teacher=nn.Linear(5, 4)))


def test_features_of_other_widths_and_modules_are_refused() -> None:
    task, teacher = Task("class", nn.CrossEntropyLoss()), nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    narrow = nn.Sequential(nn.Linear(5, 2), nn.Linear(2, 3))
    distillation = Distillation(teacher=teacher, features={"0": None})
    with pytest.raises(ValueError, match=r"module '0' gives \(8, 2\) in the model and \(8, 4\) in the teacher"):
        fit(narrow, task, _batches(1), 1, options=QUIET, distillation=distillation)
    with pytest.raises(ValueError, match="'0', but the model has no such module"):
        fit(nn.Linear(5, 3), task, _batches(1), 1, options=QUIET, distillation=distillation)
