"""`melora-fx bench`: times the user's graphs against each other."""

from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

from exporters.runtime.providers import PROVIDERS

from .options import axis_size, numbers

_Batch = Annotated[
    list[Any], typer.Option(parser=numbers, metavar="SIZES", help="Batch sizes, such as 1,8; may be repeated.")
]
_Sequence = Annotated[
    list[Any],
    typer.Option(
        parser=numbers,
        metavar="LENGTHS",
        help="Sequence lengths, such as 16,128; may be repeated. Default: 64 if the graphs have such an axis.",
    ),
]
_Axis = Annotated[
    list[Any],
    typer.Option(parser=axis_size, metavar="NAME=SIZE", help="Size of another free axis; may be repeated."),
]


def bench(
    graphs: Annotated[list[Path], typer.Argument(help="ONNX files with the same inputs; the first is the reference.")],
    batch: _Batch = ["8"],  # noqa: B006
    sequence: _Sequence = [],  # noqa: B006
    axis: _Axis = [],  # noqa: B006
    threads: Annotated[int, typer.Option(help="Number of threads per run.")] = 1,
    rounds: Annotated[int, typer.Option(help="Timed runs per graph and shape.")] = 30,
    provider: Annotated[
        str,
        typer.Option(help="ONNX Runtime provider: cpu, cuda or tensorrt.", autocompletion=lambda: [*PROVIDERS]),
    ] = "cpu",
    max_difference: Annotated[
        float | None, typer.Option(help="Fail if outputs differ by more than this (relative) from the first graph's.")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the rows to this CSV file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot to this file (.png, .svg, .pdf).")] = None,
) -> None:
    """Time ONNX graphs in turn, in random order; show medians, and ratios to the first graph."""
    from exporters.measuring.bench import BenchOptions, run_bench

    run_bench(
        BenchOptions(
            graphs=tuple(graphs),
            batches=tuple(chain.from_iterable(batch)),
            sequences=tuple(chain.from_iterable(sequence)),
            axes=dict(axis),
            threads=threads,
            rounds=rounds,
            provider=provider,
            max_difference=max_difference,
            csv=csv,
            plot=plot,
        )
    )
