"""Small networks for small images and for text; each function builds one with random weights.

>>> import torch, layers
>>> layers.models.resnet20_cifar(num_classes=10)(torch.zeros(2, 3, 32, 32)).shape
torch.Size([2, 10])
"""

from layers.models.bilstm_crf import bilstm_crf
from layers.models.digits import digits_cnn
from layers.models.highway_mlp import highway_mlp
from layers.models.inception_cifar import inception_cifar
from layers.models.resnet_cifar import resnet20_cifar, resnet32_cifar, resnet44_cifar, resnet56_cifar
from layers.models.text_cnn import text_cnn
from layers.models.vgg_cifar import vgg16_bn_cifar

__all__ = [
    "bilstm_crf",
    "digits_cnn",
    "highway_mlp",
    "inception_cifar",
    "resnet20_cifar",
    "resnet32_cifar",
    "resnet44_cifar",
    "resnet56_cifar",
    "text_cnn",
    "vgg16_bn_cifar",
]
