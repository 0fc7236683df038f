"""Every command of `melora-fx`, and `main`."""

import sys
from collections.abc import Callable

import typer

from melora_fx import MELoRAError

from .adapters import adapter_to_ort
from .exporting import export
from .folding import fold, fold_into_onnx
from .timing import bench
from .training import demo, match

Command = tuple[str, Callable[..., None], str]
"""Name, function, and the arguments of the example that --help shows."""

_COMMANDS: tuple[Command, ...] = (
    ("demo", demo, "--out demo-output --quick"),
    ("match", match, "./my-model --targets q_proj,v_proj --num-blocks 4"),
    ("fold", fold, "./my-model ./adapter -o ./my-model-folded"),
    ("fold-onnx", fold_into_onnx, "base.onnx ./adapter -o merged.onnx"),
    ("export", export, "./my-model ./demo-output/adapter -o merged.onnx --target ort-cpu"),
    ("bench", bench, "base.onnx unmerged.onnx --batch 1,8 --sequence 16,128 --plot bench.png"),
)
_ADAPTER_COMMANDS: tuple[Command, ...] = (("to-ort", adapter_to_ort, "./adapter swap.onnx -o adapter.onnx_adapter"),)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Rewrite, fold and export transformers with MELoRA adapters.",
)
adapter_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Work with adapter folders.")
app.add_typer(adapter_app, name="adapter")
for _name, _function, _example in _COMMANDS:
    app.command(_name, epilog=f"Example: melora-fx {_name} {_example}")(_function)
for _name, _function, _example in _ADAPTER_COMMANDS:
    adapter_app.command(_name, epilog=f"Example: melora-fx adapter {_name} {_example}")(_function)


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
