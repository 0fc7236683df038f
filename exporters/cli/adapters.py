"""`melora-fx adapter …`: inspects and combines adapter folders, and converts them from and to other formats."""

import dataclasses
import json
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import AdapterDir, decimals

_AdapterDirs = Annotated[list[Path], typer.Argument(help="Adapter folders, as written by save_adapter.")]
_OutDir = Annotated[Path, typer.Option("-o", "--out", help="Adapter folder to write; must not be an input folder.")]
_AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def inspect_adapter(
    adapter_dir: AdapterDir,
    base: Annotated[
        Path | None, typer.Option(help="Hugging Face model folder: also check that the adapter was trained on it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Check an adapter, and show its sites, its ranks and the size of its updates."""
    from exporters.adapters.summary import summarise_adapter

    summary = summarise_adapter(adapter_dir)
    if base is not None:
        _check_base(adapter_dir, base)
    _show(summary, as_json)
    if base is not None and not as_json:
        print(f"\nthe adapter belongs to the base in {base}")


def _check_base(adapter_dir: Path, base: Path) -> None:
    """Raises MELoRAError if a fold on disk would refuse the adapter and the base; writes nothing."""
    from melora_fx.folding.checkpoint import open_checkpoint
    from melora_fx.folding.checkpoint_plan import plan_fold
    from melora_fx.saving.adapter_file import read_adapter

    plan_fold(open_checkpoint(base), read_adapter(adapter_dir))


def adapter_to_ort(
    adapter_dir: AdapterDir,
    graph: Annotated[Path, typer.Argument(help='ONNX graph, exported with "--adapter swap" from the same base.')],
    out: Annotated[Path, typer.Option("-o", "--out", help=".onnx_adapter file to write.")],
    as_json: _AsJson = False,
) -> None:
    """Write an adapter for ONNX Runtime's LoraAdapter: one session can run many adapters."""
    from exporters.adapters.ort_adapter import write_ort_adapter

    write_ort_adapter(adapter_dir, graph, out)
    _show_written(out, as_json, f"for {graph}")


def adapter_to_peft(
    adapter_dir: AdapterDir,
    out: Annotated[Path, typer.Option("-o", "--out", help="PEFT folder to write; must be new or empty.")],
    form: Annotated[str, typer.Option(help='"lora", or "bdlora": block-diagonal LoRA, one factor smaller.')] = "lora",
    reader: Annotated[
        str, typer.Option("--for", help='Reader: "peft", or "vllm", which supports less: its rules are checked.')
    ] = "peft",
    base_model: Annotated[str | None, typer.Option(help="Path or name of the base, for PEFT's Auto classes.")] = None,
    as_json: _AsJson = False,
) -> None:
    """Write an adapter for PEFT and for servers of PEFT adapters: vLLM, SGLang, text-generation-inference."""
    from exporters.peft_adapters.vllm import check_for_vllm
    from exporters.peft_adapters.writer import write_peft_adapter
    from melora_fx.saving.adapter_file import read_adapter

    if reader not in ("peft", "vllm"):
        raise ValueError(f"`--for` (={reader!r}) must be 'peft' or 'vllm'")
    if reader == "vllm" and form != "lora":
        raise ValueError("vLLM needs `--form lora`: it refuses block-diagonal LoRA, or reads it as an ordinary LoRA")
    needs = check_for_vllm(read_adapter(adapter_dir)) if reader == "vllm" else None
    write_peft_adapter(adapter_dir, out, form=form, base_model=base_model)
    if needs is None:
        _show_written(out, as_json)
    else:
        _show_written(out, as_json, **dataclasses.asdict(needs), flags=needs.flags)
        if not as_json:
            print(needs)


def adapter_from_peft(
    peft_dir: Annotated[Path, typer.Argument(help="Adapter folder of PEFT, the MELoRA authors' code or mlx_lm.")],
    out: _OutDir,
    as_json: _AsJson = False,
) -> None:
    """Convert a PEFT adapter into an adapter folder, which loads, trains, folds and exports like any other."""
    from exporters.adapters.summary import summarise_adapter
    from exporters.peft_adapters.reader import read_peft_adapter

    read_peft_adapter(peft_dir, out)
    _show(summarise_adapter(out), as_json)


def adapter_to_gguf(
    adapter_dir: AdapterDir,
    base: Annotated[
        Path, typer.Argument(help="Hugging Face folder of the base that llama.cpp's GGUF file was converted from.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help=".gguf file to write.")],
    as_json: _AsJson = False,
) -> None:
    """Write an adapter for llama.cpp: `llama-server -m base.gguf --lora adapter.gguf`."""
    from exporters.adapters.gguf_adapter import write_gguf_adapter

    write_gguf_adapter(adapter_dir, base, out)
    _show_written(out, as_json)


def adapter_to_mlx(
    adapter_dir: AdapterDir,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write; must be new or empty.")],
    as_json: _AsJson = False,
) -> None:
    """Write an adapter for MLX: `mlx_lm.generate --model base --adapter-path folder`."""
    from exporters.adapters.mlx_adapter import write_mlx_adapter

    write_mlx_adapter(adapter_dir, out)
    _show_written(out, as_json)


def _show(report: Any, as_json: bool) -> None:
    """Prints a dataclass, as JSON or as the table that its `str()` is."""
    print(json.dumps(dataclasses.asdict(report), indent=2) if as_json else report)


def _show_written(out: Path, as_json: bool, content: str | None = None, **more: Any) -> None:
    """Prints the path of a written file or folder, its size, and what it contains."""
    size = sum(file.stat().st_size for file in ([out] if out.is_file() else out.iterdir()))
    if as_json:
        more |= {"content": content} if content else {}
        print(json.dumps({"out": str(out), "bytes": size} | more, indent=2))
    else:
        print(f"{out}: {size / 1024:.0f} KiB" + (f", {content}" if content else ""))


def scale_update(
    adapter_dir: AdapterDir,
    factor: Annotated[float, typer.Option(help="Number to multiply the update by; may be negative or 0.")],
    out: _OutDir,
    as_json: _AsJson = False,
) -> None:
    """Multiply the update of an adapter by a number, and write the result as an adapter."""
    from exporters.adapters.arithmetic import scale_adapter

    scale_adapter(adapter_dir, factor, out)
    _show_written(out, as_json, f"{factor:g} × {adapter_dir}")


def add_updates(
    adapter_dirs: _AdapterDirs,
    out: _OutDir,
    weights: Annotated[
        list[Any],
        typer.Option(parser=decimals, metavar="NUMBERS", help="One per folder, such as 0.7,0.3; default: 1 each."),
    ] = [],  # noqa: B006  (typer copies it)
    as_json: _AsJson = False,
) -> None:
    """Write the weighted sum of adapters of one base as one adapter. The ranks add up."""
    from exporters.adapters.arithmetic import add_adapters

    given = [*chain.from_iterable(weights)] or [1.0] * len(adapter_dirs)
    if len(given) != len(adapter_dirs):
        raise ValueError(f"`--weights` has {len(given)} for {len(adapter_dirs)} adapters: pass one for each")
    adapters = dict(zip(adapter_dirs, given, strict=True))
    if len(adapters) < len(adapter_dirs):
        raise ValueError("a folder is listed twice: list it once, with the sum of its weights")
    add_adapters(adapters, out)
    _show_written(out, as_json, " + ".join(f"{weight:g} × {folder}" for folder, weight in adapters.items()))


def average_updates(adapter_dirs: _AdapterDirs, out: _OutDir, as_json: _AsJson = False) -> None:
    """Write the mean of adapters of one base, and of their heads, as one adapter. The ranks add up."""
    from exporters.adapters.arithmetic import average_adapters

    average_adapters(adapter_dirs, out)
    _show_written(out, as_json, f"the mean of {', '.join(map(str, adapter_dirs))}")


def compress_update(
    adapter_dir: AdapterDir,
    rank: Annotated[int, typer.Option(help="Maximum rank of a block.")],
    out: _OutDir,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Write the nearest adapter of a smaller rank, and show what is lost."""
    from exporters.adapters.compress import compress_adapter

    report = compress_adapter(adapter_dir, out, rank=rank)
    _show(report, as_json)
