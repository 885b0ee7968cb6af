"""The operators of `layers` as functions of tensors.

>>> import torch
>>> from layers.functional import ConvArguments, NormArguments, conv_bn_act
>>> x = torch.tensor([[[[1.0, -3.0]]]])  # batch 1, 1 channel, 1 x 2 pixels
>>> conv = ConvArguments(weight=torch.full((1, 1, 1, 1), 2.0))
>>> norm = NormArguments(running_mean=torch.tensor([1.0]), running_var=torch.tensor([3.0]), eps=1.0)
>>> conv_bn_act(x, conv, norm, torch.relu)  # relu((2 x - 1) / 2)
tensor([[[[0.5000, 0.0000]]]])
"""

from layers.kernels.bn_act import bn_act
from layers.kernels.bn_act_conv import bn_act_conv
from layers.kernels.conv_act import conv_act
from layers.kernels.conv_bn_act import ConvArguments, NormArguments, conv_bn_act
from layers.kernels.crf import crf_log_partition
from layers.kernels.highway import highway_gates
from layers.kernels.linear_act import linear_act

__all__ = [
    "ConvArguments",
    "NormArguments",
    "bn_act",
    "bn_act_conv",
    "conv_act",
    "conv_bn_act",
    "crf_log_partition",
    "highway_gates",
    "linear_act",
]
