"""Layers and small networks that `compress` can prune and `mtl` can train.

>>> import torch, layers
>>> model = layers.models.digits_cnn().eval()
>>> deployed = layers.fold_batch_norm(model)  # the same function, without batch norms
>>> x = torch.zeros(5, 1, 8, 8)
>>> torch.allclose(deployed(x), model(x), atol=1e-5)
True

The catalogue, one family a file: convolutions (`conv`), pooling (`pool`), activations and losses (`activation`),
`dense`, `norm`, `dropout`, `residual`, `highway`, `gated`, `inception`, `bottleneck`, `low_rank`, `attention`,
`recurrent`, `crf`, and `network`, which builds a model from a list. What a layer cannot take is a ValueError that names
the layer, the argument, what was expected and what was given.
"""

from layers import functional, models
from layers.activation import (
    ACTIVATIONS,
    BinaryLoss,
    LeakyReLU,
    MultiClassLoss,
    RegressionLoss,
    ReLU,
    ReLU6,
    Sigmoid,
    Softmax,
    Tanh,
)
from layers.attention import LowRankAttention
from layers.bottleneck import Bottleneck
from layers.conv import (
    Conv1d,
    Conv2d,
    Conv3d,
    ConvBNAct,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
    SeparableConv1d,
    SeparableConv2d,
    SeparableConv3d,
)
from layers.crf import CRF
from layers.dense import MLP, Dense
from layers.dropout import Dropout
from layers.fold import fold_batch_norm
from layers.gated import GLU, GatedConv1d, GatedConv2d, GatedLinear
from layers.highway import Highway, HighwayConv1d, HighwayConv2d
from layers.inception import ConvStep, Inception, PoolStep
from layers.inference import optimize_for_inference
from layers.low_rank import LowRankEmbedding, LowRankLinear
from layers.low_rank_conv import SpatialConv, Tucker2Conv
from layers.memory import memory_efficient, recompute_cheap
from layers.network import Network
from layers.norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from layers.padding import padding_mask
from layers.pool import (
    AvgPool1d,
    AvgPool2d,
    AvgPool3d,
    GlobalPool,
    KMaxOverTime,
    MaxPool1d,
    MaxPool2d,
    MaxPool3d,
    PoolOverTime,
)
from layers.recurrent import GRU, LSTM, RNN
from layers.residual import Residual, projection
from layers.sync_norm import SyncBatchNorm
from layers.training import optimize_for_training

__all__ = [
    "ACTIVATIONS",
    "CRF",
    "GLU",
    "GRU",
    "LSTM",
    "MLP",
    "RNN",
    "AvgPool1d",
    "AvgPool2d",
    "AvgPool3d",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BinaryLoss",
    "Bottleneck",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvBNAct",
    "ConvStep",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "Dense",
    "Dropout",
    "GatedConv1d",
    "GatedConv2d",
    "GatedLinear",
    "GlobalPool",
    "Highway",
    "HighwayConv1d",
    "HighwayConv2d",
    "Inception",
    "KMaxOverTime",
    "LeakyReLU",
    "LowRankAttention",
    "LowRankEmbedding",
    "LowRankLinear",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
    "MultiClassLoss",
    "Network",
    "PoolOverTime",
    "PoolStep",
    "ReLU",
    "ReLU6",
    "RegressionLoss",
    "Residual",
    "SeparableConv1d",
    "SeparableConv2d",
    "SeparableConv3d",
    "Sigmoid",
    "Softmax",
    "SpatialConv",
    "SyncBatchNorm",
    "Tanh",
    "Tucker2Conv",
    "fold_batch_norm",
    "functional",
    "memory_efficient",
    "models",
    "optimize_for_inference",
    "optimize_for_training",
    "padding_mask",
    "projection",
    "recompute_cheap",
]
