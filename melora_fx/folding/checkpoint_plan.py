"""Decides and checks what a fold on disk changes in a checkpoint, before anything is written."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from melora_fx.errors import MELoRAError
from melora_fx.load_model import refuse_missing
from melora_fx.matching.keep_trainable import is_within
from melora_fx.matching.targets import nearest
from melora_fx.saving.adapter import Adapter
from melora_fx.saving.checks import check_fingerprints, check_kept, check_shapes, kept_of, trained_apart
from melora_fx.saving.fingerprint import layout_sha256

from .checkpoint import DTYPES, FOLDED_KEY, Checkpoint, StoredTensor
from .checkpoint_keys import KeyMap, map_keys, names_as_keys


@dataclass(frozen=True)
class FoldPlan:
    """The changes to the tensors of a checkpoint; tensors that are not named here stay.

    Attributes:
        weights: site → where its weight is stored.
        heads: key → the tensor that replaces the checkpoint's, or is added.
    """

    weights: dict[str, StoredTensor]
    heads: dict[str, torch.Tensor]


def plan_fold(checkpoint: Checkpoint, adapter: Adapter) -> FoldPlan:
    """Returns where an adapter belongs in a checkpoint. Only headers and a few values of each weight are read.

    Raises:
        MELoRAError: if the checkpoint already contains an adapter, is not the adapter's base, stores a weight in a form
            that cannot be folded into, or lacks a weight that the adapter does not bring.
    """
    _refuse_folded(checkpoint)
    names = _names(checkpoint, adapter)
    weights = _find_weights(checkpoint, adapter, names)
    _check_values(checkpoint, adapter, weights, names)
    heads = _find_heads(checkpoint, adapter, names)
    class_name = str(adapter.model.get("class"))
    refuse_missing(checkpoint.directory, class_name, names.lacking, brought=adapter.kept_tensors())
    return FoldPlan(weights, heads)


def _names(checkpoint: Checkpoint, adapter: Adapter) -> KeyMap:
    """Returns the keys of the parameters of the adapter's model in the checkpoint. If the checkpoint has the layout in
    the adapter's header, the names are the keys: building the model's class would take most of the fold's time.
    """
    shapes = {key: tensor.shape for key, tensor in checkpoint.tensors.items()}
    if adapter.model.get("layout_sha256") == layout_sha256(shapes, checkpoint.config or {}):
        return names_as_keys(checkpoint)
    return map_keys(checkpoint, adapter.model.get("class"), adapter.model.get("num_labels"))


def _refuse_folded(checkpoint: Checkpoint) -> None:
    """Raises MELoRAError if `fold_checkpoint` has written the checkpoint."""
    for name, metadata in checkpoint.files.items():
        if FOLDED_KEY in metadata:
            sha256 = re.search(r"[0-9a-f]{12}", metadata[FOLDED_KEY])
            which = f" (sha256 {sha256[0]}…)" if sha256 else ""
            raise MELoRAError(
                f"`{checkpoint.directory / name}` holds an adapter already{which}: fold into the base that it was made "
                "from"
            )


def _find_weights(checkpoint: Checkpoint, adapter: Adapter, names: KeyMap) -> dict[str, StoredTensor]:
    """Returns where each site's weight is stored."""
    stored: dict[str, StoredTensor] = {}
    lines: list[str] = []
    quantised = (checkpoint.config or {}).get("quantization_config")
    for site in adapter.configs:
        parameter = site if site in names.keys or site in names.converted else f"{site}.weight"
        key = names.keys.get(parameter)
        others = names.tied.get(parameter, ())
        if others:
            lines.append(
                f"`{site}` shares its weight with {', '.join(map(repr, others))}: fold in memory with "
                "`fold(model, untie=True)`, and save"
            )
        elif key is None and parameter in names.converted:
            lines.append(f"`{site}`: the checkpoint stores its weight in another form: fold in memory, and save")
        elif key is None:
            lines.append(f"`{site}`: the checkpoint has no such weight; nearest: {nearest(site, list(names.keys))}")
        elif quantised or checkpoint.tensors[key].dtype not in DTYPES:
            lines.append(
                f"`{site}`: its weight is quantised ({checkpoint.tensors[key].dtype}): dequantise the base, fold, and "
                "quantise again"
            )
        else:
            stored[site] = checkpoint.tensors[key]
    if lines:
        raise MELoRAError(f"`{adapter.directory}` cannot be folded into `{checkpoint.directory}`:\n" + "\n".join(lines))
    return stored


def _find_heads(checkpoint: Checkpoint, adapter: Adapter, names: KeyMap) -> dict[str, torch.Tensor]:
    """Returns the tensors that were kept trainable, by key: a tied one under all its keys, a new one under its name."""
    heads: dict[str, torch.Tensor] = {}
    lines: list[str] = []
    for name, tensor in adapter.kept_tensors().items():
        if name in names.converted:
            lines.append(f"`{name}`: the checkpoint stores it in another form: fold in memory, and save")
        tied = names.tied.get(name, ())
        lines += [f"{reason}" for other in tied if (reason := trained_apart(adapter, name, other))]
        keys = [names.keys[own] for own in (name, *tied) if own in names.keys]
        heads |= dict.fromkeys(keys or [name], tensor)
    if lines:
        raise MELoRAError(f"`{adapter.directory}` cannot be folded into `{checkpoint.directory}`:\n" + "\n".join(lines))
    return heads


def _check_values(checkpoint: Checkpoint, adapter: Adapter, stored: Mapping[str, StoredTensor], names: KeyMap) -> None:
    """Raises MELoRAError if the adapter is of another base; reads a few values of each weight."""
    flat = [
        f"`{site}`: its weight has shape {tensor.shape}"
        for site, tensor in stored.items()
        if len(tensor.shape) not in (2, 3)
    ]
    if flat:
        raise MELoRAError(f"`{adapter.directory}` is for matrices and stacks of them:\n" + "\n".join(flat))
    shapes = {site: torch.empty(tensor.shape, device="meta") for site, tensor in stored.items()}
    check_shapes(adapter, shapes)
    check_fingerprints(adapter, {site: tensor.fingerprint() for site, tensor in stored.items()})
    check_kept(adapter, kept_of(adapter, _tensors(checkpoint, adapter, names)), "the base")
    for site, shape in shapes.items():
        adapter.oriented(site, shape)


def _tensors(checkpoint: Checkpoint, adapter: Adapter, names: KeyMap) -> Mapping[str, torch.Tensor]:
    """Returns the base's tensors by name, on the meta device. If transformers does not know the class, a kept module
    without any tensor in the checkpoint counts as new.
    """
    if names.tensors is not None:
        return names.tensors
    stored = {
        key: torch.empty(tensor.shape, dtype=DTYPES.get(tensor.dtype, torch.int64), device="meta")
        for key, tensor in checkpoint.tensors.items()
    }
    new = [kept for kept in adapter.kept if not any(is_within(key, kept) for key in stored)]
    heads = {name: tensor for name, tensor in adapter.kept_tensors().items() if any(is_within(name, k) for k in new)}
    return heads | stored
