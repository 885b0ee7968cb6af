"""Images as batches of tensors, fast enough for a CPU: read once, then cut, flipped and normalised batch by batch.

>>> data = digits()
>>> images, labels = next(iter(data.loader("train", batch_size=32)))
>>> tuple(images.shape), data.num_classes
((32, 1, 8, 8), 10)
"""

from mtl.data.cifar import cifar10, cifar100
from mtl.data.digits import digits
from mtl.data.folder import image_folder
from mtl.data.images import ImageData, Split
from mtl.data.loader import TensorLoader

__all__ = ["ImageData", "Split", "TensorLoader", "cifar10", "cifar100", "digits", "image_folder"]
