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
from melora_fx import MELoRAConfig, MELoRAError
from melora_fx.adapter.tensors import AdapterTensors
from melora_fx.files import refuse_source
from melora_fx.saving.adapter_file import write_adapter
from melora_fx.saving.fingerprint import fingerprint

from .authors_format import read_authors_sites
from .bdlora import packed_ranks, unpacked
from .folder import PeftFolder, read_folder
from .names import BASE_LAYER, METADATA_KEY, PREFIX, nested
from .settings import PeftSettings, parse_settings

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

    LoRA, with patterns of ranks and alphas, rank-stabilised, on nn.Linear, Conv1D and stacks of experts
    (`target_parameters`), block-diagonal LoRA, and trained modules (`modules_to_save`). An update whose values lie in
    blocks is stored in blocks; others have `num_blocks=1`. Adapters that the MELoRA authors' code has saved
    (`peft_type` "MELORA") keep their blocks.

    Args:
        peft_dir: a folder with adapter_config.json and adapter_model.safetensors or adapter_model.bin.
        out_dir: the adapter folder to write.

    Raises:
        MELoRAError: for a folder that cannot be read or is not sound; for other methods, by name: DoRA, trained
            biases, embeddings, QALoRA and the like; for a place that cannot be written.
    """
    directory, out = Path(peft_dir), Path(out_dir)
    refuse_source(out, directory)
    folder = read_folder(directory)
    imported = _read_authors(folder) if folder.config.get("peft_type") == "MELORA" else _read_lora(folder)
    if not imported.sites:
        raise MELoRAError(f"`{directory}` adapts no module: it has no lora_A and lora_B")
    write_adapter(out, *adapter_content(imported))


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
        stack = _stack_of(folder, path, settings, factors)
        name = stack or path
        rank = settings.rank_of(name)
        if stack:
            loras = _unstacked(folder, name, lora_a, lora_b, rank)
            imported.stacks.append(name)
        else:
            loras = [_unpacked(folder, name, lora_a, lora_b, settings)]
        if loras[0].rank != rank:
            raise MELoRAError(
                f"`{name}` in `{folder.directory}` has the rank {loras[0].rank}, its configuration says {rank}"
            )
        own = _blocks_of(loras, name, settings, described.get(name))
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


def _stack_of(folder: PeftFolder, path: str, settings: PeftSettings, factors: Mapping[str, Any]) -> str | None:
    """The path of the parameter that PEFT's wrapper at `path` is for; None for a module."""
    module = path
    while module.endswith(BASE_LAYER):
        module = module.removesuffix(BASE_LAYER)
    ends = [parameter.rpartition(".") for parameter in settings.target_parameters]
    names = sorted({name for owner, _, name in ends if not owner or module == owner or module.endswith(f".{owner}")})
    if not names:
        return None
    wrappers = [other for other in factors if re.fullmatch(rf"{re.escape(module)}({re.escape(BASE_LAYER)})*", other)]
    try:
        found = {key.wrapper: f"{module}.{key.parameter}" for key in nested(module, names)}
    except ValueError as error:
        raise MELoRAError(f"`{folder.directory}` cannot be read: {error}") from error
    if found.keys() != set(wrappers):
        raise MELoRAError(
            f"`{folder.directory}` has lora_A and lora_B of {sorted(wrappers)}, where its `target_parameters` ask for "
            f"{sorted(found)}"
        )
    return found[path]


def _unstacked(folder: PeftFolder, name: str, lora_a: torch.Tensor, lora_b: torch.Tensor, rank: int) -> list[Lora]:
    """The LoRAs of the experts: A is (E·r, I), B (O, r·E) with the experts side by side."""
    ranks = lora_a.size(0)
    if ranks % rank or lora_b.size(1) != ranks:
        raise MELoRAError(
            f"`{name}` in `{folder.directory}`: {tuple(lora_a.shape)} and {tuple(lora_b.shape)} are not of experts of "
            f"rank {rank}"
        )
    by_expert = lora_b.unflatten(1, (rank, ranks // rank)).unbind(2)
    return [Lora(a, b.contiguous()) for a, b in zip(lora_a.split(rank), by_expert, strict=True)]


def _unpacked(
    folder: PeftFolder, name: str, lora_a: torch.Tensor, lora_b: torch.Tensor, settings: PeftSettings
) -> Lora:
    """The LoRA of a module, of which a block-diagonal one stores one factor in blocks."""
    factor = settings.factor_of(name)
    if factor == "a" and lora_a.size(0) % settings.num_blocks == 0:
        lora_a = unpacked(lora_a, settings.num_blocks)
    if factor == "b" and lora_b.size(0) % settings.num_blocks == 0:
        lora_b = unpacked(lora_b, settings.num_blocks)
    if lora_a.size(0) != lora_b.size(1):
        raise MELoRAError(
            f"`{name}` in `{folder.directory}`: lora_A {tuple(lora_a.shape)} and lora_B {tuple(lora_b.shape)} are not "
            "of one rank"
        )
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
