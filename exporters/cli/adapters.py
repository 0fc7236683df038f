"""`melora-fx adapter …`: adapter folders seen from outside, and in other tools' formats."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from .options import AdapterDir


def inspect_adapter(
    adapter_dir: AdapterDir,
    base: Annotated[
        Path | None, typer.Option(help="Hugging Face model folder: also check that the adapter was trained on it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Check an adapter, and show its sites, ranks and how large its updates are."""
    from exporters.adapters.summary import summarise_adapter

    summary = summarise_adapter(adapter_dir)
    if base is not None:
        _check_base(adapter_dir, base)
    print(json.dumps(dataclasses.asdict(summary), indent=2) if as_json else summary)
    if base is not None and not as_json:
        print(f"\nit belongs to the base in {base}")


def _check_base(adapter_dir: Path, base: Path) -> None:
    """Raises MELoRAError where a fold on disk would refuse the two; nothing is written."""
    from melora_fx.folding.checkpoint import open_checkpoint
    from melora_fx.folding.checkpoint_plan import plan_fold
    from melora_fx.saving.adapter_file import read_adapter

    plan_fold(open_checkpoint(base), read_adapter(adapter_dir))


def adapter_to_ort(
    adapter_dir: AdapterDir,
    graph: Annotated[Path, typer.Argument(help='The graph, exported with "--adapter swap" from the same base.')],
    out: Annotated[Path, typer.Option("-o", "--out", help="The .onnx_adapter file.")],
) -> None:
    """Write an adapter for ONNX Runtime's LoraAdapter: one session, many adapters."""
    from exporters.adapters.ort_adapter import write_ort_adapter

    write_ort_adapter(adapter_dir, graph, out)
    print(f"{out}: {out.stat().st_size / 1024:.0f} KiB, for {graph}")
