"""Recovery on networks whose removed channels the kept ones can replace exactly: the outputs come back."""

import pytest
import torch
from torch import Tensor, nn

import compress
from compress.recover import METHODS, recover
from tests.compress.helpers import Apply, image, lively, outputs

TOLERANCE = 1e-8


class Residual(nn.Module):
    """Blocks beside a stream, the second landing through a batch norm and a permutation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 1), nn.Conv2d(8, 6, 3, padding=1, bias=False)
        self.norm, self.c, self.d = nn.BatchNorm2d(6), nn.Linear(6, 8), nn.Linear(8, 6)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = (x + self.norm(self.b(self.a(x)))).relu()
        x = x + self.d(self.c(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return self.head(x)


MODELS = {
    "linear": lambda: nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 5)),
    "convolution": lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, 3, padding=1), nn.BatchNorm2d(5)),
    "no constant": lambda: nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 5, 3, bias=False)),
    "depthwise": lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 5, 1)),
    "grouped": lambda: nn.Sequential(nn.Conv2d(3, 24, 1), nn.Conv2d(24, 12, 3, groups=2), nn.Conv2d(12, 5, 1)),
    "flattened": lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.AvgPool2d(3), nn.Flatten(), nn.Linear(8 * 6, 5)),
    "concatenated": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 1), Apply(lambda _, x: torch.cat([x, x.tanh()[:, :0], 2 * x], 1)), nn.Conv2d(16, 5, 1)
    ),
    "residual": Residual,
}


def _pruned(model: nn.Module, x: Tensor, **options) -> tuple[compress.PruneResult, nn.Module]:
    """Half of the layers with eight channels of rank three or four: the others can replace what goes."""
    protect = ("stem", "head") if isinstance(model, Residual) else ()
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1:
            layer.weight.data[:] = layer.weight.data[:1].clone()  # filters that differ stand in for no other
    if isinstance(model, Residual):
        with torch.no_grad():  # the inner channels depend on each other
            for layer in (model.a, model.c):
                layer.weight[4:], layer.bias[4:] = layer.weight[:4], layer.bias[:4]
    budget = compress.Budget(channels=0.75 if protect else 0.6)
    result = compress.prune(model, x, budget=budget, protect=protect, **options)
    return result, compress.apply(model, result.plan)


@pytest.mark.parametrize("name", MODELS)
def test_what_the_kept_channels_can_say_comes_back(name: str) -> None:
    model = lively(MODELS[name]())
    shape = (4,) if name == "linear" else (3, 9, 7)
    batches = [image(60, *shape, seed=seed).double() for seed in range(3)]
    result, plain = _pruned(model, batches[0], criterion="reconstruction", recover=True, calibration=batches)
    assert result.plan.groups
    new = image(20, *shape, seed=9).double()
    (expected,), (found,), (cut,) = outputs(model, new), outputs(result.model, new), outputs(plain, new)
    scale = float(expected.abs().max())
    assert float((cut - expected).abs().max()) > 1e-3 * scale, "nothing was lost: this tests nothing"
    assert float((found - expected).abs().max()) <= TOLERANCE * scale
    assert result.recovery is not None
    assert result.recovery.after < 1e-12 < result.recovery.before
    assert any(layer.after < layer.before for layer in result.recovery.layers)
    assert "least squares" in result.summary()


def test_each_layer_is_fitted_to_what_the_one_before_it_gives_now() -> None:
    """Through a ReLU nothing is exact; refitting in order must still be better than only refitting the last layer."""
    torch.manual_seed(0)
    model = nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(12, 12), nn.ReLU())], nn.Linear(12, 3)).double()
    batches = [image(200, 12, seed=seed).double() for seed in range(4)]
    errors = {}
    for methods in ((), ("bias",), ("last_layer",), ("bias", "least_squares")):
        result = compress.prune(
            model, batches[0], budget=compress.Budget(channels=0.7), recover=methods, calibration=batches
        )
        new = image(500, 12, seed=9).double()
        errors[methods] = float((outputs(result.model, new)[0] - outputs(model, new)[0]).square().mean())
    assert errors[()] > errors["bias",] > errors["bias", "least_squares"]
    assert errors[()] > errors["last_layer",] > errors["bias", "least_squares"]


def test_recovery_touches_neither_the_dense_model_nor_modes() -> None:
    model = lively(Residual()).float().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = [image(20, 3, 9, 7, seed=seed) for seed in range(2)]
    result = compress.prune(model, batches[0], budget=compress.Budget(channels=0.7), recover=True, calibration=batches)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in (*model.modules(), *result.model.modules()))
    assert all(p.requires_grad and p.grad is None for p in result.model.parameters())
    result.model(batches[0]).sum().backward()


def test_batches_that_a_loader_shuffles_are_read_once() -> None:
    """Both models must see the same samples."""
    images = image(64, 3, 9, 7).double()
    loader = torch.utils.data.DataLoader(images, batch_size=16, shuffle=True)
    model = lively(MODELS["convolution"]())
    result, _ = _pruned(model, images[:2], criterion="reconstruction", recover=True, calibration=loader)
    assert result.recovery is not None
    assert result.recovery.after < 1e-12


def test_few_samples_are_told_and_damped() -> None:
    model = lively(MODELS["flattened"]())
    batches = [image(3, 3, 9, 7, seed=seed).double() for seed in range(3)]
    with pytest.warns(UserWarning, match="too few calibration samples"):
        result = compress.prune(
            model, batches[0], budget=compress.Budget(channels=0.6), recover=True, calibration=batches
        )
    assert any("too few calibration samples" in note for note in result.notes)
    assert result.recovery is not None
    assert result.recovery.after <= result.recovery.before


def test_what_does_not_help_is_not_kept() -> None:
    """Nothing is removed that is used: every layer is right as it is."""
    model = lively(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5)))
    with torch.no_grad():
        model[2].weight[:, 4:] = 0
    x = [image(50, 4, seed=seed).double() for seed in range(2)]
    result = compress.prune(
        model, x[0], budget=compress.Budget(channels=0.5), criterion="reconstruction", recover=True, calibration=x
    )
    new = image(50, 4, seed=5).double()
    assert torch.allclose(outputs(result.model, new)[0], outputs(model, new)[0], atol=1e-10)


@pytest.mark.parametrize("methods", [["bias"], "least_squares", ("batch_norm",), list(METHODS)])
def test_methods_by_name(methods) -> None:
    model, x = lively(Residual()), image(20, 3, 9, 7).double()
    result = compress.prune(model, x, budget=compress.Budget(channels=0.7), recover=methods, calibration=[x, x + 1])
    assert result.recovery is not None
    allowed = [methods] if isinstance(methods, str) else methods
    for layer in result.recovery.layers:
        assert layer.method == "" or (layer.method == "bias" and "bias" in allowed) or "least_squares" in allowed


def test_a_batch_that_counts_as_four_is_as_if_it_were_there_four_times() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)).double().eval()
    first, second, last = (torch.randn(200, 6, dtype=torch.float64) for _ in range(3))
    plan = compress.prune(dense, first[:1], budget=compress.Budget(channels=0.6)).plan
    found = {}
    for name, data, count in (
        ("counted", [first, second, last], lambda parameter, batch: 4.0 if batch == 0 else 1.0),
        ("repeated", [first, first, first, first, second, last], None),
        ("alike", [first, second, last], lambda parameter, batch: 1.0),
        ("plain", [first, second, last], None),
    ):
        found[name] = compress.apply(dense, plan)
        recover(found[name], dense, plan, data, ["least_squares"], count=count)
    weights = {name: torch.cat([p.detach().flatten() for p in model.parameters()]) for name, model in found.items()}
    torch.testing.assert_close(weights["counted"], weights["repeated"], rtol=0, atol=1e-9)
    torch.testing.assert_close(weights["alike"], weights["plain"], rtol=0, atol=0)
    assert (weights["counted"] - weights["plain"]).abs().max() > 1e-4


def test_a_method_that_does_not_exist() -> None:
    x = image(5, 3, 9, 7)
    with pytest.raises(compress.PruneError, match="recover='magic' is unknown: choose among bias, least_squares"):
        compress.prune(Residual(), x, budget=compress.Budget(channels=0.7), recover=["magic"], calibration=[x])


def test_nothing_removed_is_nothing_to_recover() -> None:
    x = image(5, 3, 9, 7)
    result = compress.prune(Residual(), x, budget=compress.Budget(macs=1.0), recover=True, calibration=[x])
    assert result.recovery is None


def test_an_error_in_the_middle_leaves_no_thread_behind() -> None:
    import threading

    model, x = lively(Residual()), image(20, 3, 9, 7).double()
    plan = compress.prune(model, x, budget=compress.Budget(channels=0.7)).plan
    pruned, bad = compress.apply(model, plan), x.clone()
    bad[0, 0, 0, 0] = float("nan")
    before = threading.active_count()
    with pytest.raises(compress.CalibrationError, match="not finite in calibration batch 1"):
        recover(pruned, model, plan, [x, bad, x])
    assert threading.active_count() == before
