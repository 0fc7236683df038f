"""`melora-fx demo` and `melora-fx match`: adapters in a model."""

import dataclasses
import json
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from .options import NumBlocks, Rank, Targets
from .terminal import hide_loading_bars


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
    from exporters.demo.demo import DemoOptions, run_demo
    from melora_fx import MELoRAConfig

    hide_loading_bars()
    config = MELoRAConfig(rank=rank, num_blocks=num_blocks)
    run_demo(
        DemoOptions(
            out=out,
            data=data,
            text=text,
            label=label,
            model=model,
            targets=tuple(chain.from_iterable(targets)),
            config=config,
            quick=quick,
        )
    )


def match(
    model_dir: Annotated[Path, typer.Argument(help="Hugging Face model folder; its weights are not read.")],
    targets: Targets = ["all-linear"],  # noqa: B006  (typer copies it)
    rank: Rank = 8,
    num_blocks: NumBlocks = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show which linears would be adapted, which not, and why."""
    import melora_fx
    from melora_fx.load_model import load_model

    model = load_model(model_dir, with_weights=False)
    config = melora_fx.MELoRAConfig(rank=rank, num_blocks=num_blocks)
    report = melora_fx.match(model, list(chain.from_iterable(targets)), config)
    print(json.dumps(dataclasses.asdict(report), indent=2) if as_json else report)
