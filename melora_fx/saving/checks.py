"""Refuses adapters that do not belong to a model, by names, shapes and fingerprints, or that are not finite."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from melora_fx.adapter.tensors import num_matrices
from melora_fx.errors import MELoRAError
from melora_fx.matching.keep_trainable import trained_bases
from melora_fx.matching.targets import nearest
from melora_fx.names import unwrap

from .adapter_file import Adapter
from .fingerprint import fingerprint_misfit
from .model_adapter import tensors_by_name


def check_sites(adapter: Adapter, known: Collection[str]) -> None:
    """Raises MELoRAError where the adapter has a site that is not among the `known` names of the model."""
    lines = [f"`{name}`; nearest: {nearest(name, list(known))}" for name in adapter.configs if name not in known]
    if lines:
        raise MELoRAError(
            f"`{adapter.directory}` is for another model; it has sites that this one lacks:\n" + "\n".join(lines)
        )


def check_shapes(adapter: Adapter, weights: Mapping[str, torch.Tensor]) -> None:
    """Raises MELoRAError where a base weight, by its site's name, has not the shape that the adapter is for."""
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


def check_kept(adapter: Adapter, model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Raises MELoRAError where a tensor that was kept trainable is not in the model, or has another shape there, or is
    the base of a site, whose `weights` are given by name.
    """
    own = tensors_by_name(model)
    lines = []
    for name, tensor in adapter.kept_tensors().items():
        if name not in own:
            lines.append(f"`{name}`: the model has no such tensor")
        elif own[name].shape != tensor.shape:
            lines.append(f"`{name}`: saved as {tuple(tensor.shape)}, the model's is {tuple(own[name].shape)}")
    if not lines:
        lines = trained_bases(unwrap(model), adapter.kept, weights)
    if lines:
        raise MELoRAError(f"the trained modules of `{adapter.directory}` do not fit the model:\n" + "\n".join(lines))


def refuse_non_finite(adapter: Adapter) -> None:
    """Raises MELoRAError for an adapter that holds NaN or infinity, and names the tensors."""
    wrong = [
        name for name, value in adapter.tensors.items() if value.is_floating_point() and not value.isfinite().all()
    ]
    if wrong:
        raise MELoRAError(f"`{adapter.directory}` holds NaN or infinity in {', '.join(map(repr, wrong))}")
