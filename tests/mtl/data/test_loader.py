import pytest
import torch
import torch.nn.functional as F

from mtl.data import TensorLoader
from mtl.data.loader import crop_and_flip


def test_every_sample_comes_once_with_its_target() -> None:
    loader = TensorLoader(torch.arange(50.0), {"twice": 2 * torch.arange(50)}, batch_size=16, shuffle=True)
    batches = list(loader)
    assert len(batches) == len(loader) == 4
    assert [len(inputs) for inputs, _ in batches] == [16, 16, 16, 2]
    inputs = torch.cat([inputs for inputs, _ in batches])
    assert sorted(inputs.tolist()) == list(range(50))
    assert torch.equal(torch.cat([target["twice"] for _, target in batches]), 2 * inputs.long())


def test_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        loader = TensorLoader(torch.arange(30), torch.arange(30), batch_size=30, shuffle=True, seed=seed)
        loader.set_epoch(epoch)
        first, again = next(iter(loader))[0], next(iter(loader))[0]
        assert torch.equal(first, again)
        return tuple(first.tolist())

    assert order(0, 1) == order(0, 1)
    assert len({order(seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)}) == 6


def test_bytes_become_normalised_floats() -> None:
    images = torch.randint(0, 256, (7, 3, 5, 4), dtype=torch.uint8)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    inputs, _ = next(iter(TensorLoader(images, torch.zeros(7), normalize=(mean, std))))
    expected = (images.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert inputs.dtype == torch.float32
    torch.testing.assert_close(inputs.double(), expected, rtol=1e-5, atol=1e-6)


def test_the_callers_tensors_are_never_written_to() -> None:
    images = torch.rand(4, 1, 8, 8)
    before = images.clone()
    loader = TensorLoader(images, torch.zeros(4), augment=True, normalize=((0.5,), (2.0,)))
    for inputs, _ in loader:
        inputs.zero_()
    assert torch.equal(images, before)


def test_augmented_images_are_shifted_or_mirrored_crops() -> None:
    images = torch.randint(1, 256, (64, 2, 16, 16), dtype=torch.uint8)
    augmented = crop_and_flip(images, torch.Generator().manual_seed(0))
    padded = F.pad(images, (2, 2, 2, 2))
    seen = set()
    for image, source in zip(augmented, padded, strict=True):
        places = [
            (top, left, mirrored)
            for top in range(5)
            for left in range(5)
            for mirrored in (False, True)
            if torch.equal(image.flip(2) if mirrored else image, source[:, top : top + 16, left : left + 16])
        ]
        assert len(places) == 1
        seen.add(places[0])
    assert {top for top, _, _ in seen} == {left for _, left, _ in seen} == set(range(5))
    assert {mirrored for _, _, mirrored in seen} == {False, True}


def test_bad_arguments_are_refused() -> None:
    images = torch.rand(4, 3, 8, 8)
    with pytest.raises(ValueError, match=r"there are 4 inputs, but \[3\] targets"):
        TensorLoader(images, torch.zeros(3))
    with pytest.raises(ValueError, match="there are no samples"):
        TensorLoader(images[:0], torch.zeros(0))
    with pytest.raises(ValueError, match="batch_size is 0"):
        TensorLoader(images, torch.zeros(4), batch_size=0)
    with pytest.raises(ValueError, match="images have 3 channels, but mean and std have 1 and 1 values"):
        TensorLoader(images, torch.zeros(4), normalize=((0.5,), (0.5,)))
    with pytest.raises(ValueError, match="std above 0"):
        TensorLoader(images, torch.zeros(4), normalize=((0.5,) * 3, (0.0,) * 3))
