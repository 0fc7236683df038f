"""What of a rewritten model belongs to its adapter: the tensors of sites and what was kept trainable, by name."""

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
    "it was written after `load_adapter`, by an optimizer that remembers the larger adapter from before, or by "
    "`load_state_dict`; make a new optimizer after loading, and load adapters by `load_adapter`"
)


def adapter_of(model: nn.Module) -> Adapter:
    """The adapter of a rewritten model as if it had been saved and read; base weights are not checked."""
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
    """Those of a model's sites that its adapter has: not those that the one loaded last lacks.

    Raises:
        MELoRAError: where such a site holds values all the same.
    """
    for name, site in found.items():
        if site.is_absent and (site.lora_a.detach().any() or site.lora_b.detach().any()):
            raise MELoRAError(f"`{name}` holds values, and the adapter that was loaded lacks it: {_STALE}")
    return {name: site for name, site in found.items() if not site.is_absent}


def adapter_tensors(model: nn.Module, found: Mapping[str, AdapterSite]) -> dict[str, torch.Tensor]:
    """What an adapter folder of `model` holds: `<site>.lora_a`, `<site>.lora_b`, and what was kept trainable.

    Of a sharded model all of them, on each process. Cut to the largest rank of each site's configuration: an adapter
    that was loaded into a larger one is as it was.
    `found`: its `present_sites`, whole.
    """
    tensors = {name: whole(tensor) for name, tensor in _kept_tensors(model).items()}
    for name, site in found.items():
        rank = max(site.config.ranks)
        tensors |= site.tensors.with_rank(rank).named(name)
        if site.lora_b.detach()[:, :, rank:].any():
            raise MELoRAError(f"`{name}` holds values beyond its rank {rank}: {_STALE}")
    return tensors


def site_entries(found: Mapping[str, AdapterSite]) -> dict[str, Any]:
    """What files say of each site, as JSON-ready values: its configuration, and its base weight's fingerprint and how
    that lies.
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
    """Names of the modules and parameters that were kept trainable."""
    names: list[str] = []
    for path, _, mark in root_marks(model):
        names += [join_path(path, name) for name in mark.kept]
    return tuple(names)


def kept_tensor_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the tensors that were kept trainable, and of the buffers of modules that were."""
    return tuple(_kept_tensors(model))


def tied_to_kept(model: nn.Module) -> dict[str, list[str]]:
    """Name of each tensor that was kept trainable → the names of others that it is tied to."""
    kept = _kept_tensors(model)
    tied = sharing_parameters(unwrap(model)) if kept else {}
    return {name: others for name in kept if (others := [other for other in tied.get(name, ()) if other not in kept])}


def shared_modules(model: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """Site or module → all the names that its module has in the model, of those that have several."""
    paths: dict[int, list[str]] = {}
    for path, module in unwrap(model).named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(without_wrappers(path))
    all_names = {path: own for own in paths.values() if len(own) > 1 for path in own}
    modules = {name: name if name in all_names else name.rpartition(".")[0] for name in names}
    return {name: all_names[path] for name, path in modules.items() if path in all_names}


def checkpoint_layout(model: nn.Module, found: Mapping[str, AdapterSite]) -> str | None:
    """`layout_sha256` of a checkpoint that has a transformers model's tensors under its names, of tied ones the first.

    A fold into such a checkpoint need not know the model's class. None where a weight of `found`, its sites, or what
    was kept trainable has several names, since a fold must know them all, and where a module has a state of its own.
    """
    adapters = {span_of(parameter) for parameter in adapter_parameters(model).values()}
    weights = [site.weight for site in found.values()]
    changed = {span_of(tensor) for tensor in (*weights, *_kept_tensors(model).values())}
    seen = set(adapters)
    shapes: dict[str, torch.Size] = {}
    for name, tensor in tensors_by_name(model).items():
        if not isinstance(tensor, torch.Tensor):  # of `get_extra_state`
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
    """Names of what is trained or has changed since `rewrite`, and is not saved: it was not kept trainable."""
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
        changed = [name for name in changed if id(own.get(name)) not in saved]  # tied to what is
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
    """The model's own tensors under the names of its `state_dict`, without those of wrappers."""
    return {without_wrappers(name): tensor for name, tensor in unwrap(model).state_dict(keep_vars=True).items()}
