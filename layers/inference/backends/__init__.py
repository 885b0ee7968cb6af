"""Ways of running a captured graph, one a file."""

from layers.inference.backends.inductor import inductor_program
from layers.inference.backends.onnxruntime import onnxruntime_program
from layers.inference.backends.openvino import openvino_program
from layers.inference.backends.torch_backend import torch_program
from layers.inference.runner import Backend

BACKENDS: dict[str, Backend] = {
    "torch": torch_program,
    "inductor": inductor_program,
    "onnxruntime": onnxruntime_program,
    "openvino": openvino_program,
}
__all__ = ["BACKENDS"]
