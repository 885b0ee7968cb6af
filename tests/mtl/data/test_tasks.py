import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torch import Tensor

from mtl.data import (
    MISSING_CLASS,
    ImageData,
    Split,
    TaskData,
    cifar,
    cifar100_tasks,
    class_tasks,
    csv,
    digits_tasks,
    load_school,
    loaders,
    num_outputs,
    omniglot,
    school_tasks,
)


def test_digits_have_consistent_labels_for_every_task() -> None:
    data = digits_tasks()
    for part in (data.train, data.validation, data.test):
        assert part is not None
        labels = part.targets
        assert torch.equal(labels["digit"] % 2, labels["parity"])
        assert torch.equal(labels["digit"] >= 5, labels["large"].bool())
        assert torch.equal(labels["digit"] % 3, labels["remainder"])
        assert {int(d) for d in labels["digit"][labels["prime"] == 1]} == {2, 3, 5, 7}
    assert data.is_regression("ink")
    assert not data.is_regression("digit")
    images, targets = next(iter(loaders(data, "train", batch_size=7)))
    assert images.shape == (7, 1, 8, 8)
    assert set(targets) == set(num_outputs(data))
    assert all(int(target.max()) < num_outputs(data)[name] for name, target in targets.items() if name != "ink")


def test_an_unknown_or_missing_split_is_named() -> None:
    data = digits_tasks(validation=0)
    with pytest.raises(ValueError, match="no validation split"):
        data.loader("validation")
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        data.loader("dev")


# School


def _cells(matrices: list[np.ndarray]) -> np.ndarray:
    cells = np.empty((1, len(matrices)), object)
    cells[0] = matrices
    return cells


def test_school_rows_keep_their_school(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    features = [random.integers(0, 90, (rows, 4)).astype(np.uint8) for rows in (12, 15, 20)]
    scores = [rows[:, :1] for rows in features]  # the score repeats the first feature, so a mix-up shows
    path = tmp_path / "school.mat"
    savemat(path, {"X": _cells(features), "Y": _cells(scores)})
    x, y, task = load_school(path)
    assert x.shape == (47, 4)
    assert np.array_equal(x[:, 0], y)
    assert np.bincount(task).tolist() == [12, 15, 20]
    assert np.array_equal(x[task == 1], features[1])

    tasks = school_tasks(path)
    assert num_outputs(tasks) == {"school0": 1, "school1": 1, "school2": 1}
    train = torch.cat([data.train.inputs for data in tasks.values()])  # type: ignore[misc]
    assert torch.allclose(train.mean(0), torch.zeros(4), atol=1e-5)
    assert torch.allclose(train.std(0, correction=0), torch.ones(4), atol=1e-5)


def test_a_file_that_is_no_school_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read as a MATLAB file"):
        load_school(tmp_path / "none.mat")
    (tmp_path / "text.mat").write_text("no matrices here, but some text of more than a hundred characters " * 4)
    with pytest.raises(ValueError, match="cannot be read as a MATLAB file"):
        load_school(tmp_path / "text.mat")
    savemat(tmp_path / "other.mat", {"W": np.eye(2)})
    with pytest.raises(ValueError, match=r"no cells X and Y .* it has \['W'\]"):
        load_school(tmp_path / "other.mat")
    savemat(tmp_path / "short.mat", {"X": _cells([np.ones((3, 2)), np.ones((4, 2))]), "Y": _cells([np.ones(3)] * 2)})
    with pytest.raises(ValueError, match="school 1 has features of shape"):
        load_school(tmp_path / "short.mat")


# Omniglot


@pytest.fixture
def drawings(tmp_path: Path) -> Path:
    """Two alphabets, with 2 and 3 characters of 6 drawings: character c of drawing d has ink of value 10 c + d."""
    for alphabet, characters in (("Greek", 2), ("Latin", 3)):
        for character in range(characters):
            folder = tmp_path / "images_background" / alphabet / f"character{character:02}"
            folder.mkdir(parents=True)
            for drawing in range(6):
                image = Image.new("L", (12, 12), 255 - 10 * character - drawing)
                image.save(folder / f"{alphabet}{character:04}_{drawing:02}.png")
    return tmp_path


def test_every_drawing_is_in_one_part_with_its_label(drawings: Path) -> None:
    tasks = omniglot(drawings, train=2, validation=1, image_size=4)
    assert num_outputs(tasks) == {"Greek": 2, "Latin": 3}
    for name, data in tasks.items():
        assert data.validation is not None
        values = []
        for part, each in ((data.train, 2), (data.validation, 1), (data.test, 3)):
            assert isinstance(part.inputs, Tensor)
            assert part.inputs.shape[1:] == (1, 4, 4)
            ink = part.inputs[:, 0, 0, 0].int()
            assert torch.equal(ink // 10, part.targets[name].int())
            assert part.targets[name].bincount().unique().tolist() == [each]
            values += ink.tolist()
        assert len(set(values)) == 6 * num_outputs(tasks)[name]


def test_more_training_drawings_contain_the_fewer_and_copies_count_once(drawings: Path) -> None:
    few = omniglot(drawings, train=1, validation=0, seed=3)["Latin"].train
    many = omniglot(drawings, train=4, validation=0, seed=3)["Latin"].train
    assert isinstance(few.inputs, Tensor)
    assert isinstance(many.inputs, Tensor)
    assert set(few.inputs[:, 0, 0, 0].tolist()) < set(many.inputs[:, 0, 0, 0].tolist())
    shutil.copytree(drawings / "images_background" / "Latin", drawings / "images_again" / "Latin")
    assert len(omniglot(drawings, train=4, validation=0)["Latin"].test) == 3 * 2


def test_characters_with_too_few_drawings_are_named(drawings: Path) -> None:
    with pytest.raises(ValueError, match="Greek/character00 has 6 drawings"):
        omniglot(drawings, train=4, validation=2)
    with pytest.raises(ValueError, match="holds no archives"):
        omniglot(drawings / "images_background" / "Greek" / "character00")
    (drawings / "images_broken.zip").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="images_broken.zip cannot be read"):
        omniglot(drawings)


# CIFAR-100


def test_super_classes_divide_the_hundred_classes() -> None:
    members = [member for group in cifar.SUPER_CLASSES.values() for member in group]
    assert len(cifar.SUPER_CLASSES) == 20
    assert len(set(members)) == 100
    # the numbers of the published coarse labels, classes in alphabetical order
    coarse = dict(zip(sorted(members), _COARSE, strict=True))
    for number, group in enumerate(cifar.SUPER_CLASSES.values()):
        assert {coarse[member] for member in group} == {number}


# fmt: off
_COARSE = [
    4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7, 6, 13, 15, 3, 15, 0, 11, 1, 10,
    12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12, 12, 16,
    12, 1, 9, 19, 2, 10, 0, 1, 16, 12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14,
    13,
]
# fmt: on


def test_each_super_class_has_its_own_images(monkeypatch: pytest.MonkeyPatch) -> None:
    names = tuple(sorted(member for group in cifar.SUPER_CLASSES.values() for member in group))
    labels = torch.arange(100).repeat(3)
    images = labels.to(torch.uint8)[:, None, None, None].expand(-1, 3, 32, 32).contiguous()
    split = Split(images, labels)
    data = ImageData(split, None, split, names, (0.5,) * 3, (0.2,) * 3)
    monkeypatch.setattr(cifar, "cifar100", lambda *_, **__: data)
    tasks = cifar100_tasks("anywhere")
    assert num_outputs(tasks) == dict.fromkeys(cifar.SUPER_CLASSES, 5)
    for name, own in tasks.items():
        assert isinstance(own.test.inputs, Tensor)
        seen = own.test.inputs[:, 0, 0, 0].tolist()
        assert [names[index] for index in seen] == [cifar.SUPER_CLASSES[name][i] for i in own.test.targets[name]]
    inputs, targets = next(iter(loaders(tasks, "test")["fish"]))
    assert inputs.shape == (15, 3, 32, 32)
    assert set(targets) == {"fish"}


def test_classes_that_there_are_not_are_named() -> None:
    split = Split(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.arange(4) % 2)
    data = ImageData(split, None, split, ("cat", "dog"), (0.5,), (0.2,))
    assert num_outputs(class_tasks(data, {"pets": ("dog", "cat"), "dogs": ("dog",)})) == {"pets": 2, "dogs": 1}
    with pytest.raises(ValueError, match="task 'cars': there is no class 'car'; there are cat, dog"):
        class_tasks(data, {"cars": ("car",)})


# CSV


def _write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_one_file_has_rows_that_all_tasks_share(tmp_path: Path) -> None:
    rows = "\n".join(f"{i},{2 * i},{'' if i == 3 else ('no', 'yes')[i % 2]},{i / 2 if i else ''}" for i in range(40))
    path = _write(tmp_path / "all.csv", f"a,b,bought,price\n{rows}\n")
    data = csv(path, {"sale": "bought", "price": "price"})
    assert isinstance(data, TaskData)
    assert num_outputs(data) == {"sale": 2, "price": 1}
    assert data.is_regression("price")
    assert data.validation is not None
    inputs, sale, price = (
        torch.cat([values(part) for part in (data.train, data.validation, data.test)])
        for values in (lambda p: p.inputs, lambda p: p.targets["sale"], lambda p: p.targets["price"])
    )
    order = inputs[:, 0].argsort()
    assert int((sale == MISSING_CLASS).sum()) == 1
    assert int(price.isnan().sum()) == 1
    assert sale[order].tolist() == [MISSING_CLASS if i == 3 else i % 2 for i in range(40)]
    assert price[order][1:].tolist() == [i / 2 for i in range(1, 40)]
    assert torch.allclose(inputs[:, 0], inputs[:, 1], atol=1e-6)  # 2 i standardised is i standardised


def test_a_folder_has_a_file_per_task_and_the_columns_in_common(tmp_path: Path) -> None:
    lines = "\n".join(f"{i},{i % 3},{i * i}" for i in range(20))
    _write(tmp_path / "north.csv", f"a,b,y\n{lines}\n")
    _write(tmp_path / "south.csv", f"c,b,y\n{lines}\n")
    tasks = csv(tmp_path, {"north": "y", "south": "y"}, classes=["south"])
    assert isinstance(tasks, dict)
    assert num_outputs(tasks) == {"north": 1, "south": 20}
    assert isinstance(tasks["north"].train.inputs, Tensor)
    assert tasks["north"].train.inputs.shape == (14, 1)
    _write(tmp_path / "south.csv", f"c,d,y\n{lines}\n")
    with pytest.raises(ValueError, match="no column is in all files"):
        csv(tmp_path, {"north": "y", "south": "y"})


@pytest.mark.parametrize(
    ("text", "targets", "options", "match"),
    [
        ("a,y\n1,2\n", ["z"], {}, "has no column 'z'; it has a, y"),
        ("a,y\n1,2\nx,3\n", ["y"], {}, "row 3 of column 'a' is 'x'"),
        ("a,y\n1\n", ["y"], {}, "row 2 has 1 cells"),
        ("a,a,y\n1,1,2\n", ["y"], {}, "same name"),
        ("a,y\n", ["y"], {}, "no rows"),
        ("", ["y"], {}, "no rows"),
        ("a,y\n1,\n2,\n", ["y"], {}, "'y' is empty"),
        ("a,y\n1,2\n", [], {}, "no targets"),
        ("a,y\n1,2\n", ["y"], {"features": ["y"]}, "is a feature and a target"),
        ("a,y\n1,2\n", ["y"], {"features": []}, "features is empty"),
        ("a,y\n1,2\n", ["y"], {"classes": ["q"]}, "which is no task"),
        ("a,y\n1,2\n", ["y"], {}, "leave nothing"),
        ("y\n1\n", ["y"], {}, "no column is in all files"),
    ],
)
def test_bad_tables_are_named(tmp_path: Path, text: str, targets: list[str], options: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        csv(_write(tmp_path / "bad.csv", text), targets, **options)


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none.csv cannot be read"):
        csv(tmp_path / "none.csv", ["y"])
