"""What an error of a layer's output costs the model's outputs: the diagonal of the Gauss-Newton matrix, by channel.

A small error e of what a site gives changes the outputs y by J e. With random signs v, E (v^T J)^2 is the squared
length of each column of J (Hutchinson 1990, "A stochastic estimator of the trace of the influence matrix"), and
v^T J is what one backward pass gives for all sites at once. So errors of a convolution that pooling averages away later
count for little, as do those of channels behind a ReLU that is mostly off.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor, nn

from compress.calibration import Calibration, batches, num_batches_of
from compress.gradients import differentiable
from compress.gram import GramSums
from compress.sandbox import untouched, visible_operators
from compress.sites import Key, Site
from compress.trace import ExampleInputs, as_arguments, output_tensors
from compress.trial import first_samples

NUM_SAMPLES = 256  # of all batches together, evenly
WEIGHT = {"Convolution": 1, "Addmm": 2, "Mm": 1, "Bmm": 1}  # which input of an operator the weight is

Node = torch.autograd.graph.Node


def weighed(
    sums: Mapping[Key, GramSums], model: nn.Module, calibration: Calibration, *, seed: int = 0
) -> dict[Key, GramSums]:
    """``sums`` with what squared errors of outputs add to that of the model's outputs, as a part of their variance.

    Sites that autograd does not lead to keep what they had, on the same scale. Where it leads to none (outputs that are
    detached, or integers), all are as they were.
    """
    found = output_curvature([known.site for known in sums.values()], model, calibration, seed=seed)
    known = {key: values.sum() / sums[key].output_share.sum().clamp(min=1e-300) for key, values in found.items()}
    if not found or not any(float(value) > 0 for value in known.values()):
        return dict(sums)
    scale = torch.stack([value for value in known.values() if float(value) > 0]).median()
    return {key: replace(one, output_share=found.get(key, one.output_share * scale)) for key, one in sums.items()}


def output_curvature(
    sites: Sequence[Site], model: nn.Module, calibration: Calibration, *, seed: int = 0
) -> dict[Key, Tensor]:
    """By site (g, O): how much the outputs' squared error grows with the mean square error of each output of the site.

    The model's outputs count alike, each as a part of its variance over the samples of a batch (of its mean square, for
    a batch of one). Sites that the outputs do not depend on by autograd are missing.
    """
    wanted = {site.key: site for site in sites}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = {id(parameters[site.parameter]): site.parameter for site in sites if site.parameter in parameters}
    weights = [parameters[name] for name in names.values()]
    generator = torch.Generator().manual_seed(seed)
    each = max(NUM_SAMPLES // max(num_batches_of(calibration), 1), 1)
    totals: dict[Key, Tensor] = {}
    number = 0
    with untouched(model), differentiable(weights), visible_operators():
        model.eval()
        for inputs, _ in batches(calibration, model):
            number += 1
            (some,) = first_samples([inputs], each)
            for key, gradient in _gradients(model, some, weights, names, generator).items():
                if key in wanted:
                    squares = wanted[key].outputs(gradient, None).double().square().sum(1).cpu()
                    totals[key] = totals.get(key, 0.0) + squares
    return {key: total / number for key, total in totals.items()}


def _gradients(
    model: nn.Module,
    inputs: ExampleInputs,
    weights: Sequence[Tensor],
    names: Mapping[int, str],
    generator: torch.Generator,
) -> dict[Key, Tensor]:
    """Of a random sum of the outputs, by what each site gives; none where autograd cannot follow."""
    args, kwargs = as_arguments(inputs)
    found: dict[Key, Tensor] = {}
    with suppress(RuntimeError):  # an operator without derivative, or one that writes into what another one needs
        outputs = [
            _random_sum(tensor, generator) for tensor in output_tensors(model(*args, **kwargs)) if tensor.requires_grad
        ]
        if not outputs:
            return {}
        value = torch.stack(outputs).sum()
        for key, node in _nodes(value, names):
            node.register_prehook(lambda gradients, key=key: found.__setitem__(key, gradients[0]))
        torch.autograd.grad(value, weights, allow_unused=True)
    return {key: gradient for key, gradient in found.items() if gradient is not None}


def _random_sum(output: Tensor, generator: torch.Generator) -> Tensor:
    """With signs, over the root of the variance."""
    values = output.detach().double()
    spread = float((values - values.mean(0) if output.dim() and len(output) > 1 else values).square().sum())
    signs = torch.randint(0, 2, output.shape, generator=generator).to(output) * 2 - 1
    return (output * signs).sum().float() / max(spread, 1e-30) ** 0.5


def _nodes(value: Tensor, names: Mapping[int, str]) -> Iterator[tuple[Key, Node]]:
    """The operators of the graph that a weight of ``names`` goes into as it is, in the order in which they ran."""
    seen, waiting = set[Node](), [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    uses: Counter[str] = Counter()
    for node in sorted(seen, key=lambda node: node._sequence_nr()):
        edge = WEIGHT.get(node.name().partition("Backward")[0])
        weight = None if edge is None else _weight(node.next_functions[edge][0])
        if weight is not None and id(weight) in names:
            name = names[id(weight)]
            yield (name, uses[name]), node
            uses[name] += 1


def _weight(node: Node | None) -> Tensor | None:
    """The leaf that views lead from."""
    while node is not None and len(node.next_functions) == 1:
        ((node, _),) = node.next_functions
    return getattr(node, "variable", None)
