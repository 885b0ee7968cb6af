"""Pruning by task: what each task sees, how its losses are combined, and that the worst task is spared."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import compress
from compress import Budget, CalibrationError, PruneError, Removal
from compress.balance import balance
from compress.channels import ChannelGraph
from compress.combine import combined, largest, mean, weighted
from compress.gradients import collect_gradients
from compress.recover import recover
from compress.removal import by_score
from compress.tasks import OTHERS, ByTask, View, counts_of, is_by_task, reach_of, views_of, whole
from tests.compress.helpers import lively


class Two(nn.Module):
    """Two tasks on one trunk; ``loud`` is what the outputs of task a are multiplied by. Task b has a hidden layer."""

    def __init__(self, loud: float = 1.0) -> None:
        super().__init__()
        self.trunk = nn.Linear(6, 12)
        self.a = nn.Linear(12, 3)
        self.b = nn.Sequential(nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 2))
        self.loud = loud

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.trunk(x).relu()
        return {"a": self.loud * self.a(features), "b": self.b(features)}


def two(loud: float = 1.0) -> Two:
    """Task a looks at the first half of the trunk, task b at the second."""
    torch.manual_seed(0)
    model = Two(loud).double().eval()
    with torch.no_grad():
        model.a.weight[:, 6:] = 0.0
        model.b[0].weight[:, :6] = 0.0
    return model


def inputs(number: int = 4, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(32, 6, dtype=torch.float64, generator=generator) for _ in range(number)]


def labelled() -> list[tuple[Tensor, dict[str, Tensor]]]:
    return [(x, {"a": (x.sum(1) > 0).long(), "b": (x[:, 0] > 0).long()}) for x in inputs()]


def loss_by_task(dense: nn.Module, pruned: nn.Module) -> dict[str, float]:
    """Squared difference of the outputs of each task, as a part of their variance."""
    x = torch.cat(inputs())
    with torch.no_grad():
        before, after = dense(x), pruned(x)
    return {
        task: float((after[task] - y).square().sum() / (y - y.mean(0)).square().sum()) for task, y in before.items()
    }


@pytest.fixture(scope="module")
def graph() -> ChannelGraph:
    return compress.trace(two(), inputs()[0])


# -- what a task sees ------------------------------------------------------------------------------------------------


def test_a_task_reaches_what_its_output_depends_on(graph: ChannelGraph) -> None:
    trunk, own = {"trunk.weight", "trunk.bias"}, {"a.weight", "a.bias"}
    assert reach_of(graph.trace, "a").parameters == trunk | own
    assert reach_of(graph.trace, "b").parameters.isdisjoint(own)
    a, b = views_of(graph.trace, None, None)
    assert [(group.name, a.sees(group), b.sees(group)) for group in graph.groups] == [
        ("trunk.weight", True, True),
        ("b.0.weight", False, True),
    ]


def test_tasks_are_those_of_the_data_the_losses_or_the_outputs(graph: ChannelGraph) -> None:
    names = lambda *arguments: [view.task for view in views_of(graph.trace, *arguments)]  # noqa: E731
    assert names(inputs(), None) == ["a", "b"]
    assert names({"b": inputs()}, None) == ["b"]
    assert names(inputs(), {"a": F.cross_entropy}) == ["a"]
    assert is_by_task({"a": inputs()})
    assert not is_by_task({"x": inputs()[0]})  # the keyword arguments of a model
    assert not is_by_task(inputs())


def test_batches_of_all_tasks_take_turns_and_the_last_ones_come_last() -> None:
    mixed = ByTask({"a": ["a1", "a2", "a3", "a4"], "b": ["b1", "b2"]})
    assert list(mixed) == list(mixed) == ["a1", "a2", "b1", "a3", "a4", "b2"]
    assert len(mixed) == 6


def test_whose_each_batch_is_and_what_it_counts_for_layers_of_all_and_of_one(graph: ChannelGraph) -> None:
    own = {"a": inputs(5), "b": inputs(2, seed=9)}
    data, views = ByTask(own), views_of(graph.trace, own, None)
    for task, batch in zip(data.tasks, data, strict=True):
        assert any(batch is each for each in own[task])
    count = counts_of(views, data, np.array([0.8, 0.2]))
    alike = counts_of(views, data, None)
    for number, task in enumerate(data.tasks):
        assert count("trunk.weight", number) == pytest.approx({"a": 1.6, "b": 0.4}[task])
        assert alike("trunk.weight", number) == 1
        for head in ("a.weight", "b.0.weight"):
            assert count(head, number) == (1 if head.startswith(task) else OTHERS)


def test_a_head_is_refitted_to_data_of_its_task() -> None:
    """The tasks see data that nobody can serve with one linear map: the trunk's lost channels had told them apart."""
    dense, generator = two(), torch.Generator().manual_seed(3)
    mixings = {task: torch.randn(6, 6, dtype=torch.float64, generator=generator) for task in "ab"}
    own = {
        task: [torch.randn(64, 6, dtype=torch.float64, generator=generator) @ mixing for _ in range(4)]
        for task, mixing in mixings.items()
    }
    options = {"budget": Budget(channels=0.5), "criterion": "l2", "combine": "mean", "calibration": own}
    found = compress.prune(dense, own["a"][0], recover=True, **options)
    alike = compress.apply(dense, found.plan)
    recover(alike, dense, found.plan, ByTask(own), num_held_out=1)
    errors = []
    for model in (found.model, alike):
        with torch.no_grad():
            pairs = [(model(x)[task], dense(x)[task]) for task, batches in own.items() for x in batches]
        errors.append(sum(float((y - z).square().sum() / (z - z.mean(0)).square().sum()) for y, z in pairs))
    assert errors[0] < 0.95 * errors[1]


def test_gradients_of_a_task_are_those_of_a_model_that_gives_it_alone() -> None:
    model = two()
    graph = compress.trace(model, inputs()[0])
    found = collect_gradients(model, graph, labelled(), None, View("b"))
    loss = lambda output, target: F.cross_entropy(output["b"], target["b"])  # noqa: E731
    expected = collect_gradients(model, graph, labelled(), loss)
    np.testing.assert_allclose(found.squared, expected.squared, rtol=1e-12)
    with pytest.raises(CalibrationError, match="batch 0 has no target for task 'b'"):
        collect_gradients(model, graph, [(x, {"a": y["a"]}) for x, y in labelled()], None, View("b"))


# -- how judgements are combined -------------------------------------------------------------------------------------


def test_equal_tasks_are_judged_as_one(graph: ChannelGraph) -> None:
    scores = np.random.default_rng(0).random(12)
    group = graph.groups[0]
    alone = by_score(group, scores)
    for weigh in (mean, largest, weighted(np.array([0.2, 0.8]))):
        (removal,), _ = combined([group], [[scores], [10 * scores]], weigh)
        np.testing.assert_array_equal(removal.order, alone.order)
        np.testing.assert_allclose(removal.losses, alone.losses)


def test_losses_of_removals_in_one_order_add_up(graph: ChannelGraph) -> None:
    group, random = graph.groups[0], np.random.default_rng(0)
    order = random.permutation(12)
    losses = np.concatenate([np.zeros((2, 1)), np.sort(random.random((2, 12)), axis=1).cumsum(1)], axis=1)
    removals = [[Removal(order, own)] for own in losses]
    for weigh in (mean, largest, weighted(np.array([0.3, 0.7]))):
        (removal,), _ = combined([group], removals, weigh)
        np.testing.assert_array_equal(removal.order, order)
        np.testing.assert_allclose(removal.losses, weigh(losses))


def test_what_one_task_needs_counts_half_in_the_mean_and_wholly_in_the_maximum(graph: ChannelGraph) -> None:
    group = graph.groups[1]
    scores = np.array([5.0, 1.0, 2.0, 4.0, 3.0])
    alone = by_score(group, scores)
    (halved,), _ = combined([group], [[None], [scores]], mean)
    (whole_,), _ = combined([group], [[None], [scores]], largest)
    np.testing.assert_allclose(halved.losses, alone.losses / 2)
    np.testing.assert_allclose(whole_.losses, alone.losses)
    (idle,), _ = combined([group], [[None], [None]], mean)  # nobody needs it: one unit is as good as another
    np.testing.assert_allclose(idle.losses, by_score(group, np.ones(5)).losses)


def test_the_maximum_keeps_what_any_task_needs(graph: ChannelGraph) -> None:
    a, b = np.array([[9.0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], [1.0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 9]])
    (removal,), _ = combined([graph.groups[0]], [[a], [b]], largest)
    assert set(removal.order[-2:]) == {0, 11}


def test_balancing_finds_the_choice_that_is_best_for_the_worst_task() -> None:
    choices = np.array([[0.1, 0.9], [0.4, 0.35], [0.8, 0.05], [0.6, 0.3]])
    seen = []

    def play(weights: np.ndarray) -> tuple[int, np.ndarray]:
        seen.append(weights)
        best = int(np.argmin(choices @ weights))
        return best, choices[best]

    assert balance(2, play) == int(choices.max(axis=1).argmin())
    np.testing.assert_allclose([weights.sum() for weights in seen], 1.0)


# -- pruning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["taylor", "reconstruction", "mean_activation"])
def test_a_quiet_task_is_not_sacrificed_to_a_loud_one(criterion: str) -> None:
    model = two(loud=100.0)
    options = {"budget": Budget(channels=0.6), "criterion": criterion, "protect": ("b.0.bias",)}

    def mixed_loss(output: dict[str, Tensor], target: dict[str, Tensor]) -> Tensor:
        return sum(F.cross_entropy(output[task], target[task]) for task in output)

    mixed = compress.prune(model, inputs()[0], calibration=labelled(), loss=mixed_loss, **options)
    found = compress.prune(model, inputs()[0], calibration=labelled(), combine="balanced", **options)
    before, after = loss_by_task(model, mixed.model), loss_by_task(model, found.model)
    assert found.task_losses == pytest.approx(after)
    assert found.after.macs <= 1.001 * mixed.after.macs
    fair = criterion in ("mean_activation", "reconstruction")  # also mixed: outputs count by their own variance
    assert max(after.values()) <= max(before.values()) * (1.0 if fair else 0.7)


def test_data_of_each_task_decide_for_it() -> None:
    """Task a never sees the inputs that the first half of its channels needs."""
    model = two()
    with torch.no_grad():
        model.trunk.weight[:3, 3:] = 0.0
        model.trunk.bias[:3] = 0.0
    silent = [x.index_fill(1, torch.arange(3), 0.0) for x in inputs()]
    result = compress.prune(
        model,
        inputs()[0],
        budget=Budget(channels=0.75),
        criterion="mean_activation",
        combine="mean",
        calibration={"a": silent, "b": silent},
        protect=("b.0.bias",),
    )
    assert set(result.plan.removed()["trunk.weight", 0].tolist()) == {0, 1, 2}


@pytest.mark.parametrize("combine", ["mean", "max", "balanced"])
def test_every_combination_prunes_exactly_and_recovers(combine: str) -> None:
    model = lively(Two())
    result = compress.prune(
        model,
        inputs()[0],
        budget=Budget(macs=0.6),
        criterion="reconstruction",
        combine=combine,
        calibration={"a": inputs(4, seed=1), "b": inputs(3, seed=2)},
        recover=True,
    )
    assert result.plan.exact
    assert result.after.macs <= 0.6 * result.before.macs
    assert result.recovery is not None
    assert result.recovery.after <= result.recovery.before
    assert set(result.task_losses) == {"a", "b"}
    assert {task: tuple(output.shape) for task, output in result.model(inputs()[0]).items()} == {
        "a": (32, 3),
        "b": (32, 2),
    }


def test_a_criterion_that_sees_no_data_can_be_combined() -> None:
    model = two()
    plans = [
        compress.prune(model, inputs()[0], budget=Budget(macs=0.6), combine=combine).plan for combine in ("mean", "max")
    ]
    alone = compress.prune(model, inputs()[0], budget=Budget(macs=0.6)).plan
    trunk = ("trunk.weight", 0)
    assert len(plans[0].removed().get(trunk, ())) <= len(alone.removed()[trunk])  # it counts for two tasks
    assert plans[1] == alone  # and is needed by each as much as by both


def test_what_cannot_be_combined_is_said(graph: ChannelGraph) -> None:
    def prune(model: nn.Module | None = None, **options: object) -> None:
        compress.prune(model or two(), inputs()[0], budget=Budget(macs=0.6), **options)

    with pytest.raises(PruneError, match="combine='best' is unknown: choose one of mean, max, balanced"):
        prune(combine="best")
    with pytest.raises(PruneError, match="whose output is a mapping"):
        prune(model=nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)).double(), combine="mean")
    with pytest.raises(CalibrationError, match="combine='balanced' needs data"):
        prune(combine="balanced")
    with pytest.raises(CalibrationError, match="no output for task 'c'"):
        prune(combine="mean", calibration={"c": inputs()})
    with pytest.raises(CalibrationError, match="task 'b' has a loss and no data"):
        prune(combine="mean", calibration={"a": inputs()}, loss={"a": F.cross_entropy, "b": F.cross_entropy})
    with pytest.raises(CalibrationError, match="generator"):
        prune(combine="mean", calibration={"a": iter(inputs())})
    for name, options in {"calibration": {"calibration": {"a": inputs()}}, "loss": {"loss": {"a": None}}}.items():
        with pytest.raises(PruneError, match=f"{name} is given by task: say how"):
            prune(**options)
    assert whole(inputs(), None).task is None
