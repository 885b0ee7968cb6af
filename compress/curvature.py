"""What an error of a layer's output costs the model's outputs: the Gauss-Newton matrix of its channels.

A small error e of what a site gives changes the outputs y by J e. With random signs v, E (v^T J)^T (v^T J) is J^T J
(Hutchinson 1990, "A stochastic estimator of the trace of the influence matrix"), and v^T J is what one backward pass
gives for all sites at once. Summed over positions, as if errors of different positions had nothing to do with each
other, that is the factor of the outputs in Kronecker-factored curvature (Grosse & Martens 2016, "A Kronecker-factored
approximate Fisher matrix for convolution layers", section 3.1). So errors that pooling averages away later count for
little, as do those of channels behind a ReLU that is mostly off, and those that the next layer does not look at.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
MAX_OUTPUTS = 2048  # of a group: of more (32 MB a matrix) the diagonal is enough
WEIGHT = {"Convolution": 1, "Addmm": 2, "Mm": 1, "Bmm": 1, "Embedding": 0}  # which input of an operator the weight is
LOOKUP = -1  # the first use of an embedding's weight as one: a tied weight is also used by sites, counted from 0

Node = torch.autograd.graph.Node


def weighed(sums: Mapping[Key, GramSums], found: Mapping[Key, Tensor]) -> dict[Key, GramSums]:
    """``sums`` with what errors of outputs cost the model's outputs, as :func:`output_curvature` found it.

    Sites that autograd does not lead to keep what they had, on the same scale. Where it leads to none (outputs that are
    detached, or integers), all are as they were.
    """
    shares = {key: diagonal(values) for key, values in found.items() if key in sums}
    scales = [values.sum() / sums[key].output_share.sum().clamp(min=1e-300) for key, values in shares.items()]
    scales = [scale for scale in scales if float(scale) > 0]
    if not scales:
        return dict(sums)
    usual = torch.stack(scales).median()
    return {
        key: replace(known, output_share=shares.get(key, known.output_share * usual), output_metric=_matrix(found, key))
        for key, known in sums.items()
    }


def output_curvature(
    model: nn.Module, calibration: Calibration, sites: Iterable[Site], tables: Iterable[str] = (), *, seed: int = 0
) -> dict[Key, Tensor]:
    """By site the matrix M (g, O, O): errors e of its outputs make the outputs' squared error grow by the mean of
    e^T M e. Where that is large, its diagonal (g, O). Those of tables are at their name and ``LOOKUP``.

    The model's outputs count alike, each as a part of its variance over the samples of a batch (of its mean square, for
    a batch of one). Sites that the outputs do not depend on by autograd are missing.

    Args:
        tables: names of embeddings' weights, which are asked for too.
    """
    wanted: dict[Key, Site | None] = {(name, LOOKUP): None for name in tables} | {site.key: site for site in sites}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = {id(parameters[name]): name for name, _ in wanted if name in parameters}
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
                    rows = _rows(wanted[key], gradient).double()
                    many = rows.shape[2] > MAX_OUTPUTS
                    totals[key] = totals.get(key, 0.0) + (rows.square().sum(1) if many else rows.mT @ rows).cpu()
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
    """The operators of the graph that a weight of ``names`` goes into as it is, in the order in which they ran.

    Uses of a weight are counted as sites are, those as an embedding apart: from ``LOOKUP`` down.
    """
    seen, waiting = set[Node](), [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    uses = Counter[tuple[str, bool]]()
    for node in sorted(seen, key=lambda node: node._sequence_nr()):
        kind = node.name().partition("Backward")[0]
        weight = _weight(node.next_functions[WEIGHT[kind]][0]) if kind in WEIGHT else None
        if weight is None or id(weight) not in names:
            continue
        name, is_lookup = names[id(weight)], kind == "Embedding"
        use = uses[name, is_lookup]
        yield (name, LOOKUP - use if is_lookup else use), node
        uses[name, is_lookup] += 1


def _weight(node: Node | None) -> Tensor | None:
    """The leaf that views lead from."""
    while node is not None and len(node.next_functions) == 1:
        ((node, _),) = node.next_functions
    return getattr(node, "variable", None)


def _rows(site: Site | None, gradient: Tensor) -> Tensor:
    """(g, R, O)."""
    return gradient.reshape(1, -1, gradient.shape[-1]) if site is None else site.outputs(gradient, None)


def diagonal(found: Tensor) -> Tensor:
    """(g, O), of what :func:`output_curvature` found at a site."""
    return found if found.dim() == 2 else found.diagonal(dim1=1, dim2=2)


def _matrix(found: Mapping[Key, Tensor], key: Key) -> Tensor | None:
    return found[key] if key in found and found[key].dim() == 3 else None
