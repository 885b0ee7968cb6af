"""Let a model run in a way that leaves no trace in it: stand-ins for its tensors and integers, everything put back."""

import gc
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from compress.containers import Step, changed
from compress.provenance import Stored, stored_integers, traced_integers
from compress.recorder import Recorder


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Whatever happens inside, the model and the random states are as before afterwards."""
    modules = list(model.modules())
    attributes = [dict(vars(module)) for module in modules]
    # parameters, hooks and caches live in containers that are changed in place
    containers = [(v, v.copy()) for found in attributes for v in found.values() if isinstance(v, dict | list | set)]
    data = {id(b): (b, b.detach().clone()) for b in model.buffers() if not b.is_meta}
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002  (the global state is what is kept)
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda and p.device.index is not None})
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
            for module, before in zip(modules, attributes, strict=True):
                vars(module).clear()
                vars(module).update(before)
            for container, content in containers:
                container.clear()
                container.extend(content) if isinstance(container, list) else container.update(content)
            with torch.no_grad():
                for buffer, value in data.values():
                    if buffer.numel() and not torch.equal(buffer, value):
                        buffer.copy_(value)


@contextmanager
def no_collections() -> Iterator[None]:
    """No garbage collection inside: tracing makes many small objects, and each collection walks all of PyTorch's."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module inside ``torch.compile``'s and the data-parallel wrappers'."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def on_meta(model: nn.Module) -> bool:
    """Whether the model has shapes but no values (``torch.device("meta")``)."""
    return any(parameter.is_meta for parameter in model.parameters())


@contextmanager
def visible_operators() -> Iterator[None]:
    """Turn off fused attention and recurrent layers, and let functions of ``torch.nn.functional`` run their bodies.

    The latter ask ``has_torch_function`` first and would otherwise reach the mode as one opaque call, which hides the
    integers that, say, ``multi_head_attention_forward`` reshapes with. A model so runs through the same operators on
    any device, with data and without.
    """
    names = [name for name in vars(F) if name.startswith("has_torch_function")]
    before = {name: getattr(F, name) for name in names}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    _outside.append((torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()))
    use_backends(onednn=False, cudnn=False)
    for name in names:
        setattr(F, name, lambda *_: False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        onednn, cudnn = _outside.pop()
        use_backends(onednn=onednn, cudnn=cudnn)
        for name, function in before.items():
            setattr(F, name, function)


_outside: list[tuple[bool, bool]] = []  # what was on outside each `visible_operators`, as these are: for all threads


def backends_outside() -> tuple[bool, bool]:
    """Whether oneDNN and cuDNN are on outside `visible_operators`: an operator that was chosen may use them."""
    return _outside[0] if _outside else (torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled())


def use_backends(*, onednn: bool, cudnn: bool) -> None:
    """Turn them on or off (the public context manager of oneDNN warns about graphics cards)."""
    torch._C._set_mkldnn_enabled(onednn)
    torch._C._set_cudnn_enabled(cudnn)


@contextmanager
def quick_operators() -> Iterator[None]:
    """The fast backends, also inside :func:`visible_operators`: for operators that are known already."""
    before = torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()
    onednn, cudnn = backends_outside()
    use_backends(onednn=onednn, cudnn=cudnn)
    try:
        yield
    finally:
        use_backends(onednn=before[0], cudnn=before[1])


def substitute(model: nn.Module, recorder: Recorder, stand_in: Callable[[Tensor], Tensor]) -> None:
    """Put stand-ins for tensors and traced integers in the place of the model's own, and name every tensor once."""
    stand_ins: dict[int, Tensor] = {}
    for prefix, module in model.named_modules():
        for slots in (module._parameters, module._buffers):
            for slot, tensor in slots.items():
                if tensor is None:
                    continue
                if id(tensor) not in stand_ins:
                    stand_ins[id(tensor)] = stand_in(tensor)
                    name = f"{prefix}.{slot}" if prefix else slot
                    recorder.trace.parameters[name] = recorder.ref(stand_ins[id(tensor)])
                    if slots is module._buffers:
                        recorder.trace.buffers.add(name)
                slots[slot] = stand_ins[id(tensor)]

    def for_tensors(_: Step, value: Any) -> Any:
        if isinstance(value, Tensor):  # recurrent layers keep their parameters in a list as well
            return stand_ins[id(value)] if id(value) in stand_ins else stand_in(value)
        return changed(value, for_tensors)

    for prefix, module in model.named_modules():
        for name, value in list(vars(module).items()):
            if name not in _MODULE_INTERNALS:
                vars(module)[name] = for_tensors(name, traced_integers(value, Stored(prefix, name)))
                recorder.trace.stored.update(stored_integers(value, Stored(prefix, name)))


_MODULE_INTERNALS = frozenset(vars(nn.Module())) | {"training"}
