"""`save_adapter`: what can be saved, and what is worth a warning."""

import os
import warnings
from collections.abc import Mapping
from math import isfinite
from typing import Any

import torch
from torch import nn

from melora_fx.distributed.agreement import mesh_of, on_one_process
from melora_fx.errors import MELoRAError
from melora_fx.files import output_path
from melora_fx.names import default_labels, first_of, unwrap
from melora_fx.rewriting.module import class_name
from melora_fx.rewriting.sites import (
    AdapterSite,
    refuse_folded,
    require_sites,
    resized,
    warn_of_lost_sites,
    whole_sites,
)

from .adapter_file import write_adapter
from .model_adapter import (
    adapter_tensors,
    checkpoint_layout,
    kept_names,
    left_out,
    present_sites,
    shared_modules,
    site_entries,
    tied_to_kept,
)
from .well_formed import non_finite_names, padding_is_used


def save_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Writes the adapters of `model`, and what was kept trainable, to a folder; made where there is none.

    A crash leaves the old files or the new ones. The files of one adapter are the same each time, also after
    `load_adapter` into a model of more sites or larger ranks. Warns of what is not saved although it can be trained,
    such as a bias that was unfrozen, or has changed since `rewrite`, such as the statistics of a BatchNorm:
    `rewrite(…, keep_trainable=[…])` names what travels with the adapter.

    Of a sharded model it is called on every process: the adapters are gathered, nothing of the base but the values of
    fingerprints, and the first process writes; all return when the files are there. Under DDP each process that calls
    it writes. Under DeepSpeed's ZeRO-3 it is called inside `deepspeed.zero.GatheredParameters`.

    Raises:
        MELoRAError: for a plain model, an adapter or base weights that are not finite, values where the adapter that
            was loaded has none, or a folder that cannot be written.
    """
    found = require_sites(model, "save_adapter")
    warn_of_lost_sites(model, found)
    lines = [f"`{name}`: {reason}" for name, site in found.items() if (reason := resized(site))]
    if lines:
        raise MELoRAError("cannot save:\n" + "\n".join(lines))
    refuse_folded(model, "save_adapter")
    mesh = mesh_of(model)
    found = present_sites(whole_sites(found))
    entries = site_entries(found)
    unread = [f"`{name}`" for name, entry in entries.items() if "values" not in entry["base"]]
    if unread:
        warnings.warn(
            f"the base weights of {len(unread)} sites are quantised or on meta ({', '.join(unread[:3])}, …): the "
            "adapter records their shapes alone, and will load onto any base of these",
            stacklevel=2,
        )
    if spoilt := [name for name, site in found.items() if padding_is_used(site.tensors)]:
        raise MELoRAError(
            f"{_listed(spoilt)}: a block holds values beyond its own rank, which no training puts there: fill only the "
            "first `rank[i]` rows of A and columns of B of block i"
        )
    tensors = adapter_tensors(model, found)
    _refuse_non_finite(entries, tensors)
    if lost := left_out(model):
        warnings.warn(
            f"`save_adapter` does not save {_listed(lost)}, which can be trained or have changed since `rewrite`: name "
            "them in its `keep_trainable`, buffers by their module",
            stacklevel=2,
        )
    header = {"sites": entries, "kept": list(kept_names(model)), "model": _model_facts(unwrap(model), found)}
    path = output_path(directory)
    on_one_process(mesh, lambda: write_adapter(path, tensors, header))


def _refuse_non_finite(entries: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises MELoRAError for what no one could load: an adapter, or a base weight, that is not finite."""
    if names := non_finite_names(tensors):
        raise MELoRAError(
            f"the adapter holds NaN or infinity in {_listed(names)}, as training has diverged: nothing is saved, an "
            "adapter that was saved there before stays"
        )
    if names := [name for name, entry in entries.items() if not all(map(isfinite, entry["base"].get("values", ())))]:
        raise MELoRAError(f"the base weights of {_listed(names)} hold NaN or infinity: load the model again")


def _model_facts(model: nn.Module, found: Mapping[str, AdapterSite]) -> dict[str, Any]:
    """What a plain model must be loaded with so that the adapter fits and its users find what they need.

    `found`: its sites. Names of labels are left out where they say nothing, as LABEL_0 does.
    """
    config = getattr(model, "config", None)
    num_labels = getattr(config, "num_labels", None)
    facts = {"class": class_name(model), "num_labels": num_labels}
    if isinstance(names := getattr(config, "id2label", None), dict):
        labels = [names.get(index) for index in range(len(names))]
        if len(labels) == num_labels and labels != default_labels(len(labels)):
            facts["labels"] = [str(label) for label in labels]
    if isinstance(pad_token_id := getattr(config, "pad_token_id", None), int):
        facts["pad_token_id"] = pad_token_id
    if tied := tied_to_kept(model):
        facts["tied"] = tied
    if shared := shared_modules(model, [*found, *kept_names(model)]):
        facts["shared"] = shared
    if hasattr(config, "model_type") and (layout := checkpoint_layout(model, found)):
        facts["layout_sha256"] = layout
    return facts


def _listed(names: list[str]) -> str:
    return first_of([f"`{name}`" for name in names])
