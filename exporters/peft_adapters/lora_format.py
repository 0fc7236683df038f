"""Parses the files of PEFT's LoRA and block-diagonal LoRA."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from exporters.adapters.find_blocks import as_described, in_blocks
from exporters.adapters.lora_form import Lora
from melora_fx import MELoRAConfig, MELoRAError
from melora_fx.adapter.tensors import AdapterTensors
from melora_fx.names import without_wrappers
from melora_fx.saving.fingerprint import fingerprint

from .bdlora import packed_ranks, unpacked
from .folder import PeftFolder
from .imported import CONV1D, Imported
from .names import BASE_LAYER, METADATA_KEY, PREFIX, last_name
from .settings import PeftSettings, parse_settings
from .stacks import stack_at, unstacked

_BASE_WEIGHT = f"{BASE_LAYER}.weight"
"""The end of the name of an adapted module's base weight, which PEFT also saves for embeddings and heads."""
_LORA_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
_OLD_MIXTRAL = re.compile(r".*\.block_sparse_moe\.experts\.\d+\.w[123]")


def read_lora(folder: PeftFolder) -> Imported:
    """Returns the adapter in a folder.

    Raises:
        MELoRAError: if the folder is of another method, or its tensors do not fit together or the configuration.
    """
    settings = parse_settings(folder.directory, folder.config)
    factors, others = _by_module(folder)
    described = _described(folder)
    imported = Imported(folder.directory, fan_in_fan_out=settings.fan_in_fan_out, class_name=settings.class_name)
    for path in factors:
        try:
            _add_site(imported, path, factors, settings, described)
        except ValueError as error:
            raise MELoRAError(f"`{path}` in `{folder.directory}`: {error}") from error
    for name in [name for name in others if name.removesuffix(_BASE_WEIGHT) in imported.sites]:
        site = name.removesuffix(_BASE_WEIGHT)
        imported.bases[site] = fingerprint(others.pop(name))
        imported.transposed.setdefault(site, imported.bases[site]["shape"][-1] != imported.sites[site].in_features)
    imported.add_kept(others, settings.modules_to_save, with_tied=settings.ensure_weight_tying)
    return imported


def _add_site(
    imported: Imported,
    path: str,
    factors: Mapping[str, Lora],
    settings: PeftSettings,
    described: Mapping[str, Mapping[str, Any]],
) -> None:
    """Adds the site of the module, or of the wrapper around one, at `path`; raises ValueError if it cannot be read."""
    if _OLD_MIXTRAL.fullmatch(path):
        raise ValueError(
            "it adapts experts in the form of transformers 4: load it into its model with PEFT, which converts it, and "
            "save it again"
        )
    if path.endswith(f"{BASE_LAYER}.out_proj") or f"{path}{BASE_LAYER}.out_proj" in factors:
        raise ValueError("it adapts an nn.MultiheadAttention, which cannot be read: merge it into the base with PEFT")
    parameter = stack_at(path, factors.keys(), settings.target_parameters)
    name = parameter or path
    rank = settings.rank_of(name)
    loras = unstacked(*factors[path].factors, rank) if parameter else [_unpacked(name, factors[path], settings)]
    if loras[0].rank != rank:
        raise ValueError(
            f"it has rank {loras[0].rank}, but its configuration says {rank}: PEFT would not load it either"
        )
    is_transposed = described.get(name, {}).get("is_transposed")
    site = name.removesuffix(".weight")
    if parameter and len(loras) > 1:
        imported.stacks.add(site)
    elif parameter:
        loras = [_of_parameter(loras[0], parameter, is_transposed)]
        imported.parameters |= {} if site != parameter else {site: last_name(site)}
    if settings.is_negative(name):
        loras = [Lora(lora.lora_a, -lora.lora_b) for lora in loras]
    own = _blocks_of(loras, name, settings, described.get(name, {}))
    if isinstance(is_transposed, bool):
        imported.transposed[site] = is_transposed
    config = replace(own.config, dropout=0.0 if parameter else settings.dropout)
    imported.sites[site] = AdapterTensors(config, own.lora_a, own.lora_b)


def _of_parameter(lora: Lora, path: str, is_transposed: bool | None) -> Lora:
    """Returns the LoRA of a matrix that PEFT adapts as a parameter; PEFT treats the rows of a parameter as outputs.

    Raises:
        ValueError: if the rows may be inputs, which only its model can tell.
    """
    owner, _, name = path.rpartition(".")
    if is_transposed is None and (name != "weight" or last_name(owner) in CONV1D):
        raise ValueError("it is adapted as a parameter whose rows may be inputs or outputs: adapt its module instead")
    return Lora(lora.lora_b.T.contiguous(), lora.lora_a.T.contiguous()) if is_transposed else lora


def _by_module(folder: PeftFolder) -> tuple[dict[str, Lora], dict[str, torch.Tensor]]:
    """Returns A and B of each module, and all other tensors, by names without PEFT's prefix."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    others = {}
    names = [without_wrappers(key).removeprefix(PREFIX) for key in folder.tensors]
    if len(set(names)) < len(names):
        raise MELoRAError(f"`{folder.directory}` contains a tensor twice, with and without the prefix `{PREFIX}`")
    for name, tensor in zip(names, folder.tensors.values(), strict=True):
        match = _LORA_KEY.fullmatch(name)
        if match is None:
            others[name] = tensor
            continue
        if tensor.dim() != 2 or not tensor.numel() or not tensor.is_floating_point():
            raise MELoRAError(
                f"`{name}` in `{folder.directory}` is {tensor.dtype} of shape {tuple(tensor.shape)}, not a matrix of "
                "floating point numbers: convolutions and embeddings are not adapted"
            )
        found.setdefault(match["module"], {})[match["factor"]] = tensor
    for module, factors in found.items():
        if factors.keys() != {"A", "B"}:
            raise MELoRAError(
                f"`{module}` in `{folder.directory}` has only lora_{''.join(factors)}, not both factors: save it "
                "with PEFT again"
            )
    return {module: _promoted(factors["A"], factors["B"]) for module, factors in found.items()}, others


def _promoted(lora_a: torch.Tensor, lora_b: torch.Tensor) -> Lora:
    """Returns A and B in a dtype that can represent both."""
    dtype = torch.promote_types(lora_a.dtype, lora_b.dtype)
    return Lora(lora_a.to(dtype), lora_b.to(dtype))


def _unpacked(name: str, lora: Lora, settings: PeftSettings) -> Lora:
    """Returns the LoRA of a module as whole matrices; a block-diagonal LoRA stores one factor in blocks."""
    lora_a, lora_b = lora.factors
    factor = settings.factor_of(name)
    rows = {"a": lora_a.size(0), "b": lora_b.size(0)}
    if factor and rows[factor] % settings.num_blocks:
        raise ValueError(f"its {rows[factor]} rows cannot form {settings.num_blocks} blocks, as `use_bdlora` says")
    if factor == "a":
        lora_a = unpacked(lora_a, settings.num_blocks)
    if factor == "b":
        lora_b = unpacked(lora_b, settings.num_blocks)
    if lora_a.size(0) != lora_b.size(1):
        raise ValueError(f"lora_A {tuple(lora_a.shape)} and lora_B {tuple(lora_b.shape)} have different ranks")
    return Lora(lora_a, lora_b)


def _blocks_of(loras: list[Lora], name: str, settings: PeftSettings, described: Mapping[str, Any]) -> AdapterTensors:
    """Returns the site in the blocks from which we wrote it, else in those in which its values lie, else in one."""
    scaling = settings.scaling_of(name)
    before = _config_of(described)
    if before is not None and scaling == 1:
        is_packed = settings.factor_of(name) is not None
        block_rank = loras[0].rank // before.num_blocks
        order = (lambda own: packed_ranks(own, block_rank)) if is_packed else None
        if own := as_described(loras, before, order):
            return own
    if own := in_blocks(loras, scaling):
        return own
    config = MELoRAConfig(
        rank=loras[0].rank, num_blocks=1, alpha=settings.alpha_of(name), use_rslora=settings.use_rslora
    )
    lora_a = torch.stack([lora.lora_a for lora in loras])
    return AdapterTensors(config, lora_a, torch.stack([lora.lora_b for lora in loras]))


def _described(folder: PeftFolder) -> Mapping[str, Mapping[str, Any]]:
    """Maps each site to its blocks and orientation as `write_peft_adapter` stores them; empty for other files."""
    try:
        entries = json.loads(folder.metadata[METADATA_KEY])["sites"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return (
        {name: entry for name, entry in entries.items() if isinstance(entry, dict)} if isinstance(entries, dict) else {}
    )


def _config_of(described: Mapping[str, Any]) -> MELoRAConfig | None:
    """Returns the described configuration with scalings of 1, or None if the description is invalid."""
    try:
        rank = described["rank"]
        fields = {"rank": rank, "alpha": rank, "num_blocks": described["num_blocks"], "split": described["split"]}
        return MELoRAConfig.from_dict(fields)
    except (KeyError, TypeError, ValueError):
        return None
