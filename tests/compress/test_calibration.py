import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from compress import Budget, CalibrationError, prune
from compress.calibration import batches, check_calibration
from tests.compress.helpers import image

X, Y = image(7, 3, 9, 7), torch.arange(7)


class Two(nn.Module):
    """Two inputs, the second optional."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 11, 3), nn.Conv2d(11, 5, 1)

    def forward(self, a, b=None):
        return self.head(self.stem(a if b is None else a + b).relu())


FORMS = {
    "tensors": [X[:3], X[3:]],
    "pairs": [(X[:3], Y[:3]), (X[3:], Y[3:])],
    "lists of two": [[X[:3], Y[:3]], [X[3:], Y[3:]]],
    "dicts": [{"a": X[:3]}, {"a": X[3:]}],
    "dicts with targets": [({"a": X[:3]}, Y[:3]), ({"a": X[3:]}, None)],
    "several inputs": [((X[:3], torch.zeros_like(X[:3])), None), ((X[3:], torch.zeros_like(X[3:])), Y[3:])],
    "loader": DataLoader(TensorDataset(X, Y), batch_size=3),
    "loader of inputs alone": DataLoader([x for x in X], batch_size=3),  # noqa: C416  (a list of tensors is a data set)
    "a tuple of batches": (X[:3], X[3:]),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_scores(form: str) -> None:
    torch.manual_seed(0)
    model = Two()
    options = {"budget": Budget(channels=0.5), "criterion": "mean_activation"}
    expected = prune(model, X[:2], calibration=[X], **options)
    result = prune(model, X[:2], calibration=FORMS[form], recover=True, **options)
    assert result.plan == expected.plan
    for name, values in expected.scores.items():
        assert result.scores[name] == pytest.approx(values, rel=1e-5)


def test_pairs_give_targets() -> None:
    found = list(batches(FORMS["several inputs"], Two()))
    assert [target is None for _, target in found] == [True, False]
    assert isinstance(found[0][0], tuple)
    assert torch.equal(found[1][1], Y[3:])


def test_a_generator_is_refused() -> None:
    with pytest.raises(CalibrationError, match="generator, which can be read only once: pass a list"):
        prune(Two(), X, budget=Budget(channels=0.5), criterion="nonzero", calibration=(x for x in [X]))
    with pytest.raises(CalibrationError, match="generator"):
        prune(Two(), X, budget=Budget(channels=0.5), recover=True, calibration=iter([X]))


@pytest.mark.parametrize("options", [{"criterion": "mean_activation"}, {"recover": True}, {"criterion": "nonzero"}])
def test_missing_data_are_an_error_that_says_who_needs_them(options) -> None:
    with pytest.raises(CalibrationError, match="needs data: pass calibration=batches") as caught:
        prune(Two(), X, budget=Budget(channels=0.5), **options)
    assert str(next(iter(options.values()))) in str(caught.value)


@pytest.mark.parametrize("one", [X, {"a": X}])
def test_one_batch_is_no_list_of_batches(one) -> None:
    with pytest.raises(CalibrationError, match="calibration is one batch: pass a list of batches"):
        check_calibration(one, "a test")


@pytest.mark.parametrize(
    ("calibration", "match"),
    [
        ([], "no batches: pass at least one"),
        ([X, (X, Y, Y)], "batch 1 is a tuple of 3: pass a tensor, a dict,"),
        (["images"], "batch 0 holds a str, not a model input"),
        ([X, X[:, :2]], r"do not fit the model: .*\(7, 2, 9, 7\)"),
        ([X * float("nan")], "not finite in calibration batch 0"),
    ],
)
def test_data_of_the_wrong_form(calibration, match: str) -> None:
    with pytest.raises(CalibrationError, match=match) as caught:
        prune(Two(), X, budget=Budget(channels=0.5), criterion="nonzero", calibration=calibration)
    assert "\n" not in str(caught.value)


def test_data_that_nobody_needs_are_not_read() -> None:
    result = prune(Two(), X, budget=Budget(channels=0.5), criterion="l1", calibration=["never read"])
    assert result.plan.groups
