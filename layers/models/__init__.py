"""Small networks for small images; each function builds one with random weights.

>>> import torch, layers
>>> layers.models.resnet20_cifar(num_classes=10)(torch.zeros(2, 3, 32, 32)).shape
torch.Size([2, 10])
"""

from layers.models.digits import digits_cnn
from layers.models.resnet_cifar import resnet20_cifar, resnet32_cifar, resnet44_cifar, resnet56_cifar
from layers.models.vgg_cifar import vgg16_bn_cifar

__all__ = ["digits_cnn", "resnet20_cifar", "resnet32_cifar", "resnet44_cifar", "resnet56_cifar", "vgg16_bn_cifar"]
