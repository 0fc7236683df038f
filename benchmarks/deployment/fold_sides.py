"""The ways to merge an adapter into a checkpoint that fold_speed times, and the adapters of both projects.

As a script, runs one of the ways once and prints its peak memory in MiB above the memory in use after the imports.
"""

import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import melora_fx
from benchmarks.common.models import fill
from benchmarks.common.random_models import llama_config
from benchmarks.training.step_cost import resident_kib
from melora_fx import MELoRAConfig

CONFIG = MELoRAConfig(rank=8, num_blocks=8, alpha=16.0)


def base_config(layers: int, quick: bool, vocab_size: int) -> LlamaConfig:
    """Returns the configuration of a Llama with `layers` layers, or with two small ones if `quick`."""
    if quick:
        return llama_config(128, 256, 2, 4, num_key_value_heads=2, vocab_size=vocab_size)
    return llama_config(2048, 5632, layers, 32, num_key_value_heads=4, vocab_size=vocab_size)


def lora(model: nn.Module) -> Any:
    """Returns `model` with PEFT's LoRA of equal rank on every linear."""
    config = peft.LoraConfig(r=CONFIG.total_rank, lora_alpha=2 * CONFIG.total_rank, target_modules="all-linear")
    return fill(peft.get_peft_model(model, config))  # type: ignore[arg-type]


def make_checkpoint(folder: Path, quick: bool) -> None:
    """Writes a base and an adapter of each kind for it; `folder` appears when it is complete."""
    if folder.exists():
        return
    staging = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    torch.manual_seed(0)
    model = LlamaForCausalLM(base_config(22, quick, 32000)).to(torch.bfloat16)
    model.save_pretrained(staging / "base", max_shard_size="1GB")
    fill(melora_fx.rewrite(model, "all-linear", CONFIG))
    melora_fx.save_adapter(model, staging / "adapter")
    lora(melora_fx.fold(model)).save_pretrained(staging / "peft")
    staging.rename(folder)


def copy_by_cp(folder: Path, out: Path) -> None:
    subprocess.run(["cp", "-r", str(folder / "base"), str(out)], check=True)


def copy_by_shutil(folder: Path, out: Path) -> None:
    shutil.copytree(folder / "base", out)


def fold_by_command(folder: Path, out: Path) -> None:
    """Runs the whole command, including its imports."""
    command = [sys.executable, "-c", "from exporters.cli.commands import main; main()", "fold"]
    arguments = [str(folder / "base"), str(folder / "adapter"), "-o", str(out)]
    subprocess.run([*command, *arguments], check=True, capture_output=True)


def fold_on_disk(folder: Path, out: Path) -> None:
    melora_fx.fold_checkpoint(folder / "base", folder / "adapter", out)


def rewrite_tensors(folder: Path, out: Path) -> None:
    out.mkdir()
    for file in sorted((folder / "base").glob("*.safetensors")):
        save_file({key: tensor.clone() for key, tensor in load_file(file).items()}, out / file.name)


def merge_by_peft(folder: Path, out: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    merged = peft.PeftModel.from_pretrained(model, folder / "peft").merge_and_unload()
    merged.save_pretrained(out, max_shard_size="1GB")


COPY = "cp -r"
SIDES: dict[str, Callable[[Path, Path], None]] = {
    COPY: copy_by_cp,
    "shutil.copytree": copy_by_shutil,
    "fold_checkpoint": fold_on_disk,
    "melora-fx fold": fold_by_command,
    "every tensor through safetensors": rewrite_tensors,
    "PEFT: load, merge_and_unload, save": merge_by_peft,
}

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    _side, _folder, _out, _threads = sys.argv[1:]
    torch.set_num_threads(int(_threads))
    _before = resident_kib("VmRSS")
    SIDES[_side](Path(_folder), Path(_out))
    print((resident_kib("VmHWM") - _before) // 1024)
