"""`melora-fx adapter …`: adapter folders seen from outside, and in other tools' formats."""

import dataclasses
import json
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import AdapterDir, decimals

_AdapterDirs = Annotated[list[Path], typer.Argument(help="Adapter folders, as save_adapter writes them.")]
_OutDir = Annotated[Path, typer.Option("-o", "--out", help="The adapter folder to write; none that is read.")]


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


def scale_update(
    adapter_dir: AdapterDir,
    factor: Annotated[float, typer.Option(help="What the update is multiplied by; may be negative, or 0.")],
    out: _OutDir,
) -> None:
    """Write an adapter whose update is a multiple of another one's."""
    from exporters.adapters.arithmetic import scale_adapter

    scale_adapter(adapter_dir, factor, out)
    print(f"{out}: {factor:g} × {adapter_dir}")


def add_updates(
    adapter_dirs: _AdapterDirs,
    out: _OutDir,
    weights: Annotated[
        list[Any],
        typer.Option(parser=decimals, metavar="NUMBERS", help="One for each folder: 0.7,0.3. Default: 1 for each."),
    ] = [],  # noqa: B006  (typer copies it)
) -> None:
    """Write the weighted sum of adapters of one base as one adapter; their ranks add up."""
    from exporters.adapters.arithmetic import add_adapters

    given = [*chain.from_iterable(weights)] or [1.0] * len(adapter_dirs)
    if len(given) != len(adapter_dirs):
        raise ValueError(f"`--weights` gives {len(given)} for {len(adapter_dirs)} adapters: give one each")
    adapters = dict(zip(adapter_dirs, given, strict=True))
    if len(adapters) < len(adapter_dirs):
        raise ValueError("a folder is given twice: give it once, with the sum of its weights")
    add_adapters(adapters, out)
    print(f"{out}: {' + '.join(f'{weight:g} × {folder}' for folder, weight in adapters.items())}")


def average_updates(adapter_dirs: _AdapterDirs, out: _OutDir) -> None:
    """Write the mean of adapters of one base as one adapter, and that of their heads; their ranks add up."""
    from exporters.adapters.arithmetic import average_adapters

    average_adapters(adapter_dirs, out)
    print(f"{out}: the mean of {', '.join(map(str, adapter_dirs))}")


def compress_update(
    adapter_dir: AdapterDir,
    rank: Annotated[int, typer.Option(help="Rank that a block has at most.")],
    out: _OutDir,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Write the nearest adapter of a smaller rank, and say what is lost."""
    from exporters.adapters.compress import compress_adapter

    report = compress_adapter(adapter_dir, out, rank=rank)
    print(json.dumps(dataclasses.asdict(report), indent=2) if as_json else report)
