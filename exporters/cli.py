"""The command line, `melora-fx`: the one file above both packages."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import melora_fx
from melora_fx import MELoRAConfig, MELoRAError
from melora_fx.adapter_file import read_adapter

from .bench import BenchOptions, run_bench
from .demo import DemoOptions, run_demo
from .export import export_onnx
from .model_folder import example_inputs, load_model

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Rewrite, fold and export transformers with MELoRA adapters.",
)

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


@app.command(epilog="Example: melora-fx export ./my-model ./demo-output/adapter -o merged.onnx")
def export(
    model_dir: Annotated[Path, typer.Argument(help="Hugging Face model folder: the adapter's base.")],
    adapter_dir: Annotated[Path, typer.Argument(help="Adapter folder, as save_adapter writes it.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The .onnx file, or a folder.")],
    adapter: Annotated[
        str, typer.Option(help='"fold": merged; "keep": unmerged; "swap": adapters as inputs.')
    ] = "fold",
    target: Annotated[str, typer.Option(help='Runtime to export for: "portable".')] = "portable",
) -> None:
    """Write a base model and an adapter as an ONNX graph that has been compared with torch."""
    saved = read_adapter(adapter_dir)
    model = load_model(model_dir, class_name=saved.model.get("class"), num_labels=saved.model.get("num_labels"))
    melora_fx.load_adapter(model, adapter_dir)
    print(export_onnx(model, example_inputs(model, model_dir), out, adapter=adapter, target=target))


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
    provider: Annotated[str, typer.Option(help="What runs the graphs: cpu.")] = "cpu",
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


if __name__ == "__main__":
    main()
