"""How fast is a fold: in memory compared with PEFT's merge, on disk with a copy, in an ONNX graph with a new export?

* memory: 264M parameters in the linears of a Llama, all adapted: 8 blocks of rank 8 here, rank 64 in PEFT. `folded`
  includes saving the blocks for the way back; `copy` is a memcpy of the same blocks into the same weights.
* disk: a random, sharded Llama of 1.1B parameters in bfloat16 (2.2 GB): `fold_checkpoint`, the whole command
  `melora-fx fold`, `cp -r`, `shutil.copytree`, reading and rewriting every tensor through safetensors, and PEFT's load,
  merge and save. All read from the page cache, which is written back before each run. Peak memory is measured in a
  separate process, above the memory in use after its imports.
* onnx: MiniLM-L6, every linear of its layers: `fold_onnx`, and `export_onnx`, which folds the adapter; both unverified.

All sides are timed in turn in one process. Writes fold_speed.csv.
"""

import functools
import os
import shutil
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaModel

import exporters
import melora_fx
from exporters.measuring.timing import time_in_turn
from melora_fx.folding.site_weight import changed_blocks

from .common.cases import Case, Row, run_apart, run_cases, timed_rows
from .common.models import build, fill
from .common.needs import why_missing
from .deployment.fold_sides import CONFIG, COPY, SIDES, base_config, lora, make_checkpoint


def run(options: Namespace) -> int:
    torch.set_num_threads(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    encoder = "Tiny" if options.quick else "MiniLM-L6"
    threads = f"{options.threads} threads"
    cases = [
        *(
            Case(
                f"memory, {str(dtype).removeprefix('torch.')}, {threads}", functools.partial(in_memory, dtype, options)
            )
            for dtype in (torch.float32, torch.bfloat16)
        ),
        Case(f"disk, bfloat16, {threads}", functools.partial(on_disk, options)),
        Case(
            f"onnx, float32, {threads}",
            functools.partial(in_graph, encoder, options),
            why_missing(encoder, options.cache),
        ),
    ]
    return run_cases(options, cases, settings=f"rounds {options.rounds}")


def rows_of(seconds: dict[str, list[float]], reference: str, num_bytes: dict[str, int], **facts: Any) -> list[Row]:
    """Returns one row per side, with the rate at which the side reads and writes its `num_bytes`, if it has any."""
    rows = timed_rows(seconds, reference, dict.fromkeys(seconds, facts))
    for row in rows:
        size = num_bytes.get(row["side"])
        row["gib_per_s"] = None if size is None else round(1e3 * size / row["median_ms"] / 2**30, 1)
    return rows


def in_memory(dtype: torch.dtype, options: Namespace, device: str = "cpu") -> list[Row]:
    torch.manual_seed(0)
    config = base_config(6, options.quick, 128)
    with torch.device(device):  # random weights are created there
        ours = LlamaModel(config).to(dtype)
        theirs = lora(LlamaModel(config).to(dtype))
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def prepare(name: str) -> Sequence[Any]:
        arguments: Sequence[Any] = ()
        if name.startswith("PEFT"):
            theirs.unmerge_adapter()
        else:
            if not melora_fx.sites(ours):
                fill(melora_fx.rewrite(ours, "all-linear", CONFIG))
            blocks = blocks_of(ours)
            arguments = (blocks, [block.clone() for block in blocks]) if name.startswith("copy") else (ours,)
        wait()
        return arguments

    def waiting(side: Callable[..., object]) -> Callable[..., None]:
        def run(*arguments: Any) -> None:
            side(*arguments)
            wait()

        return run

    sides: dict[str, Callable[..., object]] = {
        "PEFT merge_adapter": theirs.merge_adapter,
        "copy of the blocks": copy_blocks,
        "check_fold": melora_fx.check_fold,
        "folded, in and out": fold_and_unfold,
        "fold": melora_fx.fold,
    }
    actions = {name: waiting(side) for name, side in sides.items()}
    seconds = time_in_turn(actions, rounds=options.rounds, prepare=prepare)
    prepare("check_fold")
    num_bytes = 2 * sum(block.nbytes for block in blocks_of(ours))  # read and written
    facts = {"part": "memory", "dtype": str(dtype).removeprefix("torch."), "threads": options.threads}
    return rows_of(seconds, "PEFT merge_adapter", dict.fromkeys(("fold", "copy of the blocks"), num_bytes), **facts)


def blocks_of(model: nn.Module) -> list[torch.Tensor]:
    return [block for site in melora_fx.sites(model).values() for block in changed_blocks(site)]


@torch.no_grad()
def copy_blocks(blocks: Sequence[torch.Tensor], copies: Sequence[torch.Tensor]) -> None:
    for block, copy in zip(blocks, copies, strict=True):
        block.copy_(copy)


def fold_and_unfold(model: nn.Module) -> None:
    with melora_fx.folded(model):
        pass


def on_disk(options: Namespace) -> list[Row]:
    folder = options.folder / ("checkpoint-quick" if options.quick else "checkpoint")
    make_checkpoint(folder, options.quick)
    out = options.folder / "out"

    def prepare(name: str) -> tuple[Path, Path]:
        """Removes the last output, and waits until everything is written to disk."""
        shutil.rmtree(out, ignore_errors=True)
        os.sync()
        return folder, out

    seconds = time_in_turn(SIDES, rounds=options.rounds, prepare=prepare)
    size = sum(file.stat().st_size for file in (folder / "base").iterdir())
    facts = {"part": "disk", "dtype": "bfloat16", "threads": options.threads}
    rows = rows_of(seconds, COPY, dict.fromkeys(SIDES, 2 * size), **facts)
    for row in rows:
        row["peak_mib"] = run_apart("deployment.fold_sides", row["side"], *prepare(row["side"]), options.threads)
    shutil.rmtree(out)
    return rows


def in_graph(encoder: str, options: Namespace) -> list[Row]:
    folder = options.folder / encoder  # the graphs of two models must not share a folder
    base = build(encoder, "base", options.cache, "", 0, 0)
    ids = torch.arange(128).remainder(96).add(3).view(8, 16)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    exporters.export_onnx(base, inputs, folder / "base.onnx", verify=False)
    model = fill(melora_fx.rewrite(base, ["query", "key", "value", "dense"], CONFIG))
    shutil.rmtree(folder / "encoder-adapter", ignore_errors=True)
    melora_fx.save_adapter(model, folder / "encoder-adapter")
    sides = {
        "export_onnx": lambda: exporters.export_onnx(model, inputs, folder / "fresh.onnx", verify=False),
        "fold_onnx": lambda: exporters.fold_onnx(
            folder / "base.onnx", folder / "encoder-adapter", folder / "folded.onnx"
        ),
    }
    seconds = time_in_turn(sides, rounds=options.rounds)
    written = [next(folder.glob(f"{name}.onnx.*.data")).read_bytes() for name in ("fresh", "folded")]
    assert written[0] == written[1], "a fold and a new export write the same bits"
    return rows_of(seconds, "export_onnx", {}, part="onnx", dtype="float32", threads=options.threads)
