"""Saves and loads the adapters of a model."""

import dataclasses
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from melora_fx.adapter.tensors import num_matrices, scaling_tensor
from melora_fx.capture.modules import join_path, without_wrappers
from melora_fx.capture.packed import is_packed_linear, packed_weight
from melora_fx.config import MELoRAConfig
from melora_fx.errors import MELoRAError
from melora_fx.matching.plan import ExampleInputs
from melora_fx.matching.targets import nearest
from melora_fx.rewriting.module import class_name, unwrap
from melora_fx.rewriting.rewrite import STATE, rewrite
from melora_fx.rewriting.sites import AdapterSite, refuse_folded, require_sites, resized, sites, warn_of_lost_sites

from .adapter_file import Adapter, fingerprint, fingerprint_misfit, read_adapter, write_adapter


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
    header = {"sites": entries, "kept": list(_kept_modules(model)), "model": model_facts}
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
    return Adapter(Path(), configs, {}, {}, _kept_modules(model), {}, adapter_tensors(model))


def adapter_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What an adapter folder of `model` holds: `<site>.lora_a`, `<site>.lora_b`, and the modules kept trainable.

    Cut to the largest rank of each site's configuration: an adapter that was loaded into a larger one is as it was.
    """
    tensors = _kept_tensors(model, _kept_modules(model))
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


def load_adapter(
    model: nn.Module, directory: str | os.PathLike[str], *, example_inputs: ExampleInputs | None = None
) -> nn.Module:
    """The model with the adapter of a folder.

    A plain model is rewritten as the adapter says; in a rewritten one values and scaling are exchanged in place,
    without a recompile: smaller ranks are padded with zeros.

    Args:
        model: a plain or a rewritten model.
        directory: a folder written by `save_adapter`.
        example_inputs: as in `rewrite`, for a plain model.

    Raises:
        MELoRAError: for a folder that cannot be read, an adapter of another model (each key is named) or with another
            base weight, or one whose blocks or ranks do not fit a rewritten model; nothing is changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be an nn.Module, got {type(model).__name__}: `rewrite` gives one")
    adapter = read_adapter(directory)
    refuse_folded(model, "load_adapter")
    if not sites(model):
        return _load_into_plain(model, adapter, example_inputs)
    _load_into_rewritten(model, adapter)
    return model


def _load_into_plain(model: nn.Module, adapter: Adapter, example_inputs: ExampleInputs | None) -> nn.Module:
    plain = _plain_weights(model)
    unknown = [name for name in adapter.configs if name not in plain]
    if unknown:
        raise _another_model(adapter, unknown, list(plain))
    check_shapes(adapter, plain)
    check_fingerprints(adapter, {name: fingerprint(plain[name]) for name in adapter.configs})
    _check_kept(adapter, model)
    targets: dict[str, MELoRAConfig | None] = {
        f"re:{re.escape(n)}": _for_any_base(c) for n, c in adapter.configs.items()
    }
    rewritten = rewrite(
        model, targets, example_inputs=example_inputs, keep_trainable=[f"re:{re.escape(name)}" for name in adapter.kept]
    )
    _copy_values(rewritten, adapter)
    return rewritten


def _for_any_base(config: MELoRAConfig) -> MELoRAConfig:
    """The configuration for a base of any dtype: "auto" chooses the lowering "weight" where it can be."""
    return dataclasses.replace(config, lowering="auto") if config.lowering == "weight" else config


def _load_into_rewritten(model: nn.Module, adapter: Adapter) -> None:
    found = sites(model)
    wrong = [name for name in adapter.configs if name not in found]
    if wrong:
        raise _another_model(adapter, wrong, list(found))
    absent = [name for name in found if name not in adapter.configs]
    if absent:
        raise MELoRAError(f"`{adapter.directory}` has nothing for these sites of the model: {', '.join(absent)}")
    for name, site in found.items():
        config, saved = site.config, adapter.configs[name]
        for key in ("num_blocks", "split"):
            if getattr(config, key) != getattr(saved, key):
                raise MELoRAError(
                    f"`{name}`: the adapter's `{key}` (={getattr(saved, key)}) is not the model's "
                    f"(={getattr(config, key)}): `fold` or rebuild the model, then load into the plain one"
                )
        if max(saved.ranks) > site.lora_b.size(2):
            raise MELoRAError(
                f"`{name}`: the adapter's rank {max(saved.ranks)} is above the {site.lora_b.size(2)} that the model "
                "was rewritten with: load into a plain model"
            )
    kept, saved_kept = set(kept_names(model)), set(adapter.kept_tensors())
    if kept != saved_kept:
        raise MELoRAError(
            f"`{adapter.directory}` keeps {sorted(saved_kept - kept) or 'nothing'} trainable that the model does not, "
            f"and lacks {sorted(kept - saved_kept) or 'nothing'}: one head would stay where another belongs"
        )
    weights = {name: site.weight for name, site in found.items()}
    check_shapes(adapter, weights)
    check_fingerprints(adapter, {name: fingerprint(weight) for name, weight in weights.items()})
    _check_kept(adapter, model)
    _copy_values(model, adapter)


def _copy_values(model: nn.Module, adapter: Adapter) -> None:
    with torch.no_grad():
        for name, site in sites(model).items():
            _copy_site(
                site, adapter.configs[name], adapter.tensors[f"{name}.lora_a"], adapter.tensors[f"{name}.lora_b"]
            )
        own = tensors_by_name(model)
        for name, tensor in adapter.kept_tensors().items():
            own[name].copy_(tensor)


def _copy_site(site: AdapterSite, config: MELoRAConfig, lora_a: torch.Tensor, lora_b: torch.Tensor) -> None:
    rank, num_parts = lora_b.size(2), len(config.parts(site.out_features))
    site.lora_a.zero_().unflatten(1, (num_parts, -1))[:, :, :rank].copy_(lora_a.unflatten(1, (num_parts, -1)))
    site.lora_b.zero_()[:, :, :rank].copy_(lora_b)
    site.scaling.copy_(scaling_tensor(config, site.scaling))
    dropout = getattr(site.owner, site.record.attribute("lora_dropout"), None)
    if dropout is not None:
        dropout.p = config.dropout
    else:  # the graph has no dropout node, and values are exchanged without touching it
        config = dataclasses.replace(config, dropout=0.0)
    site.record.config = dataclasses.replace(config, lowering=site.config.lowering)


def check_fingerprints(adapter: Adapter, actual: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises MELoRAError where a base weight is not the one that the adapter was trained on.

    Args:
        adapter: the adapter.
        actual: site → fingerprint of the weight that is there.
    """
    lines = []
    for name, expected in adapter.fingerprints.items():
        if reason := fingerprint_misfit(actual[name], expected):
            lines.append(f"`{name}`: {reason}")
    if lines:
        raise MELoRAError(f"`{adapter.directory}` was trained on another base model:\n" + "\n".join(lines))


def check_shapes(adapter: Adapter, weights: Mapping[str, torch.Tensor]) -> None:
    """Raises MELoRAError where a base weight, by its site's name, has not the shape that the adapter is for."""
    lines = []
    for name, config in adapter.configs.items():
        shapes = [tuple(adapter.tensors[f"{name}.{kind}"].shape) for kind in ("lora_a", "lora_b")]
        (rows, columns), number = weights[name].shape[-2:], num_matrices(weights[name])
        fitting = [config.adapter_shapes(rows, columns, number), config.adapter_shapes(columns, rows, number)]
        if tuple(shapes) not in fitting:
            lines.append(
                f"`{name}`: lora_a is {shapes[0]} and lora_b {shapes[1]}, which does not fit a weight of shape "
                f"{tuple(weights[name].shape)} and the adapter's own configuration {config}"
            )
    if lines:
        raise MELoRAError(f"`{adapter.directory}` does not fit the model:\n" + "\n".join(lines))


def _check_kept(adapter: Adapter, model: nn.Module) -> None:
    own = tensors_by_name(model)
    lines = []
    for name, tensor in adapter.kept_tensors().items():
        if name not in own:
            lines.append(f"`{name}`: the model has no such tensor")
        elif own[name].shape != tensor.shape:
            lines.append(f"`{name}`: saved as {tuple(tensor.shape)}, the model's is {tuple(own[name].shape)}")
    if lines:
        raise MELoRAError(f"the trained modules of `{adapter.directory}` do not fit the model:\n" + "\n".join(lines))


def _another_model(adapter: Adapter, wrong: list[str], known: list[str]) -> MELoRAError:
    lines = [f"`{name}`; nearest: {nearest(name, known)}" for name in wrong]
    return MELoRAError(
        f"`{adapter.directory}` is for another model; it has sites that this one lacks:\n" + "\n".join(lines)
    )


def _plain_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every matrix, and stack of matrices, of the model by the name that a site on it would have."""
    return {
        without_wrappers(name).removesuffix(".weight"): parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.dim() in (2, 3)
    } | {
        without_wrappers(name): packed_weight(module)
        for name, module in model.named_modules()
        if is_packed_linear(module)
    }


def tensors_by_name(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's own tensors under the names of its `state_dict`, without those of wrappers."""
    return {without_wrappers(name): tensor for name, tensor in unwrap(model).state_dict(keep_vars=True).items()}


def _kept_modules(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules that were kept trainable."""
    names: list[str] = []
    for path, module in unwrap(model).named_modules():
        state = module.__dict__.get(STATE)
        if state is not None:
            names += [without_wrappers(join_path(path, name)) for name in state.kept]
    return tuple(names)


def kept_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the tensors of the modules that were kept trainable."""
    return tuple(_kept_tensors(model, _kept_modules(model)))


def _kept_tensors(model: nn.Module, kept: tuple[str, ...]) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for name, tensor in tensors_by_name(model).items()
        if any(name.startswith(f"{module}.") for module in kept)
    }
