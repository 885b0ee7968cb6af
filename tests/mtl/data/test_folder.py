import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mtl import Task, evaluate
from mtl.data import ImageData, image_folder

SIZE = 6


def write(file: Path, seed: int, size: tuple[int, int] = (SIZE, SIZE)) -> np.ndarray:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, lossless=True)
    return pixels


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part, count in (("train", 10), ("test", 3)):
        for label, name in enumerate(("bird", "cat")):
            for index in range(count):
                write(tmp_path / part / name / f"{index:02}.webp", seed=100 * label + index)
    return tmp_path


def test_small_images_are_read_exactly_into_memory(folder: Path) -> None:
    data = image_folder(folder, validation=0)
    assert isinstance(data.train.images, Tensor)
    assert data.train.images.dtype == torch.uint8
    assert data.train.images.shape == (20, 3, SIZE, SIZE)
    assert data.class_names == ("bird", "cat")
    assert data.train.labels.tolist() == [0] * 10 + [1] * 10
    cat = np.asarray(Image.open(folder / "train/cat/03.webp").convert("RGB"))
    assert np.array_equal(data.train.images[13].permute(1, 2, 0).numpy(), cat)
    inputs, _ = next(iter(data.loader("train", shuffle=False)))
    torch.testing.assert_close(inputs.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(inputs.std((0, 2, 3), correction=0), torch.ones(3))


def test_validation_comes_from_train_and_never_from_test(folder: Path) -> None:
    data = image_folder(folder, validation=0.2, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert data.validation is not None
    assert (len(data.train), len(data.validation), len(data.test)) == (16, 4, 6)
    assert data.validation.labels.bincount().tolist() == [2, 2]
    assert data.mean == (0.5, 0.5, 0.5)


def test_a_validation_folder_is_used_as_it_is(folder: Path) -> None:
    for label, name in enumerate(("bird", "cat")):
        for index in range(4):
            write(folder / "validation" / name / f"{index}.webp", seed=1000 * (label + 1) + index)
    data = image_folder(folder, validation=0.2)
    assert data.validation is not None
    assert (len(data.train), len(data.validation), len(data.test)) == (20, 8, 6)
    bird = np.asarray(Image.open(folder / "validation/bird/2.webp").convert("RGB"))
    assert np.array_equal(data.validation.images[torch.tensor([2])][0].permute(1, 2, 0).numpy(), bird)
    shutil.rmtree(folder / "validation" / "cat")
    with pytest.raises(ValueError, match="class 'cat' is in train only: train and validation need"):
        image_folder(folder)


def test_images_of_many_sizes_are_resized_and_cut_to_the_centre(folder: Path) -> None:
    write(folder / "train/cat/wide.png", seed=7, size=(70, 14))
    with pytest.raises(ValueError, match="the images differ in size .*: give image_size"):
        image_folder(folder)
    data = image_folder(folder, image_size=14, validation=4)
    assert data.image_shape == (3, 14, 14)
    batches = list(data.loader("train", batch_size=5))
    assert sum(len(images) for images, _ in batches) == 17
    assert all(images.shape[1:] == (3, 14, 14) for images, _ in batches)
    assert data.loader("train", limit=6).num_samples == 6


def test_the_centre_is_the_centre(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for name in ("a", "b"):
            file = tmp_path / part / name / "x.png"
            file.parent.mkdir(parents=True)
            pixels = np.zeros((16, 64, 3), np.uint8)
            pixels[:, 24:40] = 200
            Image.fromarray(pixels).save(file)
    data = image_folder(tmp_path, image_size=14, validation=0)
    images = data.test.images[torch.tensor([1])]
    assert images.shape == (1, 3, 14, 14)
    assert bool((images == 200).all())


def test_an_image_that_cannot_be_read_is_named(folder: Path) -> None:
    bad = folder / "test/bird/01.webp"
    bad.write_bytes(bad.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"01\.webp cannot be read as an image .*: repair or remove it") as caught:
        image_folder(folder)
    assert "\n" not in str(caught.value)
    lazy = image_folder(folder, image_size=2 * SIZE)
    with pytest.raises(ValueError, match=r"01\.webp cannot be read as an image"):
        list(lazy.loader("test"))


def test_folders_that_are_wrong_say_how(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no folder 'train' in it"):
        image_folder(tmp_path / "nowhere")
    (folder / "test/dog").mkdir()
    with pytest.raises(ValueError, match="dog holds no images"):
        image_folder(folder)
    write(folder / "test/dog/0.png", seed=1)
    with pytest.raises(ValueError, match="class 'dog' is in test only"):
        image_folder(folder)
    shutil.rmtree(folder / "test")
    with pytest.raises(ValueError, match="there is no folder 'test' in it"):
        image_folder(folder)
    (folder / "test").mkdir()
    with pytest.raises(ValueError, match="test holds no class folders"):
        image_folder(folder)
    with pytest.raises(ValueError, match="give mean and std together"):
        image_folder(folder, mean=(0.5,) * 3)
    with pytest.raises(ValueError, match="image_size is 0"):
        image_folder(folder, image_size=0)


@pytest.fixture
def real_images() -> ImageData:
    path = os.environ.get("PRUNUS_CIFAR10")
    if not path or not Path(path).is_dir():
        pytest.skip("set PRUNUS_CIFAR10 to the folder that holds CIFAR-10 as train/CLASS/ and test/CLASS/ images")
    return image_folder(path, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


@pytest.mark.slow
def test_the_published_accuracy_comes_out(real_images: ImageData, checkpoints: Path) -> None:
    models = pytest.importorskip("layers.models")
    saved = torch.load(checkpoints / "resnet20-12fca82f.th", map_location="cpu", weights_only=True)["state_dict"]
    model = models.resnet20_cifar()
    model.load_state_dict({name.removeprefix("module."): tensor for name, tensor in saved.items()})
    result = evaluate(model, Task("class", torch.nn.CrossEntropyLoss()), real_images.loader("test"))
    assert result["class"] == pytest.approx(0.9173, abs=2e-4)
