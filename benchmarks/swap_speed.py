"""How long does it take to load another adapter into a rewritten model, and to read and write adapter files?

* swap: two adapters in turn. Ours: `load_adapter` with 8 blocks of rank 8, and with one block of rank 64, whose files
  are as large as PEFT's. PEFT's, of rank 64: `hotswap_adapter`; `load_adapter` and `set_adapter` of an adapter that is
  not loaded yet; `set_adapter` between two adapters in memory. The updates are equal, and so are the models' outputs.
* file: `save_adapter`, which checks, hashes and flushes, compared with safetensors' `save_file` of the same tensors,
  with and without a flush; `read_adapter`, which checks and copies, compared with `load_file`, which maps the file,
  with and without a copy of the values. The model is random; the files are in the page cache.

All sides are timed in turn in one process with one thread. Writes swap_speed.csv.
"""

import copy
import functools
import itertools
import os
import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel

import melora_fx
from exporters.measuring.timing import time_in_turn
from melora_fx import MELoRAConfig
from melora_fx.saving.adapter_file import TENSORS_FILE, read_adapter

from .common.cases import Case, Row, run_cases, timed_rows
from .common.models import copy_into_lora, equal_lora, fill, load_smollm2, minilm_folder
from .common.needs import why_missing
from .common.random_models import SHAPES, SMALL, random_model

BLOCKS = MELoRAConfig(rank=8, num_blocks=8)
ONE_BLOCK = MELoRAConfig(rank=64, num_blocks=1, alpha=64.0)
QUERY_VALUE = {"MiniLM-L6": ["query", "value"], "SmolLM2-135M": ["q_proj", "v_proj"]}
SHAPED = {"MiniLM-L6": "MiniLM-shaped", "SmolLM2-135M": "SmolLM2-shaped"}
FILES = {"0.3 MB": ("MiniLM-shaped", BLOCKS), "49 MB": ("SmolLM2-shaped", MELoRAConfig(rank=40, num_blocks=1))}
TOKENS = torch.arange(3, 19).view(1, 16)


def run(options: Namespace) -> int:
    torch.set_num_threads(1)
    cases = [
        Case(
            f"swap, {model}, {name}",
            functools.partial(measure_swap, model, targets, options),
            "" if options.quick else why_missing(model, options.cache),
        )
        for model, query_value in QUERY_VALUE.items()
        for name, targets in (("q,v", query_value), ("all-linear", "all-linear"))
    ]
    cases += [
        Case(f"file, {size}", functools.partial(measure_file, shape, config, options))
        for size, (shape, config) in FILES.items()
    ]
    return run_cases(options, cases, settings=f"rounds {options.rounds}")


def measure_swap(name: str, targets: Any, options: Namespace) -> list[Row]:
    base = load_model(name, options.quick)
    blocks, one_block = (melora_fx.rewrite(copy.deepcopy(base), targets, each) for each in (BLOCKS, ONE_BLOCK))
    sites = melora_fx.sites(blocks)
    theirs: Any = peft.get_peft_model(copy.deepcopy(base), equal_lora(sites))  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory(prefix="melora-swap-") as made:
        folders = [Path(made, number) for number in ("first", "second")]
        for folder in folders:
            save_equal(blocks, one_block, theirs, folder)
        holding = copy.deepcopy(theirs)  # two adapters in memory
        holding.load_adapter(folders[0] / "peft", "other", torch_device="cpu")
        loading = copy.deepcopy(theirs)
        sides: dict[str, Callable[[Path], object]] = {
            "load_adapter": lambda folder: melora_fx.load_adapter(blocks, folder / "blocks"),
            "load_adapter, one block": lambda folder: melora_fx.load_adapter(one_block, folder / "one_block"),
            "PEFT hotswap_adapter": lambda folder: hotswap_adapter(theirs, str(folder / "peft"), "default", "cpu"),
            "PEFT load_adapter": lambda folder: load_another(loading, folder / "peft"),
            "PEFT set_adapter": lambda folder: holding.set_adapter("other" if folder is folders[0] else "default"),
        }
        turns = {side: itertools.cycle(folders) for side in sides}

        def prepare(side: str) -> Sequence[Path]:
            if side == "PEFT load_adapter" and "other" in loading.peft_config:
                loading.set_adapter("default")
                loading.delete_adapter("other")
            return [next(turns[side])]

        for folder in folders:
            for side in sides:
                sides[side](*prepare(side))
            refuse_different([blocks, one_block, theirs, loading, holding], folder)
        seconds = time_in_turn(sides, rounds=options.rounds, prepare=prepare)
        facts = {side: {"num_sites": len(sites)} for side in sides}
        for side, kind in zip(sides, ("blocks", "one_block", "peft", "peft"), strict=False):
            facts[side]["file_mb"] = round(size_of(folders[0] / kind) / 1e6, 2)
    return timed_rows(seconds, "PEFT hotswap_adapter", facts)


def load_model(name: str, quick: bool) -> nn.Module:
    """Returns a model without a head, in evaluation mode; with `quick`, a small random one of the same architecture."""
    if quick:
        return random_model(SHAPES[SHAPED[name] + SMALL])
    if name == "MiniLM-L6":
        return AutoModel.from_pretrained(minilm_folder()).eval()
    return load_smollm2()[0].get_submodule("model").eval()


@torch.no_grad()
def save_equal(blocks: nn.Module, one_block: nn.Module, theirs: Any, folder: Path) -> None:
    """Saves the same random updates as three adapters: of 8 blocks, of one block, and PEFT's LoRA."""
    melora_fx.save_adapter(fill(blocks), folder / "blocks")
    inner = theirs.base_model.model
    copy_into_lora(melora_fx.sites(blocks), inner)
    theirs.save_pretrained(str(folder / "peft"))
    for name, site in melora_fx.sites(one_block).items():
        layer = inner.get_submodule(name)
        site.lora_a.copy_(layer.lora_A["default"].weight[None])
        site.lora_b.copy_(layer.lora_B["default"].weight[None])
    melora_fx.save_adapter(one_block, folder / "one_block")


def load_another(model: Any, folder: Path) -> None:
    model.load_adapter(str(folder), "other", torch_device="cpu")
    model.set_adapter("other")


@torch.no_grad()
def refuse_different(models: Sequence[nn.Module], folder: Path) -> None:
    """Raises AssertionError if the outputs of the models differ."""
    first, *others = (model(TOKENS)[0] for model in models)
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-3, atol=1e-3, msg=f"after the swap to {folder}")


def size_of(folder: Path) -> int:
    """Returns the bytes of the file with the tensors."""
    return next(folder.glob("*.safetensors")).stat().st_size


def measure_file(shape: str, config: MELoRAConfig, options: Namespace) -> list[Row]:
    model = random_model(SHAPES[shape + SMALL if options.quick else shape])
    fill(melora_fx.rewrite(model, list(SHAPES[shape].query_value) if config is BLOCKS else "all-linear", config))
    with tempfile.TemporaryDirectory(prefix="melora-file-") as made:
        folder, plain = Path(made, "ours"), Path(made, "plain.safetensors")
        melora_fx.save_adapter(model, folder)
        tensors = read_adapter(folder).tensors
        writes: dict[str, Callable[[], object]] = {
            "save_adapter": lambda: melora_fx.save_adapter(model, folder),
            "save_file": lambda: save_file(tensors, plain),
            "save_file, flushed": lambda: save_flushed(tensors, plain),
        }
        reads: dict[str, Callable[[], object]] = {
            "read_adapter": lambda: read_adapter(folder),
            "load_file": lambda: load_file(folder / TENSORS_FILE),
            "load_file, copied": lambda: [tensor.clone() for tensor in load_file(folder / TENSORS_FILE).values()],
        }
        seconds = time_in_turn(writes, rounds=options.rounds)
        rows = timed_rows(seconds, "save_file, flushed", {})
        rows += timed_rows(time_in_turn(reads, rounds=options.rounds), "load_file, copied", {})
        size = size_of(folder) / 1e6
    for row in rows:
        row |= {
            "num_sites": len(melora_fx.sites(model)),
            "file_mb": round(size, 2),
            "mb_per_s": round(1e3 * size / row["median_ms"]),
        }
    return rows


def save_flushed(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file(tensors, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
