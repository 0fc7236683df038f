"""Refuses adapters that do not belong to a model, a checkpoint or a graph; compares names, shapes and fingerprints."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from melora_fx.adapter.tensors import num_matrices
from melora_fx.errors import MELoRAError
from melora_fx.matching.keep_trainable import is_within, trained_bases
from melora_fx.matching.targets import nearest
from melora_fx.names import unwrap

from .adapter import Adapter
from .fingerprint import fingerprint_misfit


def check_sites(adapter: Adapter, known: Collection[str]) -> None:
    """Raises MELoRAError if the adapter has a site that is not among the `known` names of the model."""
    lines = [f"`{name}`; nearest: {nearest(name, list(known))}" for name in adapter.configs if name not in known]
    if lines:
        raise MELoRAError(
            f"`{adapter.directory}` is for another model; it has sites that this one lacks:\n" + "\n".join(lines)
        )


def check_base(
    adapter: Adapter,
    weights: Mapping[str, torch.Tensor],
    fingerprints: Mapping[str, Mapping[str, Any]],
    kept: Mapping[str, torch.Tensor],
    base: str = "the model",
) -> None:
    """Raises MELoRAError if the adapter was not trained on this base, in which its sites have been found.

    Args:
        adapter: the adapter.
        weights: site → its base weight, which may be on the meta device.
        fingerprints: site → fingerprint of that weight.
        kept, base: as `own` and `base` in `check_kept`.
    """
    check_shapes(adapter, weights)
    check_fingerprints(adapter, fingerprints)
    check_kept(adapter, kept, base)


def check_shapes(adapter: Adapter, weights: Mapping[str, torch.Tensor]) -> None:
    """Raises MELoRAError if a base weight, given by site, does not have the shape that the adapter is for."""
    lines = []
    for name, config in adapter.configs.items():
        own = adapter.tensors_of(name)
        shapes = (tuple(own.lora_a.shape), tuple(own.lora_b.shape))
        matrices = adapter.matrices_of(name, weights[name])
        rows, columns = matrices.shape[-2:]
        number = num_matrices(matrices)
        fitting = [config.adapter_shapes(rows, columns, number), config.adapter_shapes(columns, rows, number)]
        if shapes not in fitting:
            lines.append(
                f"`{name}`: lora_a is {shapes[0]} and lora_b {shapes[1]}, which does not fit a weight of shape "
                f"{tuple(weights[name].shape)} and the adapter's own configuration {config}"
            )
    if lines:
        raise MELoRAError(f"`{adapter.directory}` does not fit the model:\n" + "\n".join(lines))


def check_fingerprints(adapter: Adapter, actual: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises MELoRAError if a base weight is not the one that the adapter was trained on.

    Args:
        adapter: the adapter.
        actual: site → fingerprint of the present weight.
    """
    lines = []
    for name, expected in adapter.fingerprints.items():
        if reason := fingerprint_misfit(actual[name], expected):
            lines.append(f"`{name}`: {reason}")
    if lines:
        raise MELoRAError(f"`{adapter.directory}` was trained on another base model:\n" + "\n".join(lines))


def check_kept(adapter: Adapter, own: Mapping[str, torch.Tensor], base: str = "the model") -> None:
    """Raises MELoRAError if the tensors that were kept trainable are not exactly those of the base.

    Args:
        adapter: the adapter.
        own: the base's tensors under the names that the adapter keeps (`kept_of`), on the meta device or with values.
        base: the name of the base in error texts.
    """
    lines = []
    saved = adapter.kept_tensors()
    for name, tensor in saved.items():
        if name not in own:
            lines.append(f"`{name}`: {base} has no such tensor")
        elif own[name].shape != tensor.shape:
            lines.append(f"`{name}`: saved as {tuple(tensor.shape)}, {base}'s is {tuple(own[name].shape)}")
        elif _kind(own[name]) != _kind(tensor):
            lines.append(f"`{name}`: saved as {tensor.dtype}, {base}'s is {own[name].dtype}")
    lines += [f"`{name}`: {base} has it, but the adapter does not" for name in own if name not in saved]
    if lines:
        raise MELoRAError(f"the trained modules of `{adapter.directory}` do not fit {base}:\n" + "\n".join(lines))


def trained_apart(adapter: Adapter, name: str, other: str) -> str | None:
    """Returns why the adapter does not fit a base that ties two tensors, or None. Other programs train them separately.

    `name`: a tensor that was kept trainable. `other`: the tensor that the base ties it to.
    """
    kept = adapter.kept_tensors()
    is_apart = not torch.equal(kept[name], kept[other]) if other in kept else adapter.is_foreign
    if not is_apart:
        return None
    return (
        f"`{name}` was trained apart from `{other}`, to which the base ties it: merge the adapter where it was trained"
    )


def kept_of(adapter: Adapter, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns those of a base's tensors, by name, that belong to what the adapter keeps trainable."""
    return {name: tensor for name, tensor in tensors.items() if any(is_within(name, kept) for kept in adapter.kept)}


def check_trained_bases(adapter: Adapter, model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Raises MELoRAError if the adapter keeps the base weight of a site trainable; `weights`: site → base weight."""
    if lines := trained_bases(unwrap(model), adapter.kept, weights):
        raise MELoRAError(f"the trained modules of `{adapter.directory}` do not fit the model:\n" + "\n".join(lines))


def _kind(tensor: torch.Tensor) -> object:
    """Returns the kind of a tensor's values: only floating-point numbers, of any width, convert to each other."""
    return "floating" if tensor.is_floating_point() else tensor.dtype
