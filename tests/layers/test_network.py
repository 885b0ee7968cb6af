"""Networks from lists: widths that are found, layers that are counted, errors that say which."""

import json

import pytest
import torch
from torch import nn

import layers

SPECS = json.loads("""[
    {"layer": "ConvBNAct", "out_channels": 6, "kernel_size": 3},
    {"layer": "BatchNorm2d"},
    {"layer": "Bottleneck", "mid_channels": 2, "stride": 2},
    {"layer": "GlobalPool"},
    {"layer": "Highway"},
    {"layer": "Dropout", "p": 0.1},
    {"layer": "Dense", "out_features": 7, "activation": "relu"},
    {"layer": "Linear", "out_features": 3},
    {"layer": "Softmax", "dim": -1}
]""")


def test_widths_are_those_of_the_layer_before() -> None:
    network = layers.Network((2, 9, 7), SPECS)
    assert network.hidden[1].num_features == 6
    assert network.hidden[2].in_channels == 6
    assert network.hidden[4].features == 8
    assert network.hidden[6].linear.in_features == 8
    assert isinstance(network.output[0], nn.Linear)
    y = network(torch.randn(5, 2, 9, 7))
    torch.testing.assert_close(y.sum(1), torch.ones(5))


def test_repr_counts_hidden_and_output_layers() -> None:
    network = layers.Network((2, 9, 7), SPECS)
    assert "5 layers = 4 hidden + 1 output, input (2, 9, 7)" in repr(network)
    assert network.num_layers == 5


def test_is_its_layers_in_a_row() -> None:
    network = layers.Network((2, 9, 7), SPECS).eval()
    x = torch.randn(5, 2, 9, 7)
    torch.testing.assert_close(network(x), nn.Sequential(*network.hidden, *network.output)(x))


def test_other_image_sizes_fit() -> None:
    assert layers.Network((2, 9, 7), SPECS)(torch.zeros(5, 2, 12, 12)).shape == (5, 3)


def test_text_with_modules_and_recurrent_layers() -> None:
    specs = [
        nn.Embedding(13, 5),
        {"layer": "LSTM", "hidden_size": 4, "bidirectional": True},
        {"layer": "Dense", "out_features": 3},
    ]
    network = layers.Network((6,), specs, input_dtype=torch.long)
    assert network.num_layers == 3
    assert network(torch.randint(0, 13, (2, 6))).shape == (2, 6, 3)
    assert network.hidden[0] is specs[0]


def test_building_does_not_depend_on_shapes_that_are_large() -> None:
    """Shapes are worked out without arithmetic."""
    network = layers.Network((1, 40_000, 40_000), [{"layer": "Conv2d", "out_channels": 64, "kernel_size": 3}])
    assert network.output[0].in_channels == 1


DENSE = {"layer": "Dense", "out_features": 3}


@pytest.mark.parametrize(
    ("shape", "specs", "message"),
    [
        ((4,), [DENSE, {"layer": "Dens"}], r"Network: spec 1, .*\(batch, 3\).*'Dens', which is no layer"),
        ((4,), [{"out_features": 3}], "Network: spec 0, .*None, which is no layer"),
        ((4,), [{"layer": "Dense", "outputs": 3}], "spec 0, .*unexpected keyword argument 'outputs'"),
        ((4,), [{"layer": "projection", "out_channels": 3}], "'projection', which is no layer"),
        (
            (4,),
            [{"layer": "Conv2d", "out_channels": 3, "kernel_size": 3}],
            r"spec 0, .*Conv2d: input must",
        ),
        ((4,), [DENSE, nn.Linear(4, 3)], r"spec 1, Linear.*\(batch, 3\)"),
        ((2, 3, 3), [DENSE | {"layer": "Conv2d", "out_channels": 3, "kernel_size": 4}], "spec 0"),
        ((4,), [{"layer": "Dropout"}], "Network: specs must hold a layer with weights .* but hold none"),
        ((0,), [DENSE], r"Network: input_shape\[0\] must be an integer of at least 1, but is 0"),
    ],
)
def test_bad_specs(shape, specs, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layers.Network(shape, specs)


def test_bad_input() -> None:
    network = layers.Network((4,), [DENSE])
    with pytest.raises(ValueError, match="Network: x must have shape"):
        network(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="Dense: x must have shape"):
        network(torch.zeros(2, 3))
