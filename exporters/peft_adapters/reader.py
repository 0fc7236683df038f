"""Adapter folders of PEFT as ours: LoRA and block-diagonal LoRA, and the files of the MELoRA authors' own code."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from exporters.adapters.find_blocks import as_described, in_blocks
from exporters.adapters.lora_form import Lora
from exporters.adapters.mlx_adapter import TENSORS_FILE as MLX_FILE
from exporters.adapters.mlx_adapter import read_mlx_folder
from melora_fx import MELoRAConfig, MELoRAError
from melora_fx.adapter.tensors import AdapterTensors
from melora_fx.files import refuse_source
from melora_fx.saving.adapter_file import write_adapter
from melora_fx.saving.fingerprint import fingerprint

from .authors_format import read_authors_sites
from .bdlora import packed_ranks, unpacked
from .folder import PeftFolder, read_folder
from .names import BASE_LAYER, METADATA_KEY, PREFIX
from .settings import PeftSettings, parse_settings
from .stacks import stack_at, unstacked

_BASE_WEIGHT = f"{BASE_LAYER}.weight"
"""Ends the name of an adapted module's own weight, which PEFT saves too where the module is one of embeddings."""
_LORA_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")


@dataclass
class Imported:
    """An adapter of somebody else's, taken apart.

    Attributes:
        sites: name → tensors.
        kept: names of modules that were trained whole.
        kept_tensors: their tensors.
        fan_in_fan_out: whether weights are stored as (I, O); None where it is not said.
        stacks: those of the sites that are stacks of experts.
        bases: fingerprints of base weights, where the file has these too.
        class_name: of the model, where it is said.
    """

    sites: dict[str, AdapterTensors]
    kept: list[str] = field(default_factory=list)
    kept_tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    fan_in_fan_out: bool = False
    stacks: list[str] = field(default_factory=list)
    bases: dict[str, dict[str, Any]] = field(default_factory=dict)
    class_name: str | None = None


def read_peft_adapter(peft_dir: str | os.PathLike[str], out_dir: str | os.PathLike[str]) -> None:
    """Writes a PEFT adapter folder as one of ours: it loads, trains, folds, exports and swaps like any other.

    What it reads: LoRA, with patterns of ranks and alphas, rank-stabilised, on nn.Linear, Conv1D and stacks of experts
    (`target_parameters`), block-diagonal LoRA, and trained modules (`modules_to_save`). An update whose values lie in
    blocks is stored in blocks; others have `num_blocks=1`. Adapters that the MELoRA authors' code has saved
    (`peft_type` "MELORA") keep their blocks. A folder of mlx_lm's (`adapters.safetensors`) is read too, where its names
    of modules are transformers'.

    Args:
        peft_dir: a folder with adapter_config.json and adapter_model.safetensors or adapter_model.bin.
        out_dir: the adapter folder to write.

    Raises:
        MELoRAError: for a folder that cannot be read or is not sound; for other methods, by name: DoRA, trained
            biases, embeddings, QALoRA and the like; for a place that cannot be written.
    """
    directory, out = Path(peft_dir), Path(out_dir)
    refuse_source(out, directory)
    write_adapter(out, *adapter_content(_take_apart(directory)))


def _take_apart(directory: Path) -> Imported:
    if (directory / MLX_FILE).exists():
        return _read_mlx(directory)
    folder = read_folder(directory)
    imported = _read_authors(folder) if folder.config.get("peft_type") == "MELORA" else _read_lora(folder)
    if not imported.sites:
        raise MELoRAError(f"`{directory}` adapts no module: it has no lora_A and lora_B")
    return imported


def adapter_content(imported: Imported) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and header of an adapter folder."""
    tensors = dict(imported.kept_tensors)
    entries: dict[str, Any] = {}
    for name, own in imported.sites.items():
        tensors |= own.named(name)
        config = own.config
        shape = [sum(own.part_sizes), config.num_blocks * own.lora_a.size(2)]
        is_stack = name in imported.stacks
        if is_stack:
            shape = [own.num_experts, *shape]
        elif imported.fan_in_fan_out:
            shape.reverse()
        dtype = str(own.lora_b.dtype).removeprefix("torch.")
        entries[name] = {
            "config": config.to_dict(),
            "base": imported.bases.get(name) or {"shape": shape, "dtype": dtype, "without_values": "imported"},
            "is_transposed": None if is_stack else imported.fan_in_fan_out,
        }
    model = {"class": imported.class_name} if imported.class_name else {}
    return tensors, {"sites": entries, "kept": imported.kept, "model": model}


def _read_lora(folder: PeftFolder) -> Imported:
    settings = parse_settings(folder.directory, folder.config)
    factors, others = _by_module(folder)
    described = _described(folder)
    imported = Imported({}, fan_in_fan_out=settings.fan_in_fan_out, class_name=settings.class_name)
    for path, (lora_a, lora_b) in factors.items():
        try:
            stack = stack_at(path, factors.keys(), settings.target_parameters)
            name = stack or path
            rank = settings.rank_of(name)
            loras = unstacked(lora_a, lora_b, rank) if stack else [_unpacked(name, lora_a, lora_b, settings)]
            if loras[0].rank != rank:
                raise ValueError(f"it has the rank {loras[0].rank}, its configuration says {rank}")
            own = _blocks_of(loras, name, settings, described.get(name))
        except ValueError as error:
            raise MELoRAError(f"`{path}` in `{folder.directory}`: {error}") from error
        imported.stacks += [name] if stack else []
        config = replace(own.config, dropout=0.0 if stack else settings.dropout)
        imported.sites[name] = AdapterTensors(config, own.lora_a, own.lora_b)
    imported.sites = dict(sorted(imported.sites.items()))
    for name in [name for name in others if name.removesuffix(_BASE_WEIGHT) in imported.sites]:
        imported.bases[name.removesuffix(_BASE_WEIGHT)] = fingerprint(others.pop(name))
    _add_kept(folder, imported, others, settings.modules_to_save)
    return imported


def _read_authors(folder: PeftFolder) -> Imported:
    sites, others = read_authors_sites(folder)
    modules = folder.config.get("modules_to_save") or []
    imported = Imported(sites, fan_in_fan_out=bool(folder.config.get("fan_in_fan_out")))
    _add_kept(folder, imported, others, tuple(map(str, modules)))
    return imported


def _read_mlx(directory: Path) -> Imported:
    """A folder of mlx_lm's, of models whose modules it calls as transformers does: Llama and its like."""
    sites = {}
    for name, found in read_mlx_folder(directory).items():
        if not found.lora_a.dim() == found.lora_b.dim() == 2:
            raise MELoRAError(f"`{directory}` adapts `{name}`, a stack of experts: of mlx_lm's, linears alone are read")
        own = in_blocks([Lora(found.lora_a, found.lora_b)], found.scale)
        config = MELoRAConfig(rank=found.lora_a.size(0), num_blocks=1, alpha=found.scale * found.lora_a.size(0))
        sites[name] = own or AdapterTensors(config, found.lora_a[None], found.lora_b[None])
    return Imported(sites)


def _by_module(folder: PeftFolder) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], dict[str, torch.Tensor]]:
    """A and B of each module, and all other tensors, by names without PEFT's prefix."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    others = {}
    for key, tensor in folder.tensors.items():
        match = _LORA_KEY.fullmatch(key.removeprefix(PREFIX))
        if match is None:
            others[key.removeprefix(PREFIX)] = tensor
            continue
        if tensor.dim() != 2 or not tensor.numel() or not tensor.is_floating_point():
            raise MELoRAError(
                f"`{key}` in `{folder.directory}` is {tensor.dtype} of shape {tuple(tensor.shape)}, not a matrix of "
                "floating point numbers: convolutions and embeddings are not adapted"
            )
        found.setdefault(match["module"], {})[match["factor"]] = tensor
    for module, factors in found.items():
        if factors.keys() != {"A", "B"}:
            raise MELoRAError(f"`{module}` in `{folder.directory}` has lora_{''.join(factors)} without the other")
        if factors["A"].dtype != factors["B"].dtype:
            raise MELoRAError(f"lora_A and lora_B of `{module}` in `{folder.directory}` have other dtypes")
    return {module: (factors["A"], factors["B"]) for module, factors in found.items()}, others


def _unpacked(name: str, lora_a: torch.Tensor, lora_b: torch.Tensor, settings: PeftSettings) -> Lora:
    """The LoRA of a module, of which a block-diagonal one stores one factor in blocks."""
    factor = settings.factor_of(name)
    if factor == "a" and lora_a.size(0) % settings.num_blocks == 0:
        lora_a = unpacked(lora_a, settings.num_blocks)
    if factor == "b" and lora_b.size(0) % settings.num_blocks == 0:
        lora_b = unpacked(lora_b, settings.num_blocks)
    if lora_a.size(0) != lora_b.size(1):
        raise ValueError(f"lora_A {tuple(lora_a.shape)} and lora_B {tuple(lora_b.shape)} are not of one rank")
    return Lora(lora_a, lora_b)


def _blocks_of(loras: list[Lora], name: str, settings: PeftSettings, described: MELoRAConfig | None) -> AdapterTensors:
    """The site: as it was before it was written for PEFT, or in the blocks that its values lie in, or in one."""
    scaling = settings.scaling_of(name)
    if described is not None and scaling == 1:
        is_packed = settings.factor_of(name) is not None
        block_rank = loras[0].rank // described.num_blocks
        order = (lambda own: packed_ranks(own, block_rank)) if is_packed else None
        if own := as_described(loras, described, order):
            return own
    if own := in_blocks(loras, scaling):
        return own
    config = MELoRAConfig(
        rank=loras[0].rank, num_blocks=1, alpha=settings.alpha_of(name), use_rslora=settings.use_rslora
    )
    lora_a = torch.stack([lora.lora_a for lora in loras])
    return AdapterTensors(config, lora_a, torch.stack([lora.lora_b for lora in loras]))


def _described(folder: PeftFolder) -> dict[str, MELoRAConfig]:
    """How `write_peft_adapter` says that the sites were cut; nothing where another wrote the file, or it is not so."""
    try:
        entries = json.loads(folder.metadata[METADATA_KEY])["blocks"]
        return {
            name: MELoRAConfig.from_dict(entry | {"alpha": entry["rank"], "dropout": 0.0})
            for name, entry in entries.items()
        }
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return {}


def _add_kept(
    folder: PeftFolder, imported: Imported, others: Mapping[str, torch.Tensor], modules: tuple[str, ...]
) -> None:
    """The modules that were trained whole: tensors whose path has one of their names in it.

    Raises:
        MELoRAError: for tensors that belong to none, and modules without tensors.
    """
    kept: dict[str, str] = {}
    for name, tensor in others.items():
        owner = next((found for module in modules if (found := _path_of(module, name))), None)
        if owner is None:
            raise MELoRAError(
                f"`{folder.directory}` holds `{name}`, which is neither a LoRA of a linear nor of `modules_to_save`: "
                "embeddings, magnitudes and biases are not read; merge the adapter with PEFT"
            )
        kept[owner] = name
        imported.kept_tensors[name] = tensor
    imported.kept = sorted(kept)


def _path_of(module: str, name: str) -> str | None:
    """The path at the beginning of a tensor's name that ends in the name, or the end of a path, `module`."""
    match = re.match(rf"((?:.+?\.)?{re.escape(module)})\.", name)
    return match[1] if match else None
