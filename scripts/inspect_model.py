"""``prunus inspect``: which channels of a model can be removed, what goes with them, and why the others stay."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import compress
from compress.folder import write_file
from compress.picture import as_dot, as_html
from scripts.command import run_command
from scripts.sources import build_model

DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32")


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Show the channel groups of a model, what is frozen and why, and how few MACs pruning can reach.

    Args:
        model: layers:NAME, torchvision:NAME, timm:NAME or FILE.py:FACTORY; may also come first, without the flag
        input_shape: shape of the model's input with its batch axis, as in --input-shape 1 3 224 224
        input_dtype: float32, float64, float16, bfloat16, int64 (tokens) or int32
        num_classes: outputs of a model whose factory can be told
        dot: file for the groups in Graphviz' language
        html: file for one page with the tables and a drawing
    """

    model: str
    input_shape: list[int]
    input_dtype: str = "float32"
    num_classes: int = 1000
    dot: str | None = None
    html: str | None = None

    def __post_init__(self) -> None:
        if not self.input_shape or min(self.input_shape) < 1:
            raise ValueError(
                f"--input-shape is {self.input_shape}, but it takes sizes of at least 1, as in 1 3 224 224"
            )
        if self.input_dtype not in DTYPES:
            raise ValueError(f"--input-dtype is {self.input_dtype}, but it must be one of {', '.join(DTYPES)}")
        if self.num_classes < 1:
            raise ValueError(f"--num-classes is {self.num_classes}, but it must be at least 1")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and not arguments[0].startswith("-"):
        arguments.insert(0, "--model")
    return run_command(run, InspectConfig, "prunus inspect", arguments)


def run(config: InspectConfig) -> compress.ChannelGraph:
    """Prints the tables of a model, writes its pictures, and returns its channel graph."""
    for file in (config.dot, config.html):
        if file is not None and not Path(file).parent.is_dir():
            raise ValueError(f"{file} cannot be written: there is no folder {Path(file).parent}; make it first")
    model = build_model(config.model, config.num_classes)
    example = torch.zeros(config.input_shape, dtype=getattr(torch, config.input_dtype))
    graph = compress.trace(model, example)
    print(graph)
    if config.dot is not None:
        _write(config.dot, as_dot(graph))
    if config.html is not None:
        _write(config.html, as_html(graph, config.model))
    return graph


def _write(file: str, text: str) -> None:
    write_file(Path(file), lambda temporary: temporary.write_text(text, encoding="utf-8"))
    print(f"written: {file}")


if __name__ == "__main__":
    sys.exit(main())
