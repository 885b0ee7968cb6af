"""Computing once what several models compute alike: no-gradient forward passes of models that share tensors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

# Linear in the weight, their second argument; the third is the bias. The number is that of axes after the channels.
_LINEAR_IN_WEIGHT: dict[Any, int] = {
    F.linear: 0,
    F.conv1d: 1,
    F.conv2d: 2,
    F.conv3d: 3,
    F.conv_transpose1d: 1,
    F.conv_transpose2d: 2,
    F.conv_transpose3d: 3,
}
_PLAIN = (int, float, complex, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


class Once(TorchDispatchMode):
    """An operator on the same values with the same settings runs once; later calls get the first result.

    A tensor is common if it was given as common, or comes from operators on common tensors alone. Each common value has
    a number, so that tensors with equal contents count as the same. Operators that draw random numbers make nothing
    common. There must be no gradients: autograd could not tell the calls apart.

    Views are always made. Operators that write to a tensor always run, on a tensor that nobody else reads: what they
    write to is copied before, if it is the result of another operator, and is common with a new number after.

    Args:
        common: tensors that all models read: inputs, shared weights
    """

    def __init__(self, common: Iterable[Tensor]) -> None:
        super().__init__()
        self._tensors: dict[int, Tensor] = {}  # common tensors by identity, which is theirs as long as they live
        self._numbers: dict[int, int] = {}  # of their values
        self._unused = itertools.count()
        self._results: dict[Any, Any] = {}
        self._made: dict[Any, int] = {}  # numbers of what operators give that always run
        for tensor in common:
            self._add(tensor)

    def is_common(self, value: Any) -> bool:
        """Whether the value is a common tensor."""
        return id(value) in self._numbers

    def own(self, tensor: Tensor) -> Tensor:
        """The tensor, as a copy if it is common."""
        return tensor.clone() if self.is_common(tensor) else tensor

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        key = None if torch.Tag.nondeterministic_seeded in func.tags else self._key((func, args, kwargs))
        if func._schema.is_mutable:
            return self._write(key, func, args, kwargs)
        if key is None:
            return func(*args, **kwargs)
        if any(value.alias_info is not None for value in func._schema.returns):
            # A view costs nothing, and autograd wants a new one at each call, gradients or not.
            return self._number(key, func(*args, **kwargs))
        if key not in self._results:
            result = func(*args, **kwargs)
            tensors = tree_leaves(result)
            if not all(isinstance(tensor, Tensor) for tensor in tensors):
                return result
            for tensor in tensors:
                if not self.is_common(tensor):
                    self._add(tensor)
            self._results[key] = result
        return self._results[key]

    def _add(self, tensor: Tensor, number: int | None = None) -> None:
        self._tensors[id(tensor)] = tensor
        self._numbers[id(tensor)] = next(self._unused) if number is None else number

    def _key(self, value: Any) -> Any:
        """Something hashable that is equal for equal calls; None where a call is not common."""
        if isinstance(value, Tensor):
            number = self._numbers.get(id(value))
            return None if number is None else ("value", number)
        if isinstance(value, tuple | list):
            keys = tuple(map(self._key, value))
            return None if None in keys else keys
        if isinstance(value, Mapping):
            return self._key([*value.items()])
        if isinstance(value, (*_PLAIN, torch._ops.OpOverload)):
            return type(value), value  # 1, 1.0 and True are equal, but not the same setting
        return None

    def _write(self, key: Any, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        named = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
        targets = [
            tensor
            for argument in func._schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write
            for tensor in tree_leaves({**named, **kwargs}.get(argument.name))
            if isinstance(tensor, Tensor)
        ]
        memories = {_memory(target) for target in targets}
        touched = [tensor for tensor in self._tensors.values() if _memory(tensor) in memories]
        alone = len(targets) == 1 and len(touched) == 1 and touched[0] is targets[0]
        for tensor in touched:
            self._withdraw(tensor, keep_value=alone)
        result = func(*args, **kwargs)
        if alone and key is not None:
            self._number(key, targets[0])
        return result

    def _number(self, key: Any, result: Any) -> Any:
        """The result of an operator that always runs, its tensors made common: equal calls have equal values."""
        for index, tensor in enumerate(tree_leaves(result)):
            self._add(tensor, self._made.setdefault((index, key), next(self._unused)))
        return result

    def _withdraw(self, tensor: Tensor, *, keep_value: bool) -> None:
        """Before it is written to: results that it is part of go on with a copy, or are forgotten."""
        number = self._numbers.pop(id(tensor))
        del self._tensors[id(tensor)]
        for key, result in list(self._results.items()):
            if not any(leaf is tensor for leaf in tree_leaves(result)):
                continue
            if keep_value:
                copy = tensor.clone()
                self._add(copy, number)
                self._results[key] = tree_map_only(Tensor, lambda leaf: copy if leaf is tensor else leaf, result)  # noqa: B023
            else:
                del self._results[key]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class BasisResponses(TorchFunctionMode):
    """Layers with a common input and a weight that is a mixture of common ones mix their responses instead.

    ``f(x, sum_k a_k B_k) = sum_k a_k f(x, B_k)``, and ``f(x, B_k)`` is the same for all models, so ``once`` computes it
    once.

    Args:
        once: the mode that knows what is common
        mixtures: for the identity of a mixed weight, its bases and their coefficients
    """

    def __init__(self, once: Once, mixtures: Mapping[int, tuple[Sequence[Tensor], Sequence[Tensor]]]) -> None:
        super().__init__()
        self._once, self._mixtures = once, mixtures

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        num_trailing = _LINEAR_IN_WEIGHT.get(func)
        if num_trailing is None or len(args) < 2 or not self._once.is_common(args[0]):
            return func(*args, **kwargs)
        mixture = self._mixtures.get(id(args[1]))
        if mixture is None:
            return func(*args, **kwargs)
        bases, coefficients = mixture
        bias = args[2] if len(args) > 2 else kwargs.pop("bias", None)
        responses = [func(args[0], basis, None, *args[3:], **kwargs) for basis in bases]
        output = mixed(responses, coefficients)
        return output if bias is None else output + bias.reshape(-1, *[1] * num_trailing)


def mixed(tensors: Sequence[Tensor], coefficients: Sequence[Tensor]) -> Tensor:
    """sum_k coefficients[k] * tensors[k]."""
    products = [coefficient * tensor for tensor, coefficient in zip(tensors, coefficients, strict=True)]
    return torch.stack(products).sum(dim=0) if len(products) > 1 else products[0]
