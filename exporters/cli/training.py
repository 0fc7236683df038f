"""`melora-fx train`, `melora-fx demo` and `melora-fx match`: put adapters into a model, or show where they would go."""

import dataclasses
import json
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import NumBlocks, Rank, Targets, names, share_or_file
from .terminal import hide_loading_bars

_Text = Annotated[str, typer.Option(help="Name of the text column in --data.")]
_Label = Annotated[str, typer.Option(help="Name of the label column in --data.")]
_Validation = Annotated[
    Any,
    typer.Option(
        parser=share_or_file,
        metavar="SHARE|FILE",
        help="Share of the texts to hold out, or a separate file with the same columns.",
    ),
]
_ChosenTargets = Annotated[
    list[Any],
    typer.Option(
        "--targets",
        parser=names,
        metavar="NAMES",
        help='Linear layers to adapt: comma-separated names or globs, "re:…" or "all-linear"; may be repeated. '
        "Default: the query and value projections.",
    ),
]
_MaxTokens = Annotated[int | None, typer.Option(help="Truncate texts to this many tokens; default: the model's limit.")]


def train(
    model_dir: Annotated[Path, typer.Argument(help="Hugging Face model folder; it is not changed.")],
    data: Annotated[Path, typer.Option(help="CSV or TSV file with a header, and a text and a label in each row.")],
    out: Annotated[Path, typer.Option(help="Folder for the adapter, its checkpoints and the report.")],
    text: _Text = "text",
    label: _Label = "label",
    validation: _Validation = "0.2",
    targets: _ChosenTargets = [],  # noqa: B006  (typer copies it)
    rank: Rank = 8,
    num_blocks: NumBlocks = 8,
    alpha: Annotated[float, typer.Option(help="Updates are scaled by alpha / rank.")] = 16.0,
    dropout: Annotated[float, typer.Option(help="Dropout probability of an adapter's inputs during training.")] = 0.0,
    epochs: Annotated[int, typer.Option(help="Number of passes over the training texts.")] = 5,
    learning_rate: Annotated[
        float, typer.Option(help="Initial learning rate; it falls linearly to a twentieth of this value.")
    ] = 2e-3,
    batch_size: Annotated[int, typer.Option(help="Number of texts per step.")] = 16,
    max_tokens: _MaxTokens = None,
    seed: Annotated[int, typer.Option(help="Random seed of the split, new weights, text order and dropout.")] = 0,
    device: Annotated[str, typer.Option(help="Device: cpu, cuda, …; auto: CUDA if available, else the CPU.")] = "auto",
    restart: Annotated[bool, typer.Option("--restart", help="Delete the checkpoints in --out and start over.")] = False,
) -> None:
    """Train an adapter on labelled texts, together with the head and anything else that is new in the model.

    If the training is interrupted, run the same command again to resume it.
    """
    from exporters.training.train import TrainOptions, run_train
    from melora_fx import MELoRAConfig

    hide_loading_bars()
    run_train(
        TrainOptions(
            model=model_dir,
            out=out,
            data=data,
            text=text,
            label=label,
            validation=validation,
            targets=tuple(chain.from_iterable(targets)),
            config=MELoRAConfig(rank=rank, num_blocks=num_blocks, alpha=alpha, dropout=dropout),
            epochs=epochs,
            learning_rate=learning_rate,
            batch_size=batch_size,
            max_tokens=max_tokens,
            seed=seed,
            device=device,
            restart=restart,
        )
    )


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("demo-output"),
    data: Annotated[
        Path | None, typer.Option(help="CSV or TSV file with a header; default: utterances labelled by topic.")
    ] = None,
    text: _Text = "text",
    label: _Label = "label",
    model: Annotated[Path | None, typer.Option(help="Hugging Face model folder; default: MiniLM-L6.")] = None,
    rank: Rank = 8,
    num_blocks: NumBlocks = 8,
    targets: _ChosenTargets = [],  # noqa: B006
    max_tokens: _MaxTokens = None,
    quick: Annotated[bool, typer.Option("--quick", help="One epoch and fewer timed runs: one or two minutes.")] = False,
) -> None:
    """Train, fold, export and time a real transformer, from pretrained weights to ONNX Runtime."""
    from exporters.demo.data import minilm_folder
    from exporters.demo.demo import DemoOptions, run_demo
    from exporters.training.train import TrainOptions
    from melora_fx import MELoRAConfig

    if data is None and (text, label) != ("text", "label"):
        raise ValueError("`--text` and `--label` name columns of `--data`: pass the file too")
    hide_loading_bars()
    run_demo(
        DemoOptions(
            TrainOptions(
                model=model or minilm_folder(),
                out=out,
                data=data,
                text=text,
                label=label,
                targets=tuple(chain.from_iterable(targets)),
                config=MELoRAConfig(rank=rank, num_blocks=num_blocks),
                epochs=1 if quick else 5,
                max_tokens=max_tokens,
            ),
            model_name=str(model or "all-MiniLM-L6-v2"),
            quick=quick,
        )
    )


def match(
    model_dir: Annotated[Path, typer.Argument(help="Hugging Face model folder; its weights are not read.")],
    targets: Targets = ["all-linear"],  # noqa: B006
    rank: Rank = 8,
    num_blocks: NumBlocks = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show which linear layers would be adapted, which would not, and why.

    Without --targets, it shows all linear layers; `train` adapts only the query and value projections.
    """
    import melora_fx
    from melora_fx.load_model import load_model

    model = load_model(model_dir, with_weights=False)
    config = melora_fx.MELoRAConfig(rank=rank, num_blocks=num_blocks)
    report = melora_fx.match(model, list(chain.from_iterable(targets)), config)
    print(json.dumps(dataclasses.asdict(report), indent=2) if as_json else report)
