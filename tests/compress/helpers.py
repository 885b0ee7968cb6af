"""What the tests of compress share: small models around one operator, and the one check that all rules must pass."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import compress
from compress.calibration import Calibration  # noqa: F401  (re-exported for annotations)
from compress.trace import as_arguments

RELATIVE = 1e-10  # float64: rounding of small networks stays below 1e-13, wrong wiring does not


class Apply(nn.Module):
    """A function as a module; ``stored`` become attributes of the module, which the function gets as first argument."""

    def __init__(self, function: Callable[..., Any], **stored: Any) -> None:
        super().__init__()
        self.function = function
        for name, value in stored.items():
            setattr(self, name, value)

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


def between(
    function: Callable[[Tensor], Tensor], channels: int = 11, after: int | None = None, *, dims: int = 2
) -> nn.Module:
    """``function`` (of one activation) between two convolutions: 3 -> ``channels``, then ``after`` -> 5 channels.

    The second convolution is made by the number of channels that ``function`` leaves, ``channels`` if not given.
    """
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    return nn.Sequential(
        conv(3, channels, 3, padding=1), Apply(lambda _, x: function(x)), conv(after or channels, 5, 1)
    )


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in float64 with all parameters, statistics of norms included, away from their initial 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    model.double()
    with torch.no_grad():
        for module in model.modules():
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                if not tensor.is_floating_point():
                    continue
                noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
                if name == "running_var":
                    tensor.copy_(0.5 + noise)
                elif tensor.dim() <= 1:
                    tensor.add_(noise - 0.5)
    return model


def as_double(inputs: Any) -> Any:
    """The same inputs with floating-point tensors in float64."""
    return tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """All output tensors in evaluation mode, with one random state."""
    args, kwargs = as_arguments(inputs)
    training = model.training
    torch.manual_seed(5)
    with torch.no_grad():
        found = model.eval()(*args, **kwargs)
    model.train(training)
    return [leaf for leaf in tree_leaves(dict(found) if isinstance(found, dict) else found) if isinstance(leaf, Tensor)]


def masked_by_hand(model: nn.Module, plan: compress.PrunePlan) -> nn.Module:
    """The twin of the Contract, from the plan's members alone: consumers' slices of removed channels set to zero."""
    twin = copy.deepcopy(model)
    tensors = {
        **dict(twin.named_parameters(remove_duplicate=False)),
        **dict(twin.named_buffers(remove_duplicate=False)),
    }
    with torch.no_grad():
        for group in plan.groups:
            for member in group.members:
                if member.role == "consumer":
                    tensors[member.parameter].index_fill_(member.axis, torch.tensor(member.removed), 0)
    return twin


def assert_same(found: nn.Module, expected: nn.Module, inputs: Any, relative: float = RELATIVE) -> None:
    """Both give the same outputs, shape by shape, within ``relative`` of each output's scale."""
    left, right = outputs(found, inputs), outputs(expected, inputs)
    assert [t.shape for t in left] == [t.shape for t in right]
    for number, (a, b) in enumerate(zip(left, right, strict=True)):
        if b.is_floating_point() and b.numel():
            assert b.isfinite().all(), f"output {number} is not finite: the test tests nothing"
            difference, scale = float((a - b).abs().max()), float(b.abs().max())
            assert difference <= relative * scale, f"output {number}: {difference:.2e} apart at a scale of {scale:.2e}"


def assert_trains(model: nn.Module, inputs: Any) -> None:
    """The model runs forward and backward in training mode, and some parameter gets a finite gradient."""
    args, kwargs = as_arguments(inputs)
    trained = copy.deepcopy(model).train()
    found = trained(*args, **kwargs)
    leaves = [t for t in tree_leaves(dict(found) if isinstance(found, dict) else found) if isinstance(t, Tensor)]
    sum(t.square().sum() for t in leaves if t.requires_grad).backward()  # type: ignore[union-attr]
    gradients = [p.grad for p in trained.parameters() if p.grad is not None]
    assert gradients, "no parameter got a gradient"
    assert all(g.isfinite().all() for g in gradients)


def assert_exact(
    model: nn.Module, inputs: Any, budget: compress.Budget | None = None, *, unverified: bool = False, **options: Any
) -> compress.PruneResult:
    """Prune in float64 to ``budget`` (half of the channels) and check everything that the Contract promises.

    Something is removed; the plan is exact; the pruned model equals the library's masked twin and the one made here;
    the model given is unchanged; the pruned one trains. Rules must be right by themselves: unless ``unverified``,
    no group may have been given up because it did not verify.
    """
    model, inputs = lively(model), as_double(inputs)
    before = copy.deepcopy(model.state_dict())
    result = compress.prune(model, inputs, budget=budget or compress.Budget(channels=0.5), **options)
    assert result.plan.exact, [group.inexact for group in result.plan.groups]
    assert unverified or not any("verify" in note for note in result.notes), result.notes
    assert any(member.removed for member in result.plan.members())
    assert sum(p.numel() for p in result.model.parameters()) < sum(p.numel() for p in model.parameters())
    pruned = compress.apply(model, result.plan)
    assert_same(result.model, pruned, inputs, 0.0)
    assert_same(pruned, compress.mask(model, result.plan), inputs)
    assert_same(pruned, masked_by_hand(model, result.plan), inputs)
    assert_trains(pruned, inputs)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    return result


def frozen_reasons(graph: compress.ChannelGraph, parameter: str, axis: int = 0) -> str:
    """Why elements of this axis are frozen; empty if none is."""
    return "; ".join(f.reason for f in graph.frozen if (f.parameter, f.axis) == (parameter, axis))


def image(*shape: int, seed: int = 0) -> Tensor:
    """A seeded image batch of odd sizes, (2, 3, 9, 7) unless ``shape`` says otherwise."""
    return torch.randn(shape or (2, 3, 9, 7), generator=torch.Generator().manual_seed(seed))


def tokens(*shape: int, vocabulary: int = 13, seed: int = 0) -> Tensor:
    """Seeded token indices, shape (2, 7) unless ``shape`` says otherwise."""
    return torch.randint(0, vocabulary, shape or (2, 7), generator=torch.Generator().manual_seed(seed))
