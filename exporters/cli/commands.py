"""Every command of `melora-fx`, and `main`.

The modules of the commands import torch, transformers and onnx inside their functions, because --help and completion
need none of them.
"""

import contextlib
import inspect
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from melora_fx.versions import package_version

from .adapters import (
    adapter_from_peft,
    adapter_to_gguf,
    adapter_to_mlx,
    adapter_to_ort,
    adapter_to_peft,
    add_updates,
    average_updates,
    compress_update,
    inspect_adapter,
    scale_update,
)
from .exporting import export
from .folding import fold, fold_into_onnx
from .generating import generate
from .terminal import quiet_pipe, tidy_terminal
from .timing import bench
from .training import demo, match, train

Command = tuple[str, Callable[..., None], str]
"""Name, function, and the arguments of the example that --help shows."""

_COMMANDS: tuple[Command, ...] = (
    ("demo", demo, "--out demo-output --quick"),
    ("train", train, "./my-model --data texts.csv --out ./trained"),
    ("match", match, "./my-model --targets q_proj,v_proj --num-blocks 4"),
    ("fold", fold, "./my-model ./adapter -o ./my-model-folded"),
    ("fold-onnx", fold_into_onnx, "base.onnx ./adapter -o merged.onnx"),
    ("export", export, "./my-model ./demo-output/adapter -o merged.onnx --target ort-cpu"),
    ("generate", generate, "./exported 'Once upon a time' --max-new-tokens 32"),
    ("bench", bench, "base.onnx unmerged.onnx --batch 1,8 --sequence 16,128 --plot bench.png"),
)
_ADAPTER_COMMANDS: tuple[Command, ...] = (
    ("inspect", inspect_adapter, "./adapter --base ./my-model"),
    ("scale", scale_update, "./adapter --factor 0.5 -o ./half"),
    ("add", add_updates, "./a ./b --weights 0.7,0.3 -o ./sum"),
    ("average", average_updates, "./a ./b ./c -o ./mean"),
    ("compress", compress_update, "./sum --rank 8 -o ./small"),
    ("to-peft", adapter_to_peft, "./adapter -o ./peft-adapter --for vllm"),
    ("from-peft", adapter_from_peft, "./peft-adapter -o ./adapter"),
    ("to-gguf", adapter_to_gguf, "./adapter ./my-model -o adapter.gguf"),
    ("to-mlx", adapter_to_mlx, "./adapter -o ./mlx-adapter"),
    ("to-ort", adapter_to_ort, "./adapter swap.onnx -o adapter.onnx_adapter"),
)

_NAME = "melora-fx"
_DEBUG = "--debug"

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Train, fold, export and run transformer models with MELoRA adapters.",
)
adapter_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Inspect, combine and convert adapter folders."
)
app.add_typer(adapter_app, name="adapter")


def _add(group: typer.Typer, prefix: str, commands: tuple[Command, ...]) -> None:
    for name, function, example in commands:
        summary = " ".join(inspect.cleandoc(function.__doc__ or "").partition("\n\n")[0].split())
        group.command(name, short_help=summary, epilog=f"Example: {prefix} {name} {example}")(function)


_add(app, _NAME, _COMMANDS)
_add(adapter_app, f"{_NAME} adapter", _ADAPTER_COMMANDS)


def _print_versions(is_asked: bool) -> None:
    if is_asked:
        print(f"{_NAME} {package_version('melora_fx')}")
        for package in ("torch", "transformers", "onnxruntime"):
            print(f"{package} {package_version(package)}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_versions, is_eager=True, help="Print versions and exit.")
    ] = False,
    debug: Annotated[
        bool,
        typer.Option(
            _DEBUG, help="Show tracebacks, the source of warnings, and all logs. Works anywhere on the command line."
        ),
    ] = False,
) -> None:
    """Declares the options of `melora-fx` itself; `main` reads `debug`, because it may also follow a command."""


def main() -> None:
    """Runs the command line. Prints an error as one message on stderr, or lets it through with --debug."""
    arguments = [argument for argument in sys.argv[1:] if argument != _DEBUG]
    if "" in arguments:  # from an unset variable; as a path it would be the working directory
        print("error: an argument is empty: pass a value, or leave it out", file=sys.stderr)
        sys.exit(1)
    is_debugging = len(arguments) < len(sys.argv[1:])
    with quiet_pipe(), contextlib.nullcontext() if is_debugging else tidy_terminal():
        app(arguments, prog_name=_NAME)
