"""The ways to merge an adapter into a folder that benchmarks/fold_speed.py times, and the adapters of both projects."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import melora_fx
from melora_fx import MELoRAConfig

CONFIG = MELoRAConfig(rank=8, num_blocks=8, alpha=16.0)
SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}


def fill(model: nn.Module, part: str) -> None:
    """Small random values in every B, which starts at zero."""
    for name, parameter in model.named_parameters():
        if part in name:
            nn.init.normal_(parameter, std=0.01)


def lora(model: nn.Module) -> Any:
    """`model` with PEFT's LoRA of equal rank on every linear."""
    config = peft.LoraConfig(r=CONFIG.total_rank, lora_alpha=2 * CONFIG.total_rank, target_modules="all-linear")
    wrapped = peft.get_peft_model(model, config)  # type: ignore[arg-type]
    fill(wrapped, "lora_B")
    return wrapped


def make_checkpoint(folder: Path) -> None:
    """A base, and an adapter for it of each kind."""
    if (folder / "peft").exists():
        return
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=22, vocab_size=32000, **SHAPE)).to(torch.bfloat16)
    model.save_pretrained(folder / "base", max_shard_size="1GB")
    melora_fx.rewrite(model, "all-linear", CONFIG)
    fill(model, "lora_b")
    melora_fx.save_adapter(model, folder / "adapter")
    lora(melora_fx.fold(model)).save_pretrained(folder / "peft")


def copy_folder(folder: Path, out: Path) -> None:
    shutil.copytree(folder / "base", out)


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


SIDES: dict[str, Callable[[Path, Path], None]] = {
    "copy of the folder": copy_folder,
    "fold_checkpoint": fold_on_disk,
    "every tensor through safetensors": rewrite_tensors,
    "PEFT: load, merge_and_unload, save": merge_by_peft,
}
