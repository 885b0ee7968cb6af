"""What looks at runs: one pass for all that is gathered, whatever the sizes of the batches; errors that say where."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import compress
from compress.activations import ActivationCollector, collect_activations
from compress.gram import GramCollector, collect_grams, removable_sites
from compress.sandbox import backends_outside, visible_operators
from compress.score import check_needs
from compress.stand_ins import ON_DEVICE
from compress.trace import record
from compress.watch import RESTRIDE, Watch, gather
from tests.compress.helpers import image

RUNS: list[torch.Size] = []  # of all models, as what a model holds is put back


class Counted(nn.Module):
    """Other operators for a batch of one; notes its runs on real data."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 11, 3), nn.Linear(11, 11), nn.Linear(11, 5)

    def forward(self, x):
        if x.device.type != "meta" and type(x) is torch.Tensor:
            RUNS.append(x.shape)
        x = self.stem(x).relu()
        x = x.mean((2, 3)) if len(x) > 1 else x.mean(3).mean(2)
        self.stream = x + self.body(x)
        return self.head(self.stream)


def test_one_pass_gathers_everything() -> None:
    model, batches = Counted(), [image(4, 3, 7, 7, seed=seed) for seed in range(3)]
    graph = compress.trace(model, batches[0])
    RUNS.clear()
    makers = [partial(ActivationCollector, graph), partial(GramCollector, removable_sites(graph), 3)]
    activations, grams = gather(model, graph.trace, batches, makers)
    assert [batch.shape for batch in batches] == RUNS, "and no trace: the operators are the same"
    alone = collect_activations(model, graph, batches)
    assert np.array_equal(activations.magnitude, alone.magnitude)
    assert np.array_equal(activations.nonzero, alone.nonzero)
    for key, known in collect_grams(model, graph, batches).sums.items():
        assert torch.equal(known.gram, grams.sums[key].gram)


@pytest.mark.parametrize("first", [0, 2])
def test_a_pass_that_finds_other_operators_begins_again(first: int) -> None:
    """Sums of the batches before are not counted twice."""
    batches = [image(4, 3, 7, 7), image(4, 3, 7, 7, seed=1), image(1, 3, 7, 7, seed=2), image(4, 3, 7, 7, seed=3)]
    model = Counted()
    graph = compress.trace(model, batches[first])
    sums = collect_grams(model, graph, batches, row_share=1e9).sums
    streams = []
    with torch.no_grad():
        for batch in batches:
            model(batch)
            streams.append(model.stream.double())
    rows = torch.cat(streams)
    assert sums["head.weight", 0].num_rows == len(rows) == 13
    torch.testing.assert_close(sums["head.weight", 0].gram[0, :-1, :-1], rows.T @ rows, rtol=1e-5, atol=1e-6)
    parts = [0.0 if len(stream) == 1 else float(1 / stream.var(0, correction=0).sum()) for stream in streams]
    share = sums["body.weight", 0].output_share
    torch.testing.assert_close(share, torch.full_like(share, sum(parts) / 4), rtol=1e-4, atol=0)


@pytest.mark.parametrize("criterion", ["nonzero", "reconstruction", "taylor"])
def test_data_of_another_shape_name_the_batch(criterion: str) -> None:
    good, bad = (image(4, 3, 7, 7), torch.zeros(4).long()), (image(4, 2, 7, 7), torch.zeros(4).long())
    with pytest.raises(compress.CalibrationError, match=r"batch 1\b.*\(4, 2, 7, 7\)") as caught:
        compress.prune(
            Counted(), good[0], budget=compress.Budget(channels=0.7), criterion=criterion, calibration=[good, bad]
        )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("criterion", ["nonzero", "reconstruction", "taylor"])
@pytest.mark.parametrize(
    ("calibration", "match"),
    [
        (None, "needs data: pass calibration=batches"),
        (image(4, 3, 7, 7), "is one batch: pass a list"),
        ((image(4, 3, 7, 7) for _ in range(2)), "is a generator"),
    ],
)
def test_missing_data_are_noticed_before_the_model_is_traced(
    criterion: str, calibration, match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Counted()
    monkeypatch.setattr(model, "forward", None)
    with pytest.raises(compress.CalibrationError, match=match):
        compress.prune(model, image(4, 3, 7, 7), budget=compress.Budget(channels=0.7), criterion=criterion,
                       calibration=calibration)  # fmt: skip


def test_criteria_of_weights_need_no_data() -> None:
    check_needs([compress.criteria.CRITERIA["l2"]], None)


def test_backends_are_as_before() -> None:
    before = backends_outside()
    model, batch = Counted(), image(4, 3, 7, 7)
    collect_activations(model, compress.trace(model, batch), [batch])
    with pytest.raises(compress.CalibrationError):
        collect_activations(model, compress.trace(model, batch), [image(4, 2, 7, 7)])
    assert backends_outside() == before == (torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled())


def test_a_change_of_memory_format_alone_is_no_other_path() -> None:
    """Pooling to one pixel restrides its result where channels lie last in memory: the values are the same."""
    pool = (nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *pool, nn.Linear(8, 5))
    first, last = image(4, 3, 6, 6), image(4, 3, 6, 6).contiguous(memory_format=torch.channels_last)
    traces = [record(model, x, training=False, stand_ins=ON_DEVICE) for x in (first, last)]
    assert [RESTRIDE in {op.func for op in trace.evaluation} for trace in traces] == [False, True]
    seen: list[torch.Tensor] = []
    for trace in traces:
        at = next(op.index for op in trace.evaluation if "addmm" in str(op.func))
        for x in (first, last):
            watch = Watch(trace, 0, {at: lambda args, kwargs, result: seen.append(result)})
            with torch.no_grad(), visible_operators(), watch:
                outputs = model(x)
            assert torch.equal(seen[-1], outputs)


class Asking(nn.Module):
    """As the masks of transformers do: looks at values where there are some, and does without them in a trace."""

    def __init__(self, asks: bool = True) -> None:
        super().__init__()
        self.asks = asks
        self.stem, self.body, self.head = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x):
        if self.asks and x.device.type != "meta" and type(x) is torch.Tensor and not (x > 9).all():
            x = x + 0  # another operator, the same values
        return self.head(self.body(self.stem(x).relu()).relu())


@pytest.mark.parametrize("criterion", ["mean_activation", "nonzero", "reconstruction"])
def test_models_that_ask_whether_they_are_traced_are_judged_by_data(criterion: str) -> None:
    data = [torch.randn(32, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    found = []
    for asks in (True, False):
        torch.manual_seed(0)
        model = Asking(asks).eval()
        options = {"budget": compress.Budget(macs=0.6), "criterion": criterion, "calibration": data, "recover": True}
        result = compress.prune(model, data[0], **options)
        shrunk = compress.shrink(model, data[0], budget=compress.Budget(macs=0.6), calibration=data)
        found.append((result.plan.to_json(), result.model(data[0]), shrunk.model(data[0])))
    (plan, pruned, shrunk), (same_plan, same_pruned, same_shrunk) = found
    assert plan == same_plan
    torch.testing.assert_close(pruned, same_pruned)
    torch.testing.assert_close(shrunk, same_shrunk)


def test_a_path_that_batches_of_one_shape_do_not_share_is_said() -> None:
    class Fickle(Asking):
        def forward(self, x):
            return super().forward(-x if float(x.sum()) > 0 else x)

    data = [torch.ones(8, 6), -torch.ones(8, 6)]
    with pytest.raises(compress.CalibrationError, match="batch 1 takes another path"):
        compress.prune(Fickle(), data[0], budget=compress.Budget(channels=0.6), criterion="nonzero", calibration=data)
