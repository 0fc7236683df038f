"""Every command of `melora-fx`, and `main`.

The modules of the commands import torch, transformers and onnx inside of their functions: --help and completion need
none of them.
"""

import contextlib
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
    help="Rewrite, fold and export transformers with MELoRA adapters.",
)
adapter_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Work with adapter folders.")
app.add_typer(adapter_app, name="adapter")
for _name, _function, _example in _COMMANDS:
    app.command(_name, epilog=f"Example: {_NAME} {_name} {_example}")(_function)
for _name, _function, _example in _ADAPTER_COMMANDS:
    adapter_app.command(_name, epilog=f"Example: {_NAME} adapter {_name} {_example}")(_function)


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
        bool, typer.Option(_DEBUG, help="Show the traceback of an error, and all warnings and logs; in any place.")
    ] = False,
) -> None:
    """Options of `melora-fx` itself; `main` reads `debug`, which may stand behind a command too."""


def main() -> None:
    """Runs the command line; an error is one message on stderr, and its traceback with --debug."""
    arguments = [argument for argument in sys.argv[1:] if argument != _DEBUG]
    if "" in arguments:  # of an unset variable: as a path, it would be the working directory
        print("error: an argument is empty: give it, or leave it out", file=sys.stderr)
        sys.exit(1)
    is_debugging = len(arguments) < len(sys.argv[1:])
    with quiet_pipe(), contextlib.nullcontext() if is_debugging else tidy_terminal():
        app(arguments, prog_name=_NAME)
