"""The command line, `melora-fx`: the one file above both packages."""

import dataclasses
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

import melora_fx
from exporters.adapters.ort_adapter import write_ort_adapter
from exporters.demo.demo import DemoOptions, run_demo
from exporters.example_inputs import example_inputs
from exporters.export import export_onnx
from exporters.fold_onnx import fold_onnx
from exporters.graph.options import TARGETS
from exporters.measuring.bench import BenchOptions, run_bench
from exporters.tensorrt_check.check import check_tensorrt, parse_shapes
from exporters.triton_server.repository import write_triton_repository
from melora_fx import FoldReport, MELoRAConfig, MELoRAError
from melora_fx.load_model import load_model
from melora_fx.saving.adapter_file import read_adapter

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Rewrite, fold and export transformers with MELoRA adapters.",
)

adapter_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Work with adapter folders.")
app.add_typer(adapter_app, name="adapter")

_DEFAULT_SHAPES = {"batch": (1, 8, 32), "sequence": (16, 64, 128)}
_SHAPES_TEXT = ", ".join(f"{axis}={low}:{usual}:{high}" for axis, (low, usual, high) in _DEFAULT_SHAPES.items())
_TRITON_PROVIDERS = {"portable": "cpu", "ort-cpu": "cpu", "ort-cuda": "cuda", "tensorrt": "tensorrt"}

Targets = Annotated[
    list[str],
    typer.Option("--targets", help='Linears to adapt: names, globs, "re:…" or "all-linear"; may be repeated.'),
]
Rank = Annotated[int, typer.Option(help="Rank of one block.")]
NumBlocks = Annotated[int, typer.Option(help="Number of diagonal blocks.")]


@app.command(epilog="Example: melora-fx demo --out demo-output --quick")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("demo-output"),
    data: Annotated[
        Path | None, typer.Option(help="CSV or TSV file with a header; default: utterances by topic.")
    ] = None,
    text: Annotated[str, typer.Option(help="Column of the texts in --data.")] = "text",
    label: Annotated[str, typer.Option(help="Column of the labels in --data.")] = "label",
    model: Annotated[Path | None, typer.Option(help="Hugging Face model folder; default: MiniLM-L6.")] = None,
    rank: Rank = 8,
    num_blocks: NumBlocks = 8,
    targets: Targets = ["query", "value"],  # noqa: B006  (typer copies it)
    quick: Annotated[bool, typer.Option("--quick", help="A short training: under a minute.")] = False,
) -> None:
    """Train, fold, export and time a real transformer, from pretrained weights to ONNX Runtime."""
    config = MELoRAConfig(rank=rank, num_blocks=num_blocks)
    run_demo(DemoOptions(out, data, text, label, model, tuple(_split_names(targets)), config, quick))


@app.command(epilog="Example: melora-fx match ./my-model --targets q_proj,v_proj --num-blocks 4")
def match(
    model_dir: Annotated[Path, typer.Argument(help="Hugging Face model folder; its weights are not read.")],
    targets: Targets = ["all-linear"],  # noqa: B006  (typer copies it)
    rank: Rank = 8,
    num_blocks: NumBlocks = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show which linears would be adapted, which not, and why."""
    model = load_model(model_dir, with_weights=False)
    report = melora_fx.match(model, _split_names(targets), MELoRAConfig(rank=rank, num_blocks=num_blocks))
    print(json.dumps(dataclasses.asdict(report), indent=2) if as_json else report)


@app.command(epilog="Example: melora-fx fold ./my-model ./adapter -o ./my-model-folded")
def fold(
    base_dir: Annotated[Path, typer.Argument(help="Hugging Face model folder: the adapter's base; it is not changed.")],
    adapter_dir: Annotated[Path, typer.Argument(help="Adapter folder, as save_adapter writes it.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder to write; empty, or not there.")],
) -> None:
    """Merge an adapter into a model folder on disk, and say what rounding takes of it."""
    _print_fold(melora_fx.fold_checkpoint, base_dir, adapter_dir, out)


@app.command("fold-onnx", epilog="Example: melora-fx fold-onnx base.onnx ./adapter -o merged.onnx")
def fold_into_onnx(
    graph: Annotated[Path, typer.Argument(help="The base's graph, as melora-fx export writes it without an adapter.")],
    adapter_dir: Annotated[Path, typer.Argument(help="Adapter folder, as save_adapter writes it.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The .onnx file to write, or a folder.")],
) -> None:
    """Merge an adapter into a base graph that was exported once, without building the model."""
    _print_fold(fold_onnx, graph, adapter_dir, out)


def _print_fold(function: Callable[[Path, Path, Path], FoldReport], base: Path, adapter_dir: Path, out: Path) -> None:
    """Folds, and prints where to and what was lost; the report says what its warning would."""
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        report = function(base, adapter_dir, out)
    print(f"{report}\n{out}: holds adapter {report.adapter_sha256[:12]}…, {time.perf_counter() - start:.1f} s")


@app.command(epilog="Example: melora-fx export ./my-model ./demo-output/adapter -o merged.onnx --target ort-cpu")
def export(
    model_dir: Annotated[Path, typer.Argument(help="Hugging Face model folder: the adapter's base.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The .onnx file, or a folder.")],
    adapter_dir: Annotated[
        Path | None, typer.Argument(help="Adapter folder, as save_adapter writes it; default: the base alone.")
    ] = None,
    base_of: Annotated[
        Path | None,
        typer.Option(help="Without an adapter: one whose model class and head the graph gets, for fold-onnx."),
    ] = None,
    adapter: Annotated[
        str, typer.Option(help='"fold": merged; "keep": unmerged; "swap": adapters as inputs.')
    ] = "fold",
    target: Annotated[str, typer.Option(help=f"Runtime to export for: {', '.join(TARGETS)}.")] = "portable",
    precision: Annotated[str, typer.Option(help='"fp32", "fp16", or "auto": fp16 for ort-cuda.')] = "auto",
    form: Annotated[str, typer.Option(help='Unmerged updates: "block", "dense", or "auto": the faster.')] = "auto",
    verify: Annotated[bool, typer.Option(help="Compare the graph with torch.")] = True,
    shapes: Annotated[
        list[str] | None,
        typer.Option(help="For TensorRT and Triton, AXIS=MIN:OPT:MAX; may be repeated. Default: " + _SHAPES_TEXT),
    ] = None,
    triton: Annotated[
        Path | None, typer.Option(help="Also write the graph into this Triton Inference Server model repository.")
    ] = None,
) -> None:
    """Write a base model and an adapter as an ONNX graph that has been compared with torch."""
    ranges = _DEFAULT_SHAPES | dict(parse_shapes(shapes or []))
    if adapter_dir is not None and base_of is not None:
        raise ValueError("`--base-of` is for graphs without an adapter: leave it out, or the adapter")
    source = adapter_dir or base_of
    saved = read_adapter(source) if source else None
    facts = saved.model if saved else {}
    model = load_model(model_dir, class_name=facts.get("class"), num_labels=facts.get("num_labels"))
    if adapter_dir is not None:
        melora_fx.load_adapter(model, adapter_dir)
    elif saved is not None:  # a new head's zeros would be optimised away, and fold-onnx would have no place for its own
        model.load_state_dict(saved.kept_tensors(), strict=False)
    report = export_onnx(
        model,
        example_inputs(model, model_dir),
        out,
        adapter=adapter,
        target=target,
        precision=precision,
        form=form,
        verify=verify,
    )
    print(report)
    free = {axis for axes in report.inputs.values() for axis in axes if isinstance(axis, str)}
    if not shapes:
        ranges = {axis: sizes for axis, sizes in ranges.items() if axis in free}
    if target == "tensorrt":
        print(check_tensorrt(report.path, shapes=ranges))
    if triton is not None:
        print(write_triton_repository(report.path, triton, shapes=ranges, provider=_TRITON_PROVIDERS[target]))


@adapter_app.command("to-ort", epilog="Example: melora-fx adapter to-ort ./adapter swap.onnx -o adapter.onnx_adapter")
def adapter_to_ort(
    adapter_dir: Annotated[Path, typer.Argument(help="Adapter folder, as save_adapter writes it.")],
    graph: Annotated[Path, typer.Argument(help='The graph, exported with "--adapter swap" from the same base.')],
    out: Annotated[Path, typer.Option("-o", "--out", help="The .onnx_adapter file.")],
) -> None:
    """Write an adapter for ONNX Runtime's LoraAdapter: one session, many adapters."""
    write_ort_adapter(adapter_dir, graph, out)
    print(f"{out}: {out.stat().st_size / 1024:.0f} KiB, for {graph}")


@app.command(epilog="Example: melora-fx bench base.onnx unmerged.onnx --batch 1,8 --sequence 16,128 --plot bench.png")
def bench(
    graphs: Annotated[list[Path], typer.Argument(help="ONNX files with equal inputs; the first is the reference.")],
    batch: Annotated[list[str], typer.Option(help="Batch sizes: 1,8; may be repeated.")] = ["8"],  # noqa: B006
    sequence: Annotated[
        list[str] | None,
        typer.Option(help="Lengths: 16,128; may be repeated. Default: 64 where there is such an axis."),
    ] = None,
    axis: Annotated[
        list[str] | None, typer.Option(help="Size of another free axis: NAME=SIZE; may be repeated.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads of one run.")] = 1,
    rounds: Annotated[int, typer.Option(help="Timed runs of each graph at each shape.")] = 30,
    provider: Annotated[str, typer.Option(help="What runs the graphs: cpu, cuda or tensorrt.")] = "cpu",
    max_difference: Annotated[
        float | None, typer.Option(help="Refuse graphs whose outputs differ by more (relative) from the first one's.")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a picture to this file (.png, .svg, .pdf).")] = None,
) -> None:
    """Time ONNX graphs against each other: in turn, in random order, medians and ratios to the first."""
    run_bench(
        BenchOptions(
            tuple(graphs), _numbers("batch", batch), _numbers("sequence", sequence or []), _axis_sizes(axis or []),
            threads, rounds, provider, max_difference, csv, plot,
        )
    )  # fmt: skip


def _numbers(name: str, values: list[str]) -> tuple[int, ...]:
    """Repeated and comma-separated numbers in one tuple."""
    try:
        return tuple(int(number) for value in values for number in value.split(","))
    except ValueError as error:
        raise ValueError(f"`{name}` (={','.join(values)!r}) must be numbers, as in 1,8") from error


def _axis_sizes(values: list[str]) -> dict[str, int]:
    sizes = {}
    for value in values:
        name, _, size = value.partition("=")
        if not name or not size.isdigit():
            raise ValueError(f"`axis` (={value!r}) must be NAME=SIZE, as in past_length=0")
        sizes[name] = int(size)
    return sizes


def _split_names(values: list[str]) -> Any:
    """Repeated and comma-separated names as one list; a regular expression keeps its commas."""
    return [name for value in values for name in ([value] if value.startswith("re:") else value.split(","))]


def main() -> None:
    """Runs the command line; what the user can mend is one line, not a traceback."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        app()
    except (MELoRAError, ValueError, TypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
