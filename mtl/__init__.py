"""Multi-task training, with a single task as the simplest case: tasks, models that share, and the trainer ``fit``.

>>> from torch import nn
>>> from mtl import FitOptions, HardShared, Task, data, evaluate, fit
>>> digits = data.digits()
>>> model = HardShared(nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU()), heads={"digit": nn.Linear(32, 10)})
>>> task = Task("digit", loss=nn.CrossEntropyLoss())
>>> history = fit(model, task, digits.loader("train"), epochs=10, options=FitOptions(progress=False))
>>> evaluate(model, task, digits.loader("test"))["digit"] > 0.9
True
"""

from mtl import data
from mtl.callbacks import Callback
from mtl.comparison import Comparison, Method, compare
from mtl.distillation import Distillation
from mtl.evaluation import evaluate
from mtl.history import Epoch, History
from mtl.metrics import delta_m
from mtl.options import FitOptions
from mtl.sharing import HardShared, L2Coupling, SoftShared, TraceNorm, UnionSoftmax
from mtl.task import Task
from mtl.trainer import fit, restore
from mtl.weighting import GradientWeighting, Weighting

__all__ = [
    "Callback",
    "Comparison",
    "Distillation",
    "Epoch",
    "FitOptions",
    "GradientWeighting",
    "HardShared",
    "History",
    "L2Coupling",
    "Method",
    "SoftShared",
    "Task",
    "TraceNorm",
    "UnionSoftmax",
    "Weighting",
    "compare",
    "data",
    "delta_m",
    "evaluate",
    "fit",
    "restore",
]
