"""`melora-fx adapter …`: adapter folders in other tools' formats."""

from pathlib import Path
from typing import Annotated

import typer

from .options import AdapterDir


def adapter_to_ort(
    adapter_dir: AdapterDir,
    graph: Annotated[Path, typer.Argument(help='The graph, exported with "--adapter swap" from the same base.')],
    out: Annotated[Path, typer.Option("-o", "--out", help="The .onnx_adapter file.")],
) -> None:
    """Write an adapter for ONNX Runtime's LoraAdapter: one session, many adapters."""
    from exporters.adapters.ort_adapter import write_ort_adapter

    write_ort_adapter(adapter_dir, graph, out)
    print(f"{out}: {out.stat().st_size / 1024:.0f} KiB, for {graph}")
