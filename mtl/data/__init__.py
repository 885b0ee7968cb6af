"""Images and tables as batches of tensors, fast enough for a CPU: read once, then normalised batch by batch.

>>> data = digits()
>>> images, labels = next(iter(data.loader("train", batch_size=32)))
>>> tuple(images.shape), data.num_classes
((32, 1, 8, 8), 10)

Several tasks are one ``TaskData`` where they share their inputs (``digits_tasks``, ``csv`` of a file), and a dict of
one per task where each has its own (``omniglot``, ``cifar10_tasks``, ``cifar100_tasks``, ``school_tasks``, ``csv`` of
a folder); ``loaders`` and ``num_outputs`` take either.

>>> tasks = digits_tasks()
>>> num_outputs(tasks)
{'digit': 10, 'parity': 2, 'large': 2, 'prime': 2, 'remainder': 3, 'ink': 1}
"""

from mtl.data.cifar import cifar10, cifar10_tasks, cifar100, cifar100_tasks, class_tasks
from mtl.data.digits import digits, digits_tasks
from mtl.data.folder import image_folder
from mtl.data.images import ImageData, Split
from mtl.data.loader import TensorLoader
from mtl.data.omniglot import omniglot
from mtl.data.school import load_school, school_tasks
from mtl.data.table import csv
from mtl.data.tasks import MISSING_CLASS, Labelled, TaskData, loaders, num_outputs

__all__ = [
    "MISSING_CLASS",
    "ImageData",
    "Labelled",
    "Split",
    "TaskData",
    "TensorLoader",
    "cifar10",
    "cifar10_tasks",
    "cifar100",
    "cifar100_tasks",
    "class_tasks",
    "csv",
    "digits",
    "digits_tasks",
    "image_folder",
    "load_school",
    "loaders",
    "num_outputs",
    "omniglot",
    "school_tasks",
]
