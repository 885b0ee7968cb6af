import torch
from torch import nn

from mtl.ema import ModelAverage


def step(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    model(torch.randn(8, 3, generator=generator))


def test_average_is_the_recurrence_over_weights_and_buffers() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    average = ModelAverage(model, decay=0.3)
    expected = {name: tensor.clone().double() for name, tensor in model.state_dict().items()}
    for update in range(1, 5):
        step(model, update)
        average.update(model)
        decay = min(0.3, (1 + update) / (10 + update))
        for name, tensor in model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor.double()
    average.write_to(model)
    for name, tensor in model.state_dict().items():
        if name == "1.num_batches_tracked":
            assert tensor == 4
        else:
            torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-6, atol=1e-6)


def test_applying_it_for_a_while_leaves_the_model_bitwise_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    average = ModelAverage(model, decay=0.9)
    step(model, 1)
    average.update(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with average.applied_to(model):
        assert not torch.equal(model[0].weight, before["0.weight"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
