"""`load_adapter`: rewrites a plain model, or exchanges the values of a rewritten one, after all checks."""

import dataclasses
import os
import re
from collections.abc import Mapping

import torch
from torch import nn

from melora_fx.adapter.tensors import DROPOUT, AdapterTensors
from melora_fx.capture.packed import is_packed_linear, packed_weight
from melora_fx.config import MELoRAConfig
from melora_fx.distributed.agreement import agree_on, mesh_of
from melora_fx.distributed.tensors import put
from melora_fx.errors import MELoRAError
from melora_fx.matching.refusals import refuse_copies_in_optimizer, refuse_opaque, refuse_partitioned
from melora_fx.names import site_of, unwrap, without_wrappers
from melora_fx.rewriting.rewrite import rewrite
from melora_fx.rewriting.sites import AdapterSite, adapter_parameters, refuse_folded, sites
from melora_fx.shared_memory import sharing_parameters
from melora_fx.whole_capture.dynamic_axes import DynamicAxes
from melora_fx.whole_capture.example_inputs import ExampleInputs

from .adapter import Adapter
from .adapter_file import read_adapter
from .checks import check_base, check_sites, check_trained_bases, kept_of, trained_apart
from .fingerprint import fingerprint
from .model_adapter import kept_tensor_names, shared_modules, tensors_by_name


def load_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    example_inputs: ExampleInputs | None = None,
    dynamic_axes: DynamicAxes = "auto",
) -> nn.Module:
    """Loads the adapter of a folder into `model`, and returns the adapted model.

    A plain model is rewritten as the adapter says. In a rewritten model, values and scaling are exchanged in place,
    without a recompile. Ranks or whole sites that the adapter lacks become zero in A and in B, and get no gradient. So
    the model computes, trains and saves the adapter that it was given, but keeps the sites for a later adapter. An
    optimizer remembers the previous adapter: make a new one. A `state_dict` contains A and B without their scaling, so
    an older one belongs to the previous adapter.

    Lowering and dropout belong to the graph. The adapter's `dropout` replaces that of the model if the model was
    rewritten with a `dropout` above 0; a model compiled in training mode then compiles again. A model without dropout
    trains without it. If the adapter is saved again, it keeps its own lowering and dropout.

    Call it on every process if the model is sharded: each reads the folder and takes its part.

    Args:
        model: a plain or a rewritten model, changed in place.
        directory: a folder written by `save_adapter`.
        example_inputs: as in `rewrite`, for a plain model.
        dynamic_axes: as in `rewrite`, for a plain model.

    Returns:
        `model`, or for a plain model what `rewrite` returns.

    Raises:
        TypeError: if `model` is not an nn.Module.
        MELoRAError: if the folder cannot be read, the adapter is for another model (each key is named) or another base
            weight, or its blocks, ranks or trained modules do not fit a rewritten model; inside `folded`, and after
            `deepspeed.initialize`. Nothing is changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be an nn.Module, got {type(model).__name__}: `rewrite` returns one")
    refuse_opaque(model, "load_adapter")
    refuse_copies_in_optimizer(adapter_parameters(model).values(), "load_adapter")
    adapter = agree_on(mesh_of(model), lambda: _read(directory), f"the adapter in `{directory}`")
    refuse_partitioned(model, "load_adapter")
    refuse_folded(model, "load_adapter")
    if found := sites(model):
        _load_into_rewritten(model, found, adapter)
        return model
    return _load_into_plain(model, adapter, example_inputs, dynamic_axes)


def _read(directory: str | os.PathLike[str]) -> tuple[Adapter, str]:
    adapter = read_adapter(directory)
    return adapter, adapter.sha256


def _load_into_plain(
    model: nn.Module, adapter: Adapter, example_inputs: ExampleInputs | None, dynamic_axes: DynamicAxes
) -> nn.Module:
    plain = _plain_weights(model)
    check_sites(adapter, plain)
    weights = {name: plain[name] for name in adapter.configs}
    _check_model(adapter, model, weights)
    targets: dict[str, MELoRAConfig | None] = {
        f"re:{re.escape(name)}": _for_any_base(config) for name, config in adapter.configs.items()
    }
    kept = [f"re:{re.escape(name)}" for name in adapter.kept]
    rewritten = rewrite(model, targets, example_inputs=example_inputs, dynamic_axes=dynamic_axes, keep_trainable=kept)
    _copy_values(rewritten, sites(rewritten), adapter)
    return rewritten


def _for_any_base(config: MELoRAConfig) -> MELoRAConfig:
    """Returns the configuration for a base of any dtype: "auto" chooses the lowering "weight" if that is possible."""
    return dataclasses.replace(config, lowering="auto") if config.lowering == "weight" else config


def _load_into_rewritten(model: nn.Module, found: Mapping[str, AdapterSite], adapter: Adapter) -> None:
    check_sites(adapter, found)
    for name, config in adapter.configs.items():
        _refuse_other_blocks(name, found[name], config)
    _refuse_other_heads(model, adapter)
    weights = {name: found[name].weight for name in adapter.configs}
    _check_model(adapter, model, weights)
    _copy_values(model, found, adapter)


def _check_model(adapter: Adapter, model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Raises MELoRAError if the model has another base than the adapter; `weights`: site → base weight."""
    kept = kept_of(adapter, tensors_by_name(model)) if adapter.kept else {}
    check_base(adapter, weights, {name: fingerprint(weight) for name, weight in weights.items()}, kept)
    check_trained_bases(adapter, model, weights)
    if adapter.kept:
        _refuse_ties(adapter, model)
    if adapter.is_foreign:
        _refuse_shared_modules(adapter, model)


def _refuse_ties(adapter: Adapter, model: nn.Module) -> None:
    """Raises MELoRAError if the adapter has trained tied tensors of the model separately, as other programs do."""
    tied = sharing_parameters(unwrap(model))
    pairs = [(name, other) for name in adapter.kept_tensors() for other in tied.get(name, ())]
    if lines := [reason for name, other in pairs if (reason := trained_apart(adapter, name, other))]:
        raise MELoRAError(f"`{adapter.directory}` does not fit the model:\n" + "\n".join(lines))


def _refuse_shared_modules(adapter: Adapter, model: nn.Module) -> None:
    """Raises MELoRAError if another program's adapter is on a module that has several names in the model."""
    if shared := shared_modules(model, [*adapter.configs, *adapter.kept]):
        raise MELoRAError(
            f"`{adapter.directory}` does not fit the model: "
            + "; ".join(f"`{name}` is one module of several names ({', '.join(own)})" for name, own in shared.items())
            + ": other programs adapt it under only one of them; merge the adapter where it was trained"
        )


def _refuse_other_blocks(name: str, site: AdapterSite, saved: MELoRAConfig) -> None:
    """Raises MELoRAError if the saved blocks do not fit into the site's tensors."""
    for key in ("num_blocks", "split"):
        if getattr(site.config, key) != getattr(saved, key):
            raise MELoRAError(
                f"`{name}`: the adapter's `{key}` (={getattr(saved, key)}) is not the model's "
                f"(={getattr(site.config, key)}): `fold` or rebuild the model, then load into the plain one"
            )
    if max(saved.ranks) > site.lora_b.size(2):
        raise MELoRAError(
            f"`{name}`: the adapter's rank {max(saved.ranks)} is above the {site.lora_b.size(2)} that the model "
            "was rewritten with: load into a plain model"
        )


def _refuse_other_heads(model: nn.Module, adapter: Adapter) -> None:
    """Raises MELoRAError if the adapter does not have the same trained modules as the model."""
    kept = set(kept_tensor_names(model))
    saved = set(adapter.kept_tensors())
    if kept != saved:
        raise MELoRAError(
            f"`{adapter.directory}` keeps {sorted(saved - kept) or 'nothing'} trainable that the model does not, "
            f"and lacks {sorted(kept - saved) or 'nothing'}: one head would stay where another belongs"
        )


def _copy_values(model: nn.Module, found: Mapping[str, AdapterSite], adapter: Adapter) -> None:
    with torch.no_grad():
        for name, site in found.items():
            if name in adapter.configs:
                _copy_site(site, adapter.tensors_of(name))
            else:
                _empty_site(site)
        own = tensors_by_name(model) if adapter.kept else {}
        for name, tensor in adapter.kept_tensors().items():
            put(own[name], tensor)


def _copy_site(site: AdapterSite, saved: AdapterTensors) -> None:
    """Replaces the values and the configuration of a site; values beyond the saved ranks become zero."""
    padded = saved.with_rank(site.lora_b.size(2))
    put(site.lora_a, padded.lora_a)
    put(site.lora_b, padded.lora_b)
    put(site.scaling, saved.scaling(site.scaling.dtype))
    dropout = getattr(site.owner, site.record.attribute(DROPOUT), None)
    if dropout is not None:
        dropout.p = saved.config.dropout
    rate = 0.0 if dropout is None else saved.config.dropout  # the graph stays, so it gets no dropout
    config = dataclasses.replace(saved.config, dropout=rate, lowering=site.config.lowering)
    site.record.config = config
    site.record.saved_config = saved.config if saved.config != config else None
    site.record.is_absent = False


def _empty_site(site: AdapterSite) -> None:
    """Sets the values of a site to zero; the gradient of each factor is zero if the other factor is."""
    site.lora_a.zero_()
    site.lora_b.zero_()
    site.record.is_absent = True


def _plain_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns every matrix, and stack of matrices, of the model by the name that a site on it would have."""
    matrices = {
        site_of(without_wrappers(name)): parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.dim() in (2, 3)
    }
    packed = {
        without_wrappers(name): packed_weight(module)
        for name, module in model.named_modules()
        if is_packed_linear(module)
    }
    return {**matrices, **packed}
