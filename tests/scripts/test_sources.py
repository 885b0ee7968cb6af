"""Every source of models and data, and what is said when there is none of that name."""

from pathlib import Path

import pytest
import torch

import compress
from scripts.sources import build_model, find_criterion, open_data


@pytest.mark.parametrize("source", ["layers:resnet20_cifar", "torchvision:squeezenet1_1", "timm:resnet10t"])
def test_builds_models_with_the_number_of_classes(source: str) -> None:
    if source.startswith("timm"):
        pytest.importorskip("timm")
    model = build_model(source, num_classes=7).eval()
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


def test_builds_models_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("SIZE = 5\n")
    file = tmp_path / "layers.py"
    file.write_text(
        "from beside import SIZE\nfrom torch import nn\n"
        "def with_classes(num_classes): return nn.Linear(SIZE, num_classes)\n"
        "def fixed(): return nn.Linear(2, 3)\n"
        "def broken(): raise KeyError('x')\n"
        "def number(): return 3\n"
    )
    assert build_model(f"{file}:with_classes", 7).weight.shape == (7, 5)
    assert build_model(f"{file}:fixed", 7).weight.shape == (3, 2)
    for name, message in {"broken": "KeyError", "number": "must return", "none": "does not exist"}.items():
        with pytest.raises(ValueError, match=message):
            build_model(f"{file}:{name}", 7)
    file.write_text("import no_such_package\n")
    with pytest.raises(ValueError, match="cannot be imported: ModuleNotFoundError"):
        build_model(f"{file}:fixed", 7)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("resnet20_cifar", "none of layers:NAME"),
        ("keras:resnet", "none of layers:NAME"),
        ("layers:resnet21_cifar", "there is .*resnet20_cifar"),
        ("layers:Dense", "does not exist"),
        ("torchvision:resnet19", "there is .*resnet18"),
        ("no_such.py:build", "no_such.py does not exist"),
    ],
)
def test_unknown_models(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(source, 10)


def test_criteria_by_name_and_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def first(group, evidence): return range(group.num_units)\nNUMBER = 3\n")
    assert find_criterion("taylor") == "taylor"
    function = find_criterion(f"{file}:first")
    result = compress.prune(
        torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Linear(8, 2)),
        torch.zeros(1, 3),
        budget=compress.Budget(channels=0.5),
        criterion=function,
    )
    assert result.plan.groups[0].members[0].removed == (0, 1, 2, 3)
    for source, message in {
        "l3": r"criterion 'l3' is none of l1, l2, .*, nor FILE\.py:FUNCTION",
        f"{tmp_path / 'no.py'}:first": r"criterion file .*no\.py does not exist; give FILE\.py:NAME",
        f"{file}:second": r"mine\.py:second' does not exist; there is first",
        f"{file}:NUMBER": r"mine\.py:NUMBER' does not exist; there is first",
    }.items():
        with pytest.raises(ValueError, match=message):
            find_criterion(source)
    file.write_text("1 / 0\n")
    with pytest.raises(ValueError, match=r"criterion file .*mine\.py cannot be imported: ZeroDivisionError"):
        find_criterion(f"{file}:first")


def _open(source: str, **options: object):
    return open_data(source, **({"mean": None, "std": None, "image_size": None, "validation": 0.0} | options))


def test_opens_digits_with_and_without_normalisation() -> None:
    plain, shifted = _open("digits", validation=0.1), _open("digits", mean=[0.5], std=[0.25])
    assert plain.validation is not None
    images = next(iter(plain.loader("test", batch_size=4)))[0]
    torch.testing.assert_close(next(iter(shifted.loader("test", batch_size=4)))[0], (images - 0.5) / 0.25)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("mnist", {}, "none of digits"),
        ("imagefolder", {}, "none of digits"),
        ("digits:here", {}, "none of digits"),
        ("digits", {"mean": [0.5]}, "--std is missing"),
        ("digits", {"image_size": 9}, "--image-size is for imagefolder"),
        ("imagefolder:no/such", {}, "no/such"),
        ("cifar10:no/such", {}, "no/such"),
    ],
)
def test_data_that_cannot_be(source: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _open(source, **options)
