"""What whitening by the inputs is worth: output errors of truncated SVDs of equal rank, with and without it.

Claim: for correlated inputs the whitened SVD loses at most as much of every layer's outputs as the weight's raw SVD,
and at most 0.7 times as much on average, on a 3-layer MLP and on a transformer of torchvision's vit_b_16 shape; at full
rank the outputs are the dense layer's to 1e-10 in float64. Weights are random with singular values that fall like
1 / k. Errors are measured on the calibration inputs and on fresh ones. Of the transformer's twelve blocks, alike but
for their random numbers, the first few are enough (``--blocks``): one takes a CPU half a minute.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from statistics import mean
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from benchmarks.common import parser, wide_console, write_results
from compress.factorize.decompositions import Factorisation, Problem, Split
from compress.factorize.options import problem_of
from compress.gram import GramCollector, GramSums
from compress.sites import Key, Site, find_sites
from compress.trace import record
from compress.watch import gather

WIDTHS = (256, 512, 256, 64)
ROWS = 64  # on which outputs at full rank are compared


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; exit status 0."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    flags = parser(__file__, "output errors of truncated SVDs, whitened and raw")
    flags.add_argument("--models", nargs="+", default=["mlp", "vit_b_16"], choices=[*MODELS, "small_vit"])
    flags.add_argument("--ranks", type=float, nargs="+", default=[0.125, 0.25, 0.5], help="parts of the full rank")
    flags.add_argument("--images", type=int, default=32, help="of a vision transformer; 64 times as many of an MLP")
    flags.add_argument("--blocks", type=int, default=2, help="of vit_b_16, which has 12")
    flags.add_argument("--seed", type=int, default=0)
    config = flags.parse_args(arguments)
    rows = [row for name in config.models for row in measured(name, config)]
    summary = [summed(name, [row for row in rows if row["model"] == name]) for name in config.models]
    _print(summary)
    settings = {name: getattr(config, name) for name in ("models", "ranks", "images", "blocks", "seed")}
    write_results(config.output, arguments, {"settings": settings, "summary": summary, "rows": rows})
    return 0


def measured(name: str, config: Any) -> Iterator[dict[str, Any]]:
    """A row for each layer and rank: errors as parts of the outputs' variance, whitened and raw, and at full rank."""
    generator = torch.Generator().manual_seed(config.seed)
    torch.manual_seed(config.seed)
    model, draw = {**MODELS, "small_vit": _small_vit}[name](config.blocks)
    _decay(model, generator)
    calibration, fresh = (draw(config.images, generator) for _ in range(2))
    trace = record(model, calibration[:1], training=False)
    sites = [site for site in find_sites(trace) if site.groups == 1 and site.use == 0]
    parameters = dict(model.named_parameters())

    def problems(inputs: Tensor) -> dict[Key, GramSums]:
        batches = list(inputs.split(8 if inputs.dim() == 4 else len(inputs)))
        (grams,) = gather(model, trace, batches, [lambda: GramCollector(sites, len(batches))])
        return dict(grams.sums)

    known = problems(calibration)
    factors = {site.key: _factors(problem_of(site, parameters[site.parameter], known.pop(site.key)), config.ranks, site)
               for site in sites}  # fmt: skip
    seen = problems(fresh)
    for site in sites:
        problem = problem_of(site, parameters[site.parameter], seen.pop(site.key))
        for rank, errors, weights, full in factors.pop(site.key):
            yield {
                "model": name,
                "layer": site.parameter,
                "rank": rank,
                "whitened": errors[0],
                "raw": errors[1],
                "whitened_on_fresh": problem.error(_merged(weights[0], problem)),
                "raw_on_fresh": problem.error(_merged(weights[1], problem)),
                "full_rank": full,
            }


def summed(name: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Ratios of whitened to raw errors over all layers and ranks."""
    ratios = [row["whitened"] / row["raw"] for row in rows]
    fresh = [row["whitened_on_fresh"] / row["raw_on_fresh"] for row in rows]
    return {
        "model": name,
        "layers": len({row["layer"] for row in rows}),
        "mean_ratio": mean(ratios),
        "worst_ratio": max(ratios),
        "mean_ratio_on_fresh": mean(fresh),
        "worst_ratio_on_fresh": max(fresh),
        "full_rank_difference": max(row["full_rank"] for row in rows),
    }


Pair = tuple[Tensor, Tensor]  # (O, r) and (r, D)
Factors = list[tuple[int, tuple[float, float], tuple[Pair, Pair], float]]


def _factors(problem: Problem, ranks: Sequence[float], site: Site) -> Factors:
    """Of each rank the errors and the factors, whitened and raw, and the difference at full rank."""
    found = Factorisation(problem, Split(tuple(range(len(site.kernel)))))
    left, values, right = torch.linalg.svd(problem.weight.flatten(1), full_matrices=False)
    result: Factors = []
    full = _difference(problem.weight.flatten(1), *found.factors(found.full_rank())[:2])
    for part in ranks:
        rank = max(1, round(part * found.full_rank()))
        first, second, error = found.factors(rank)
        raw = left[:, :rank] * values[:rank], right[:rank]
        # errors on fresh inputs are asked of these later: single precision saves half the memory
        pairs = (second.flatten(1).float(), first.flatten(1).float()), (raw[0].float(), raw[1].float())
        result.append((rank, (error, problem.error(_merged(raw, problem))), pairs, full))
    return result


def _merged(pair: Pair, problem: Problem) -> Tensor:
    return (pair[0].double() @ pair[1].double()).reshape(problem.weight.shape)


def _difference(weight: Tensor, first: Tensor, second: Tensor) -> float:
    """The largest difference between outputs on random rows, of the largest output."""
    rows = torch.randn(ROWS, weight.shape[1], dtype=weight.dtype, generator=torch.Generator().manual_seed(0))
    outputs = rows @ weight.T
    thin = (rows @ first.flatten(1).T) @ second.flatten(1).T
    return float((thin - outputs).abs().max() / outputs.abs().max())


@torch.no_grad()
def _decay(model: nn.Module, generator: torch.Generator) -> None:
    """Random orthogonal factors, singular values like 1 / k, and outputs of the size of their inputs."""
    for parameter in model.parameters():
        if parameter.dim() < 2 or min(parameter.shape) == 1:
            continue
        matrix = parameter.flatten(1)
        size = min(matrix.shape)
        sides = (torch.linalg.qr(torch.randn(n, size, generator=generator))[0] for n in matrix.shape)
        left, right = sides
        made = (left / torch.arange(1, size + 1)) @ right.T
        parameter.copy_((made * (len(matrix) ** 0.5 / made.norm())).reshape(parameter.shape))


Draw = Callable[[int, torch.Generator], Tensor]


def _mlp(_: int) -> tuple[nn.Module, Draw]:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(WIDTHS):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    mixing = torch.randn(WIDTHS[0], WIDTHS[0]) / torch.arange(1, WIDTHS[0] + 1)[:, None]

    def draw(number: int, generator: torch.Generator) -> Tensor:
        return torch.randn(64 * number, WIDTHS[0], generator=generator) @ mixing

    return nn.Sequential(*layers[:-1]).eval(), draw


def _vit_b_16(blocks: int) -> tuple[nn.Module, Draw]:
    model = VisionTransformer(224, 16, num_layers=blocks, num_heads=12, hidden_dim=768, mlp_dim=3072)
    return model.eval(), _images(224)


def _small_vit(_: int) -> tuple[nn.Module, Draw]:
    model = VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=24, mlp_dim=48, num_classes=10)
    return model.eval(), _images(32)


def _images(size: int) -> Draw:
    """Smooth ones: pixels are like their neighbours."""

    def draw(number: int, generator: torch.Generator) -> Tensor:
        coarse = torch.randn(number, 3, size // 8, size // 8, generator=generator)
        return nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")

    return draw


MODELS: dict[str, Callable[[int], tuple[nn.Module, Draw]]] = {"mlp": _mlp, "vit_b_16": _vit_b_16}


def _print(summary: Sequence[dict[str, Any]]) -> None:
    table = Table(title="output error of the whitened SVD by that of the raw SVD of equal rank")
    for name in summary[0]:
        table.add_column(name.replace("_", " "), justify="left" if name == "model" else "right")
    for row in summary:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    wide_console().print(table)


if __name__ == "__main__":
    sys.exit(main())
