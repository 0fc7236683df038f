"""`save_adapter`, and what of a model belongs to its adapter."""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from melora_fx.errors import MELoRAError
from melora_fx.names import join_path, unwrap, without_wrappers
from melora_fx.rewriting.module import class_name
from melora_fx.rewriting.rewrite_state import REWRITE_STATE_ATTRIBUTE
from melora_fx.rewriting.sites import AdapterSite, refuse_folded, require_sites, resized, sites, warn_of_lost_sites

from .adapter_file import Adapter, write_adapter
from .fingerprint import fingerprint


def save_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Writes the adapters of `model`, and the modules kept trainable, to a folder; made where there is none.

    A crash leaves the old files or the new ones.

    Raises:
        MELoRAError: for a plain model, or a folder that cannot be written.
    """
    found = require_sites(model, "save_adapter")
    warn_of_lost_sites(model, found)
    lines = [f"`{name}`: {reason}" for name, site in found.items() if (reason := resized(site))]
    if lines:
        raise MELoRAError("cannot save:\n" + "\n".join(lines))
    refuse_folded(model, "save_adapter")
    model_facts = {
        "class": class_name(model),
        "num_labels": getattr(getattr(model, "config", None), "num_labels", None),
    }
    entries = site_entries(found)
    unread = [f"`{name}`" for name, entry in entries.items() if "values" not in entry["base"]]
    if unread:
        warnings.warn(
            f"the base weights of {len(unread)} sites are quantised or on meta ({', '.join(unread[:3])}, …): the "
            "adapter records their shapes alone, and will load onto any base of these",
            stacklevel=2,
        )
    header = {"sites": entries, "kept": list(kept_modules(model)), "model": model_facts}
    write_adapter(Path(directory), adapter_tensors(model), header)


def site_entries(found: Mapping[str, AdapterSite]) -> dict[str, Any]:
    """What files say of each site, as JSON-ready values: its configuration, and its base weight's fingerprint and
    orientation.
    """
    return {
        name: {
            "config": site.config.to_dict(),
            "base": fingerprint(site.weight),
            "is_transposed": site.weight_is_transposed,
        }
        for name, site in found.items()
    }


def adapter_of(model: nn.Module) -> Adapter:
    """The adapter of a rewritten model as if it had been saved and read; base weights are not checked."""
    configs = {name: site.config for name, site in sites(model).items()}
    return Adapter(Path(), configs, {}, {}, kept_modules(model), {}, adapter_tensors(model))


def adapter_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What an adapter folder of `model` holds: `<site>.lora_a`, `<site>.lora_b`, and the modules kept trainable.

    Cut to the largest rank of each site's configuration: an adapter that was loaded into a larger one is as it was.
    """
    tensors = _kept_tensors(model, kept_modules(model))
    for name, site in sites(model).items():
        rank, num_parts = max(site.config.ranks), len(site.config.parts(site.out_features))
        tensors[f"{name}.lora_a"] = site.lora_a.detach().unflatten(1, (num_parts, -1))[:, :, :rank].flatten(1, 2)
        tensors[f"{name}.lora_b"] = site.lora_b.detach()[:, :, :rank]
        if site.lora_b.detach()[:, :, rank:].any():
            raise MELoRAError(
                f"`{name}` holds values beyond its rank {rank}: an optimizer that remembers the larger adapter from "
                "before `load_adapter` has written there; make a new optimizer after loading"
            )
    return tensors


def tensors_by_name(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's own tensors under the names of its `state_dict`, without those of wrappers."""
    return {without_wrappers(name): tensor for name, tensor in unwrap(model).state_dict(keep_vars=True).items()}


def kept_modules(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules that were kept trainable."""
    names: list[str] = []
    for path, module in unwrap(model).named_modules():
        state = module.__dict__.get(REWRITE_STATE_ATTRIBUTE)
        if state is not None:
            names += [without_wrappers(join_path(path, name)) for name in state.kept]
    return tuple(names)


def kept_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the tensors of the modules that were kept trainable."""
    return tuple(_kept_tensors(model, kept_modules(model)))


def _kept_tensors(model: nn.Module, kept: tuple[str, ...]) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for name, tensor in tensors_by_name(model).items()
        if any(name.startswith(f"{module}.") for module in kept)
    }
