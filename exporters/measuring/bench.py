"""Times the user's graphs against each other, for `melora-fx bench`."""

import functools
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from rich import box
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from exporters.onnx_files.metadata import METADATA_KEY, read_facts
from exporters.onnx_runtime import Arrays
from exporters.runtime.graph_inputs import axis_roles, make_inputs
from exporters.runtime.ort_runner import OrtRunner
from melora_fx import MELoRAError
from melora_fx.progress import show_progress

from .latency import LatencyTable
from .measure import Contender, Measurement, measure
from .plots import format_ms, import_pyplot, plot_latency
from .tables import write_csv

_LOADS = 3
_PLOT_SUFFIXES = (".png", ".svg", ".pdf")

Shape = tuple[int, int | None]
"""(batch, sequence); sequence is None if the graphs have no such axis."""

console = Console()


@dataclass(frozen=True)
class BenchOptions:
    """The options of the command line. Empty `sequences` mean 64 if the graphs have such an axis."""

    graphs: tuple[Path, ...]
    batches: tuple[int, ...] = (8,)
    sequences: tuple[int, ...] = ()
    axes: Mapping[str, int] = field(default_factory=dict)
    threads: int = 1
    rounds: int = 30
    provider: str = "cpu"
    max_difference: float | None = None
    csv: Path | None = None
    plot: Path | None = None


def run_bench(options: BenchOptions) -> list[Measurement]:
    """Measures the graphs at every shape, shows the table as it grows, and writes the requested CSV file and plot.

    Returns:
        one row per graph and shape: shape by shape, the graphs in the order of `options.graphs`.

    Raises:
        ValueError: if a size, `threads` or `rounds` is too small, the graphs have no free axis for a size, or the
            plot's suffix is unknown.
        MELoRAError: if graphs cannot be loaded or have different inputs, the size of an axis is unknown, outputs differ
            by too much, or a file cannot be written. Outputs are compared before each shape is timed, files are written
            last, and everything else is checked first.
    """
    _check_options(options)
    first = _load(options, 0)[0].runner
    assert isinstance(first, OrtRunner)
    shapes = _shapes(options, first)
    feeds = {(batch, sequence): make_inputs(first, batch, sequence or 1, options.axes) for batch, sequence in shapes}
    rows = _measure_shapes(options, feeds, _model_of(first))
    console.print(_table(rows))
    console.print(f"{rows[0].device}; {rows[0].rounds} rounds, in random order; {rows[0].versions}")
    if options.csv:
        write_csv([asdict(row) for row in rows], [item.name for item in fields(Measurement)], options.csv)
    if options.plot:
        panels = {_shape(*shape): LatencyTable(tuple(row.latency for row in _at(rows, shape))) for shape in shapes}
        title = ", ".join(filter(None, (rows[0].model, options.provider, _threads(options.threads))))
        plot_latency(panels, title, options.plot)
    return rows


def _measure_shapes(options: BenchOptions, feeds: Mapping[Shape, Arrays], model: str) -> list[Measurement]:
    """Returns the rows of every shape, and shows the table as it grows."""
    rows: list[Measurement] = []
    num_rounds = -(-options.rounds // _LOADS) * _LOADS * len(feeds)
    with (
        Live(console=console, transient=True) as live,
        show_progress("rounds", num_rounds, console=console) as show,
    ):
        for (batch, sequence), feed in feeds.items():
            show(_shape(batch, sequence))
            rows += measure(
                functools.partial(_load, options),
                feed,
                provider=options.provider,
                model=model,
                batch=batch,
                sequence=sequence,
                loads=_LOADS,
                rounds=options.rounds,
                max_difference=options.max_difference,
                on_round=lambda: show(advance=1),
            )
            live.update(_table(rows))
    return rows


def _check_options(options: BenchOptions) -> None:
    sizes = {
        "batch": options.batches,
        "sequence": options.sequences,
        "axis": tuple(options.axes.values()),
        "threads": (options.threads,),
        "rounds": (options.rounds,),
    }
    for name, values in sizes.items():
        if any(value < (0 if name == "axis" else 1) for value in values):
            raise ValueError(f"`{name}` (={', '.join(map(str, values))}) must be at least 1")
    for path in (options.csv, options.plot):
        if path and not path.parent.is_dir():
            raise MELoRAError(f"`{path}` cannot be written: there is no folder `{path.parent}`")
    if options.plot:
        if options.plot.suffix not in _PLOT_SUFFIXES:
            raise ValueError(f"`plot` (={str(options.plot)!r}) must end in one of {', '.join(_PLOT_SUFFIXES)}")
        import_pyplot()


def _load(options: BenchOptions, seed: int) -> list[Contender]:
    """Loads the graphs in random order, so that the reference is not always first; returns them in the given order."""
    if missing := [f"`{path}`" for path in options.graphs if not os.path.isfile(path)]:
        raise MELoRAError(f"{', '.join(missing)}: no such file")
    order = list(range(len(options.graphs)))
    random.Random(seed).shuffle(order)
    runners = {
        index: OrtRunner(options.graphs[index], provider=options.provider, threads=options.threads) for index in order
    }
    expected = _signature(runners[0])
    for path, runner in zip(options.graphs, (runners[index] for index in sorted(runners)), strict=True):
        if _signature(runner) != expected:
            raise MELoRAError(
                f"`{path}` has other inputs than `{options.graphs[0]}`, so they cannot be compared: "
                f"{_signature(runner)} and {expected}"
            )
    names = _names(options.graphs)
    return [Contender(names[index], runners[index], path) for index, path in enumerate(options.graphs)]


def _signature(runner: OrtRunner) -> dict[str, str]:
    return {
        value.name: f"{value.type} of {len(value.shape)} axes"
        for value in sorted(runner.session.get_inputs(), key=lambda value: value.name)
    }


def _names(paths: Sequence[Path]) -> list[str]:
    """Returns the shortest end of each path that distinguishes the graph, numbered if the same graph comes again."""
    tails = [path.resolve().with_suffix("").parts for path in paths]
    names = []
    for tail in tails:
        depth = 1
        while any(other[-depth:] == tail[-depth:] and other != tail for other in tails):
            depth += 1
        names.append("/".join(tail[-depth:]))
    counts = [names[: index + 1].count(name) for index, name in enumerate(names)]
    return [name if count == 1 else f"{name} ({count})" for name, count in zip(names, counts, strict=True)]


def _shapes(options: BenchOptions, runner: OrtRunner) -> list[Shape]:
    roles = axis_roles(runner)
    if "batch" not in roles and len(options.batches) > 1:
        raise ValueError(f"`{runner.path}` has a fixed batch: pass only one to --batch")
    if "sequence" not in roles and options.sequences:
        raise ValueError(f"`{runner.path}` has no free sequence axis: leave --sequence out")
    sequences: tuple[int | None, ...] = (options.sequences or (64,)) if "sequence" in roles else (None,)
    return [(batch, sequence) for batch in dict.fromkeys(options.batches) for sequence in dict.fromkeys(sequences)]


def _model_of(runner: OrtRunner) -> str:
    """Returns the class of the model if `export_onnx` wrote the graph, else an empty string."""
    is_ours = METADATA_KEY in runner.session.get_modelmeta().custom_metadata_map
    return read_facts(runner.path).model.rpartition(".")[2] if is_ours else ""


def _at(rows: Sequence[Measurement], shape: Shape) -> list[Measurement]:
    return [row for row in rows if (row.batch, row.sequence) == shape]


def _shape(batch: int, sequence: int | None) -> str:
    return f"batch {batch}" if sequence is None else f"{batch} × {sequence} tokens"


def _threads(count: int) -> str:
    return "one thread" if count == 1 else f"{count} threads"


def _table(rows: Sequence[Measurement]) -> Table:
    caption = "≈: p20 to p80 is wider than the difference from the first graph"
    table = Table("graph", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=caption, caption_justify="left")
    for heading in ("median ms", "p20–p80", "ratio", "differs by", "peak MiB", "file MiB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for shape in dict.fromkeys((row.batch, row.sequence) for row in rows):
        table.add_row(f"[bold]{_shape(*shape)}[/]")
        latencies = LatencyTable(tuple(row.latency for row in _at(rows, shape)))
        for row in _at(rows, shape):
            about = "≈" if latencies.is_within_noise(row.latency) else ""
            p20_to_p80 = f"{format_ms(row.p20_ms)}–{format_ms(row.p80_ms)}"
            difference = f"{row.max_rel_difference:.0e}" if row.max_rel_difference else "0"
            memory = "" if row.peak_memory_mib is None else f"{row.peak_memory_mib:.0f}"
            cells = (format_ms(row.median_ms), p20_to_p80, f"{about}{row.ratio:.2f}", difference, memory)
            table.add_row(f" {escape(row.form)}", *cells, f"{row.file_size_mib:.1f}")
    return table
