"""The parts of a rewritten model that belong to its adapter, by name: tensors of sites, and what was kept trainable."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from melora_fx.distributed.tensors import whole
from melora_fx.errors import MELoRAError
from melora_fx.matching.keep_trainable import is_within
from melora_fx.names import join_path, unwrap, without_wrappers
from melora_fx.rewriting.changes import changed_values
from melora_fx.rewriting.marks import root_marks
from melora_fx.rewriting.sites import AdapterSite, adapter_parameters, sites, whole_sites
from melora_fx.shared_memory import sharing_parameters, span_of

from .adapter import Adapter
from .fingerprint import CONFIG_FACTS, fingerprint, layout_sha256

_STALE = (
    "they were written after `load_adapter`, by an optimizer that remembers the larger adapter from before, or by "
    "`load_state_dict`; make a new optimizer after loading, and load adapters with `load_adapter`"
)


def adapter_of(model: nn.Module) -> Adapter:
    """Returns the adapter of a rewritten model as if it had been saved and read. It has no fingerprints."""
    found = present_sites(whole_sites(sites(model)))
    return Adapter(
        directory=Path(),
        configs={name: site.record.file_config for name, site in found.items()},
        fingerprints={},
        transposed={},
        kept=kept_names(model),
        model={},
        tensors=adapter_tensors(model, found),
    )


def present_sites(found: Mapping[str, AdapterSite]) -> dict[str, AdapterSite]:
    """Returns the sites of a model that its adapter has, without those that the adapter loaded last lacks.

    Raises:
        MELoRAError: if a site that the adapter lacks holds values nevertheless.
    """
    for name, site in found.items():
        if site.is_absent and (site.lora_a.detach().any() or site.lora_b.detach().any()):
            raise MELoRAError(f"`{name}` holds values, but the adapter that was loaded lacks it: {_STALE}")
    return {name: site for name, site in found.items() if not site.is_absent}


def adapter_tensors(model: nn.Module, found: Mapping[str, AdapterSite]) -> dict[str, torch.Tensor]:
    """Returns the tensors of `model`'s adapter folder: `<site>.lora_a`, `<site>.lora_b`, and what was kept trainable.

    If the model is sharded, each process gets all of them. A and B are cut to the largest rank of the site's
    configuration, so an adapter that was loaded into a model with larger ranks is saved unchanged.

    Args:
        model: the rewritten model.
        found: its `present_sites`, gathered.

    Raises:
        MELoRAError: if a site holds values beyond that rank.
    """
    tensors = {name: whole(tensor) for name, tensor in _kept_tensors(model).items()}
    for name, site in found.items():
        rank = max(site.config.ranks)
        tensors |= site.tensors.with_rank(rank).named(name)
        if site.lora_b.detach()[:, :, rank:].any():
            raise MELoRAError(f"`{name}` holds values beyond its rank {rank}: {_STALE}")
    return tensors


def site_entries(found: Mapping[str, AdapterSite]) -> dict[str, Any]:
    """Returns what files say about each site, as JSON-ready values: its configuration, and the fingerprint and the
    layout of its base weight.
    """
    return {
        name: {
            "config": site.record.file_config.to_dict(),
            "base": fingerprint(site.weight),
            "is_transposed": site.weight_is_transposed,
            **({} if site.record.row_dims is None else {"row_dims": site.record.row_dims}),
            **({} if site.record.parameter_name == "weight" else {"parameter": site.record.parameter_name}),
        }
        for name, site in found.items()
    }


def kept_names(model: nn.Module) -> tuple[str, ...]:
    """Returns the names of the modules and parameters that were kept trainable."""
    names: list[str] = []
    for path, _, mark in root_marks(model):
        names += [join_path(path, name) for name in mark.kept]
    return tuple(names)


def kept_tensor_names(model: nn.Module) -> tuple[str, ...]:
    """Returns the names of the tensors that were kept trainable, including the buffers of kept modules."""
    return tuple(_kept_tensors(model))


def tied_to_kept(model: nn.Module) -> dict[str, list[str]]:
    """Maps each tensor that was kept trainable to the names of tied tensors that were not, if there are any."""
    kept = _kept_tensors(model)
    tied = sharing_parameters(unwrap(model)) if kept else {}
    return {name: others for name in kept if (others := [other for other in tied.get(name, ()) if other not in kept])}


def shared_modules(model: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """Maps each site or module in `names` whose module has several names in the model to all of those names."""
    paths: dict[int, list[str]] = {}
    for path, module in unwrap(model).named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(without_wrappers(path))
    all_names = {path: own for own in paths.values() if len(own) > 1 for path in own}
    modules = {name: name if name in all_names else name.rpartition(".")[0] for name in names}
    return {name: all_names[path] for name, path in modules.items() if path in all_names}


def checkpoint_layout(model: nn.Module, found: Mapping[str, AdapterSite]) -> str | None:
    """Returns the `layout_sha256` of a checkpoint that has a transformers model's tensors under the model's names; tied
    tensors occur only under their first name.

    A fold into such a checkpoint need not know the model's class. Returns None if a weight of `found`, the model's
    sites, or a kept tensor has several names, since a fold must know all of them, or if a module has an extra state.
    """
    adapters = {span_of(parameter) for parameter in adapter_parameters(model).values()}
    weights = [site.weight for site in found.values()]
    changed = {span_of(tensor) for tensor in (*weights, *_kept_tensors(model).values())}
    seen = set(adapters)
    shapes: dict[str, torch.Size] = {}
    for name, tensor in tensors_by_name(model).items():
        if not isinstance(tensor, torch.Tensor):  # returned by `get_extra_state`
            return None
        span = span_of(tensor)
        if span in seen and span in changed:
            return None
        if span not in seen:
            shapes[name] = tensor.shape
        seen.add(span)
    config = unwrap(model).config
    return layout_sha256(shapes, {name: getattr(config, name, None) for name in CONFIG_FACTS})


def left_out(model: nn.Module) -> list[str]:
    """Returns the names of tensors that can be trained or have changed since `rewrite`, but are not saved because they
    were not kept trainable.
    """
    saved = {id(parameter) for parameter in adapter_parameters(model).values()}
    saved |= {id(tensor) for tensor in _kept_tensors(model).values()}
    names = [
        without_wrappers(name)
        for name, parameter in unwrap(model).named_parameters()
        if parameter.requires_grad and id(parameter) not in saved
    ]
    kept, own = kept_names(model), tensors_by_name(model)
    for path, root, mark in root_marks(model):
        changed = [join_path(path, name) for name in changed_values(root, mark.values)]
        changed = [name for name in changed if id(own.get(name)) not in saved]  # a tied tensor may be saved
        named = {*names, *kept}
        names += [name for name in changed if not any(is_within(name, each) for each in named)]
    return names


def _kept_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    kept = kept_names(model)
    if not kept:
        return {}
    return {
        name: tensor for name, tensor in tensors_by_name(model).items() if any(is_within(name, each) for each in kept)
    }


def tensors_by_name(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the model's own tensors under the names of its `state_dict`, without the names of wrappers."""
    return {without_wrappers(name): tensor for name, tensor in unwrap(model).state_dict(keep_vars=True).items()}
