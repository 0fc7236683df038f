"""Decides which graphs a model is exported as: one, with or without a cache, or an encoder's and a decoder's."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import nn

from exporters.hugging_face import decoder_config, is_hugging_face_model
from melora_fx import AdapterSite, MELoRAError
from melora_fx.capture.model_settings import in_mode, own_attributes, without_cache

from .encoder_decoder import decoder_forward, decoder_step, encoder_forward, encoder_inputs, pair_misfit
from .example_step import example_step
from .flat_cache import cache_misfit, flat_cache

Forward = Callable[[nn.Module], AbstractContextManager[None]]
"""The context in which a model's forward computes what its graph must compute."""

ENCODER_FILE, DECODER_FILE = "encoder_model.onnx", "decoder_model.onnx"


class Part(NamedTuple):
    """One of the graphs that a model is exported as.

    Attributes:
        inputs: the example inputs by name.
        forward: the context in which the model computes what the graph computes.
        file: the name of the graph's file in the folder; None for the requested name.
    """

    inputs: dict[str, Any]
    forward: Forward = without_cache
    file: str | None = None


def parts_of(
    model: nn.Module, inputs: dict[str, Any], use_cache: Any, *, has_own_axes: bool, is_folder: bool
) -> tuple[list[Part], tuple[str, ...]]:
    """Returns the graphs that a model is exported as, and notes for the user.

    Args:
        model: the model.
        inputs: its example inputs by name.
        use_cache: as for `export_onnx`.
        has_own_axes: whether the user named the dynamic axes.
        is_folder: whether the user named a folder, which can contain several graphs.

    Raises:
        ValueError: if `use_cache` is not True, False or "auto".
        MELoRAError: if `use_cache` is True and the graph cannot have a cache; if the model does not accept `inputs`.
    """
    if not isinstance(use_cache, bool) and use_cache != "auto":
        raise ValueError(f'`use_cache` (={use_cache!r}) must be True, False or "auto"')
    config: Any = getattr(model, "config", None)
    if is_hugging_face_model(model):
        may_generate, settings, is_pair = model.can_generate(), decoder_config(model), config.is_encoder_decoder
    else:
        may_generate, settings, is_pair = hasattr(model, "generate"), config, False
    if use_cache is False or (use_cache == "auto" and not (may_generate and getattr(settings, "use_cache", False))):
        return [Part(inputs)], ()
    if has_own_axes:
        misfit: str | None = "`dynamic_axes` names custom axes"
    elif is_pair and not is_folder:
        misfit = "an encoder-decoder model is exported as two graphs: name a folder, not a file"
    else:
        with own_attributes(model), in_mode(model, training=False):
            misfit = (pair_misfit if is_pair else cache_misfit)(model, inputs)
    if misfit is not None:
        if use_cache is True:
            raise MELoRAError(f"`use_cache=True`: the graph cannot have a key-value cache: {misfit}")
        return [Part(inputs)], (f"without a key-value cache: {misfit}",)
    try:
        with own_attributes(model), in_mode(model, training=False):
            if not is_pair:
                return [Part(example_step(model, inputs), flat_cache)], ()
            encoder = Part(encoder_inputs(inputs), encoder_forward, ENCODER_FILE)
            return [encoder, Part(decoder_step(model, inputs), decoder_forward, DECODER_FILE)], ()
    except Exception as error:  # the model's own forward can raise anything
        raise MELoRAError(
            f"`{type(model).__name__}` does not accept `example_inputs`: {type(error).__name__}: {error}"
        ) from error


def sites_in(model: nn.Module, part: Part, sites: Mapping[str, AdapterSite]) -> dict[str, AdapterSite]:
    """Returns the sites that a part of the model computes with: those whose A gets a gradient from its outputs."""
    if part.file is None or not sites:
        return dict(sites)
    with own_attributes(model), part.forward(model), in_mode(model, training=False), torch.enable_grad():
        tensors = {name: site.lora_a for name, site in sites.items()}
        needed = [tensor.requires_grad for tensor in tensors.values()]
        for tensor in tensors.values():
            tensor.requires_grad_(True)
        try:
            outputs = model(**part.inputs)
            total = sum(value.sum() for value in outputs.values() if value.is_floating_point())
            found = torch.autograd.grad(total, [*tensors.values()], allow_unused=True)
        finally:
            for tensor, was_needed in zip(tensors.values(), needed, strict=True):
                tensor.requires_grad_(was_needed)
    used = [name for name, gradient in zip(tensors, found, strict=True) if gradient is not None]
    return {name: sites[name] for name in used}
