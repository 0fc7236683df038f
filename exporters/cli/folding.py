"""`melora-fx fold` and `melora-fx fold-onnx`: merge an adapter into a base on disk without building the model."""

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import AdapterDir

if TYPE_CHECKING:
    from melora_fx import FoldReport


def fold(
    base_dir: Annotated[
        Path, typer.Argument(help="Hugging Face model folder of the adapter's base; it is not changed.")
    ],
    adapter_dir: AdapterDir,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write; must be new or empty.")],
) -> None:
    """Merge an adapter into a copy of a model folder, and show what is lost to rounding."""
    from melora_fx import fold_checkpoint

    _print_fold(fold_checkpoint, base_dir, adapter_dir, out)


def fold_into_onnx(
    graph: Annotated[Path, typer.Argument(help="ONNX graph of the base, as `export` writes it without an adapter.")],
    adapter_dir: AdapterDir,
    out: Annotated[Path, typer.Option("-o", "--out", help=".onnx file to write, or a folder for model.onnx.")],
) -> None:
    """Merge an adapter into an exported graph of its base, without building the model."""
    from exporters.onnx_fold import fold_onnx

    _print_fold(fold_onnx, graph, adapter_dir, out)


def _print_fold(function: Callable[[Path, Path, Path], "FoldReport"], base: Path, adapter_dir: Path, out: Path) -> None:
    """Folds, and prints what was lost and the output path. Hides the fold's warning: the report says the same."""
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        report = function(base, adapter_dir, out)
    print(f"{report}\n{out}: contains adapter {report.adapter_sha256[:12]}…, {time.perf_counter() - start:.1f} s")
