import pytest
import torch
from torch import Tensor

from mtl.data import ImageData, Split, digits
from mtl.data.images import carve, channel_statistics


def numbered(num_images: int, size: int = 4) -> Split:
    """Every image carries its own number."""
    images = torch.arange(num_images, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 1, size, size)
    return Split(images, torch.arange(num_images) % 5)


def test_validation_is_carved_from_train_by_class_and_seed() -> None:
    train, validation = carve(numbered(100), 0.2, seed=0)
    assert validation is not None
    assert isinstance(train.images, Tensor)
    assert isinstance(validation.images, Tensor)
    assert validation.labels.bincount().tolist() == [4] * 5
    both = torch.cat([train.images, validation.images])[:, 0, 0, 0]
    assert sorted(both.tolist()) == list(range(100))
    _, same = carve(numbered(100), 20, seed=0)
    _, other = carve(numbered(100), 20, seed=1)
    assert same is not None
    assert other is not None
    assert torch.equal(same.images, validation.images)
    assert not torch.equal(other.images, validation.images)


def test_validation_that_cannot_be_had_is_refused() -> None:
    whole = numbered(10)
    assert carve(whole, 0, seed=0) == (whole, None)
    for validation in (2, 10, 100, -1):
        with pytest.raises(ValueError, match=f"cannot take validation={validation} from 10 training images"):
            carve(whole, validation, seed=0)


def test_channel_statistics_are_numpys() -> None:
    images = torch.randint(0, 256, (11, 3, 6, 5), dtype=torch.uint8)
    values = images.numpy().astype("float64") / 255
    mean, std = channel_statistics(images)
    assert mean == pytest.approx(values.mean((0, 2, 3)))
    assert std == pytest.approx(values.std((0, 2, 3)))
    assert channel_statistics(torch.zeros(2, 1, 3, 3, dtype=torch.uint8))[1][0] > 0


def test_loaders_of_the_splits() -> None:
    split = numbered(40, size=32)
    data = ImageData(split, None, split, class_names=tuple("abcde"), mean=(0.0,), std=(1.0,))
    train, test = data.loader("train", seed=3), data.loader("test")
    assert (train.shuffle, train.augment, train.seed) == (True, True, 3)
    assert (test.shuffle, test.augment) == (False, False)
    assert data.image_shape == (1, 32, 32)
    assert not digits().loader("train").augment
    with pytest.raises(ValueError, match="unknown split 'val'"):
        data.loader("val")
    with pytest.raises(ValueError, match="there is no validation split"):
        data.loader("validation")


def test_a_limited_loader_draws_from_everywhere() -> None:
    data = ImageData(numbered(200), None, numbered(9), class_names=tuple("abcde"), mean=(0.0,), std=(1.0,))
    loader = data.loader("train", limit=20, shuffle=False)
    drawn = torch.cat([images[:, 0, 0, 0] for images, _ in loader]).tolist()
    assert loader.num_samples == len(set(drawn)) == 20
    assert max(drawn) > 100


def test_digits_are_whole_and_apart() -> None:
    data = digits()
    assert data.validation is not None
    assert len(data.train) + len(data.validation) + len(data.test) == 1797
    assert data.image_shape == (1, 8, 8)
    assert data.num_classes == 10
    images, labels = next(iter(data.loader("train", batch_size=2000)))
    assert (images.min(), images.max()) == (0, 1)
    assert images.dtype == torch.float32
    assert set(labels.tolist()) == set(range(10))
    parts = [
        {tuple(image.flatten().tolist()) for image in split.images}
        for split in (data.train, data.validation, data.test)
    ]  # type: ignore[attr-defined]
    assert not (parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2])
    with pytest.raises(ValueError, match="test is 0"):
        digits(test=0)
