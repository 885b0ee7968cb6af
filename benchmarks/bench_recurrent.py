"""Recurrent layers over padded batches, beside packing the batch with `torch.nn.utils.rnn`, on one core.

Claim: with two fifths of the batch filling, a training step in both directions takes less time than that of `torch.nn`
on packed sequences, although the filling is computed too. Both have the same parameters; their outputs are compared.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import layers
from benchmarks.common import Stages, interleaved, parser, stopwatch, wide_console, write_results

KINDS = ("RNN", "LSTM", "GRU")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; exit status 0."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    flags = parser(__file__, "recurrent layers on padded batches against packed sequences")
    flags.add_argument("--batch", type=int, default=32)
    flags.add_argument("--steps", type=int, default=50, help="longest sequence; the shortest has a fifth of it")
    flags.add_argument("--input-size", type=int, default=64)
    flags.add_argument("--hidden-size", type=int, default=128)
    flags.add_argument("--repeats", type=int, default=15)
    config = flags.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(config.batch, config.steps, config.input_size)
    lengths = torch.randint(max(1, config.steps // 5), config.steps + 1, (config.batch,))
    table = Table(
        "layer", "forward: packed", "ours", "ratio", "training: packed", "ours", "ratio", title="milliseconds"
    )
    results = []
    for kind in KINDS:
        ours, packed = _pair(kind, config.input_size, config.hidden_size)
        calls: dict[str, Callable[[], Tensor]] = {
            "ours": partial(_ours, ours, x, lengths),
            "packed": partial(_packed, packed, x, lengths),
        }
        apart = float((calls["ours"]() - calls["packed"]()).detach().abs().max())
        timings = interleaved({name: partial(_stages, call) for name, call in calls.items()}, config.repeats)
        seconds = {name: timing.median for name, timing in timings.items()}
        results.append({"layer": kind, "median_seconds": seconds, "largest_difference": apart})
        row = [kind]
        for stage in ("forward", "training"):
            theirs, own = seconds["packed"][stage], seconds["ours"][stage]
            row += [f"{1e3 * theirs:.1f}", f"{1e3 * own:.1f}", f"{theirs / own:.2f}"]
        table.add_row(*row)
    wide_console().print(table)
    settings = {name: value for name, value in vars(config).items() if name != "output"}
    write_results(config.output, arguments, {"settings": settings, "results": results})
    return 0


def _stages(call: Callable[[], Tensor]) -> Stages:
    with torch.no_grad(), stopwatch({}) as inference:
        call()
    with stopwatch({}) as training:
        call().sum().backward()
    return {"forward": inference["total"], "training": training["total"]}


def _ours(layer: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
    output: Tensor = layer(x, lengths)[0]
    return output


def _packed(layer: nn.RNNBase, x: Tensor, lengths: Tensor) -> Tensor:
    output = layer(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))[0]
    return pad_packed_sequence(output, batch_first=True, total_length=x.shape[1])[0]


def _pair(kind: str, input_size: int, hidden_size: int) -> tuple[nn.Module, nn.RNNBase]:
    """Our layer and torch's, of both directions, with the same parameters."""
    ours = getattr(layers, kind)(input_size, hidden_size, bidirectional=True)
    theirs = getattr(nn, kind)(input_size, hidden_size, bidirectional=True, batch_first=True)
    with torch.no_grad():
        for cells, suffix in ((ours.forwards, ""), (ours.backwards, "_reverse")):
            for name, parameter in cells[0].named_parameters():
                parameter.copy_(getattr(theirs, f"{name}_l0{suffix}"))
    return ours, theirs


if __name__ == "__main__":
    sys.exit(main())
