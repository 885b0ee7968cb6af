import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor
from torchvision import datasets

from mtl.data import cifar10, cifar100


def test_missing_files_are_named_without_a_download(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="CIFAR10: .* holds no folder cifar-10-batches-py"):
        cifar10(tmp_path)
    with pytest.raises(ValueError, match="CIFAR100: .* holds no folder cifar-100-python"):
        cifar100(tmp_path)


def test_files_with_wrong_checksums_are_not_opened(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [*(f"data_batch_{index}" for index in range(1, 6)), "test_batch", "batches.meta"]:
        (folder / name).write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ValueError, match="right checksums"):
        cifar10(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_the_published_layout_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    random = np.random.default_rng(0)
    contents: dict[str, Any] = {"batches.meta": {"label_names": [f"class {index}" for index in range(10)]}}
    for name in ("data_batch_1", "test_batch"):
        contents[name] = {"data": random.integers(0, 256, (40, 3072), np.uint8), "labels": list(range(10)) * 4}
    sums = {}
    for name, content in contents.items():
        raw = pickle.dumps(content)
        (folder / name).write_bytes(raw)
        sums[name] = hashlib.md5(raw, usedforsecurity=False).hexdigest()
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [["data_batch_1", sums["data_batch_1"]]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)

    data = cifar10(tmp_path, validation=10)
    assert data.validation is not None
    assert (len(data.train), len(data.validation), len(data.test)) == (30, 10, 40)
    assert data.class_names[3] == "class 3"
    assert isinstance(data.test.images, Tensor)
    expected = contents["test_batch"]["data"].reshape(40, 3, 32, 32)
    assert np.array_equal(data.test.images.numpy(), expected)
    assert data.test.labels.tolist() == contents["test_batch"]["labels"]
