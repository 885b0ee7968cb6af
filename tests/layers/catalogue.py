"""One small example of every block of `layers`: how to make it, and what to call it with."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import layers
from layers import ConvStep, PoolStep


@dataclass(frozen=True)
class Example:
    """`make()` is called with a random tensor of `shape` and with `extra`.

    The channels are at `axis` of the input and `out_axis` of the output; `fixed` says whether the block is made for one
    number of them, `checked` whether it looks at its input at all (the activations of `torch.nn` do not).
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    extra: tuple[Tensor, ...] = ()
    axis: int = 1
    out_axis: int = 1
    fixed: bool = True
    checked: bool = True

    def input(self, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


T1, T2, T3 = (2, 6, 9), (2, 6, 9, 7), (2, 6, 4, 5, 3)
FLAT = (3, 6)
LENGTHS = (torch.tensor([7, 3]),)
COUNTS = torch.tensor([[True, True, True, True], [True, False, True, False]])
TAGS = (torch.tensor([[0, 3, 1, 2], [2, 2, 0, 1]]), COUNTS)
BRANCHES = [[ConvStep(4)], [ConvStep(3), ConvStep(5, 3)], [PoolStep("average"), ConvStep(2)]]
SPECS = [{"layer": "Dense", "out_features": 8, "activation": "tanh"}, {"layer": "Linear", "out_features": 5}]


def _residual() -> nn.Module:
    body = nn.Sequential(layers.ConvBNAct(6, 4, 3, stride=2), layers.ConvBNAct(4, 8, 3, activation=None))
    return layers.Residual(body, layers.projection(6, 8, stride=2), activation="relu")


def _last(axis: Example) -> Example:
    return Example(axis.make, axis.shape, axis.extra, -1, -1, axis.fixed, axis.checked)


EXAMPLES: dict[str, Example] = {
    "AvgPool1d": Example(lambda: layers.AvgPool1d(3, 2), T1, fixed=False),
    "AvgPool2d": Example(lambda: layers.AvgPool2d(3, 2, 1), T2, fixed=False),
    "AvgPool3d": Example(lambda: layers.AvgPool3d(2), T3, fixed=False),
    "BatchNorm1d": Example(lambda: layers.BatchNorm1d(6), T1),
    "BatchNorm2d": Example(lambda: layers.BatchNorm2d(6), T2),
    "BatchNorm3d": Example(lambda: layers.BatchNorm3d(6), T3),
    "Bottleneck": Example(lambda: layers.Bottleneck(6, 4, out_channels=8, stride=2), T2),
    "CRF": Example(lambda: layers.CRF(4), (2, 4, 4), TAGS, -1, 0),
    "Conv1d": Example(lambda: layers.Conv1d(6, 8, 3, dilation=2), T1),
    "Conv2d": Example(lambda: layers.Conv2d(6, 8, 3, stride=2, padding=1, groups=2), T2),
    "Conv3d": Example(lambda: layers.Conv3d(6, 8, (1, 3, 3)), T3),
    "ConvBNAct": Example(lambda: layers.ConvBNAct(6, 8, 3, stride=2), T2),
    "ConvTranspose1d": Example(lambda: layers.ConvTranspose1d(6, 8, 4, stride=2, padding=1), T1),
    "ConvTranspose2d": Example(lambda: layers.ConvTranspose2d(6, 8, 3, stride=2), T2),
    "ConvTranspose3d": Example(lambda: layers.ConvTranspose3d(6, 4, 2), T3),
    "Dense": _last(Example(lambda: layers.Dense(6, 8, activation="tanh"), FLAT)),
    "Dropout": Example(lambda: layers.Dropout(0.3, scale_at="test", per="channel"), T2, fixed=False),
    "GLU": Example(lambda: layers.GLU(1), T1, fixed=False),
    "GRU": _last(Example(lambda: layers.GRU(6, 5, bidirectional=True), (2, 7, 6), LENGTHS)),
    "GatedConv1d": Example(lambda: layers.GatedConv1d(6, 8, 2, causal=True), T1),
    "GatedConv2d": Example(lambda: layers.GatedConv2d(6, 8, 3, gate="relu"), T2),
    "GatedLinear": _last(Example(lambda: layers.GatedLinear(6, 8, gate="silu"), FLAT)),
    "GlobalPool": Example(layers.GlobalPool, T2, fixed=False),
    "Highway": _last(Example(lambda: layers.Highway(6, carry="free"), FLAT)),
    "HighwayConv1d": Example(lambda: layers.HighwayConv1d(6, 3), T1),
    "HighwayConv2d": Example(lambda: layers.HighwayConv2d(6, 3, carry="free"), T2),
    "Inception": Example(lambda: layers.Inception(6, BRANCHES), T2),
    "KMaxOverTime": Example(lambda: layers.KMaxOverTime(4), T1, LENGTHS, fixed=False),
    "LSTM": _last(Example(lambda: layers.LSTM(6, 5, num_layers=2), (2, 7, 6), LENGTHS)),
    "LeakyReLU": Example(lambda: layers.LeakyReLU(0.1), T1, fixed=False, checked=False),
    "LowRankLinear": _last(Example(lambda: layers.LowRankLinear(6, 8, 5), FLAT)),
    "MLP": _last(Example(lambda: layers.MLP(6, (8, 7), 5, activation="tanh"), FLAT)),
    "MaxPool1d": Example(lambda: layers.MaxPool1d(3, 2), T1, fixed=False),
    "MaxPool2d": Example(lambda: layers.MaxPool2d(3, 2, 1), T2, fixed=False),
    "MaxPool3d": Example(lambda: layers.MaxPool3d(2), T3, fixed=False),
    "Network": _last(Example(lambda: layers.Network((6,), SPECS), FLAT)),
    "PoolOverTime": Example(lambda: layers.PoolOverTime("average"), T1, LENGTHS, fixed=False),
    "RNN": _last(Example(lambda: layers.RNN(6, 5), (2, 7, 6), LENGTHS)),
    "ReLU": Example(layers.ReLU, T1, fixed=False, checked=False),
    "ReLU6": Example(layers.ReLU6, T1, fixed=False, checked=False),
    "Residual": Example(_residual, T2),
    "SeparableConv1d": Example(lambda: layers.SeparableConv1d(6, 8, 5), T1),
    "SeparableConv2d": Example(lambda: layers.SeparableConv2d(6, 8, 3, stride=2), T2),
    "SeparableConv3d": Example(lambda: layers.SeparableConv3d(6, 4, 3), T3),
    "Sigmoid": Example(layers.Sigmoid, T1, fixed=False, checked=False),
    "Softmax": Example(lambda: layers.Softmax(2), T1, fixed=False, checked=False),
    "SpatialConv": Example(lambda: layers.SpatialConv(6, 8, (3, 3), 5, padding=1), T2),
    "SyncBatchNorm": Example(lambda: layers.SyncBatchNorm(6), T2),
    "Tanh": Example(layers.Tanh, T1, fixed=False, checked=False),
    "Tucker2Conv": Example(lambda: layers.Tucker2Conv(6, 8, (3, 3), (5, 6), padding=1), T2),
}
# What is no block: functions, data, losses (which stand behind a model, not in it), and the networks of layers.models.
OTHERS = {"ACTIVATIONS", "BinaryLoss", "ConvStep", "LowRankAttention", "LowRankEmbedding", "MultiClassLoss", "PoolStep",
          "RegressionLoss", "fold_batch_norm", "functional", "memory_efficient", "models", "optimize_for_inference",
          "optimize_for_training", "padding_mask",
          "projection", "recompute_cheap"}  # fmt: skip
