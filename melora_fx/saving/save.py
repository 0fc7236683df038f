"""`save_adapter`: checks what can be saved, warns about what is left out, and writes the adapter."""

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
    """Writes the adapters of `model`, and what was kept trainable, to a folder, which is created if it is missing.

    After a crash the folder holds either the old adapter or the new one. An adapter is always saved as the same files,
    even after `load_adapter` into a model with more sites or larger ranks. Warns about tensors that are not saved
    although they can be trained, such as an unfrozen bias, or have changed since `rewrite`, such as the statistics of a
    BatchNorm. Name them in `rewrite(…, keep_trainable=[…])` to save them with the adapter.

    Call it on every process if the model is sharded: it gathers the adapters, and only those values of the base that
    the fingerprints need. The first process writes, and all return when the files are there. Under DDP each process
    that calls it writes. Under DeepSpeed's ZeRO-3, call it inside `deepspeed.zero.GatheredParameters`.

    Args:
        model: a rewritten model, which is not changed.
        directory: the folder to write adapter.safetensors and adapter_config.json to.

    Raises:
        MELoRAError: if the model is plain or inside `folded`, a weight was resized, the adapter or the base weights are
            not finite, A or B has values where the adapter loaded last has none, or the folder cannot be written.
        ValueError: if `directory` is "".
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
            "adapter records only their shapes, and will load onto any base with these shapes",
            stacklevel=2,
        )
    if spoilt := [name for name, site in found.items() if padding_is_used(site.tensors)]:
        raise MELoRAError(
            f"{_listed(spoilt)}: a block holds values beyond its own rank, which training never writes: fill only the "
            "first `rank[i]` rows of A and columns of B of block i"
        )
    tensors = adapter_tensors(model, found)
    _refuse_non_finite(entries, tensors)
    if lost := left_out(model):
        warnings.warn(
            f"`save_adapter` does not save {_listed(lost)}, which can be trained or have changed since `rewrite`: name "
            "them in its `keep_trainable`, and buffers by their module",
            stacklevel=2,
        )
    header = {"sites": entries, "kept": list(kept_names(model)), "model": _model_facts(unwrap(model), found)}
    path = output_path(directory)
    on_one_process(mesh, lambda: write_adapter(path, tensors, header))


def _refuse_non_finite(entries: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises MELoRAError if the adapter or a base weight is not finite, because nobody could load the adapter."""
    if names := non_finite_names(tensors):
        raise MELoRAError(
            f"the adapter holds NaN or infinity in {_listed(names)}, because training has diverged: nothing is saved, "
            "and an adapter that was saved there before stays"
        )
    if names := [name for name, entry in entries.items() if not all(map(isfinite, entry["base"].get("values", ())))]:
        raise MELoRAError(f"the base weights of {_listed(names)} hold NaN or infinity: load the model again")


def _model_facts(model: nn.Module, found: Mapping[str, AdapterSite]) -> dict[str, Any]:
    """Returns the facts with which a plain model must be loaded so that the adapter fits, and which its users need.

    `found`: its sites. Names of labels are left out if they say nothing, as LABEL_0 does.
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
