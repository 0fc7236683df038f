"""Turns adapters into optional inputs of a graph: one session runs many adapters of any rank.

    y = x Wᵀ + b + concat_i( x_i Aᵀ_i (s_i B_i)ᵀ )      <site>.lora_a: (N, I/N, R)   <site>.lora_b: (N, R, O/N), scaled
    dense form: block-diagonal matrices of both         <site>.lora_a: (I, N·R)      <site>.lora_b: (N·R, O)

Each adapter tensor is an initializer that is also a graph input. Its default has rank 0: an empty product is zero, so
without an adapter the graph computes the base, bit for bit. The tensors of modules kept trainable become inputs too,
with their current values as defaults.

The model is translated with random adapters (`distinct_values`), and gets its own back when the weights have names
(`own_values`). The adapters' initializers become inputs before a fusion can take them for constants (`open_inputs`),
and the inputs get their defaults at the end (`attach_defaults`).

N num_blocks, I in_features, O out_features, R the rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import onnx_ir
import torch
from torch import nn

from exporters.adapters.ort_adapter import swap_tensors
from exporters.onnx_files.metadata import GraphFacts
from exporters.onnx_runtime import Arrays
from melora_fx import AdapterSite, MELoRAError, disabled
from melora_fx.adapter.tensors import factor_names
from melora_fx.rewriting.sites import is_disabled
from melora_fx.saving.model_adapter import adapter_of, kept_tensor_names
from melora_fx.torch_private import preserve_versions

from .export import AdapterTrial, Export, Sites
from .forms import initializer_names

_RANK_AXES = {"block": (2, 1), "dense": (1, 0)}
"""Form → the index of the rank axis of A's input, and of B's."""


def refuse_without_adapters(model: nn.Module, sites: Sites) -> None:
    """Raises MELoRAError if the model has no sites or computes its base."""
    if is_disabled(model):
        raise MELoRAError(
            '`adapter="swap"` turns the adapters into inputs, but `disabled` has switched them off: '
            "export outside of the block"
        )
    if not sites:
        raise MELoRAError(
            '`adapter="swap"` needs a rewritten model, whose sites say where adapters go: call `rewrite` first'
        )


@contextmanager
def distinct_values(model: nn.Module, sites: Sites) -> Iterator[None]:
    """Inside the block the adapters and the modules kept trainable have random values; afterwards their own again.

    The values are normal with variance 1 / (number of values that a product sums), so that an update is about as large
    as its input. Sites that the model's adapter lacks get values too; entries beyond an adapter's ranks are zero.
    Exporters store tensors of equal values once, such as the zeros of every untrained B, but inputs must stay separate.
    """
    own = model.state_dict()
    tensors = [tensor for site in sites.values() for tensor in (site.lora_a, site.lora_b)]
    tensors += [own[name] for name in kept_tensor_names(model)]
    tensors = [tensor for tensor in tensors if tensor.is_floating_point()]
    generator = torch.Generator().manual_seed(0)
    saved = [tensor.detach().clone() for tensor in tensors]
    absent = [site.record for site in sites.values() if site.is_absent]
    with preserve_versions([tensor for tensor in tensors if not tensor.is_inference()]):  # the bits are restored
        try:
            with torch.no_grad():
                for tensor in tensors:
                    tensor.copy_(torch.randn(tensor.shape, generator=generator) / tensor.shape[-1] ** 0.5)
                for site in sites.values():
                    _cut_to_rank(site)
            for record in absent:
                record.is_absent = False
            yield
        finally:
            for record in absent:
                record.is_absent = True
            with torch.no_grad():
                for tensor, values in zip(tensors, saved, strict=True):
                    tensor.copy_(values)


def _cut_to_rank(site: AdapterSite) -> None:
    """Sets entries beyond the rank of the site's adapter to zero, if the model was rewritten with a larger rank."""
    rank = max(site.config.ranks)
    if rank < site.lora_b.size(2):
        cut = site.tensors.with_rank(rank).with_rank(site.lora_b.size(2))
        site.lora_a.copy_(cut.lora_a)
        site.lora_b.copy_(cut.lora_b)


def own_values(export: Export) -> None:
    """Restores the model's own values."""
    export.values.close()


def open_inputs(export: Export) -> None:
    """Turns the adapters' initializers into inputs with a rank axis, and those of modules kept trainable into inputs.

    Initially the inputs have no default, so that no fusion takes them for constants. The defaults are in
    `export.defaults`.

    Raises:
        MELoRAError: if the exporter has folded one of these tensors into others.
    """
    _refuse_lost(export)
    opened = _adapter_inputs(export) | _kept_inputs(export)
    for value in opened:
        export.graph.initializers.pop(value.name or "")
        value.const_value = None
        export.graph.inputs.append(value)
    export.defaults = {value.name or "": tensor for value, tensor in opened.items()}


def attach_defaults(export: Export) -> None:
    """Makes the inputs optional: an initializer with the name of an input is its default."""
    for value in export.graph.inputs:
        default = export.defaults.get(value.name or "")
        if default is not None:
            value.const_value = onnx_ir.tensor(default.contiguous().clone(), name=value.name)
            export.graph.register_initializer(value)


def swap_trials(model: nn.Module, sites: Sites, facts: GraphFacts) -> Iterator[AdapterTrial]:
    """Yields three trials: without an adapter, with the model's own, and with a random one."""
    inputs = partial(_present_inputs, model, facts)
    yield AdapterTrial("no", disabled(model), dict)
    yield AdapterTrial("own", nullcontext(), inputs)
    yield AdapterTrial("random", distinct_values(model, sites), inputs)


def _present_inputs(model: nn.Module, facts: GraphFacts) -> Arrays:
    return swap_tensors(adapter_of(model), facts)


def _refuse_lost(export: Export) -> None:
    initializers = export.graph.initializers
    lost = {
        site
        for site, form in export.forms.items()
        if any(name not in initializers for name in initializer_names(site, form))
    }
    lost |= {name for name, place in export.kept.items() if place is None}
    if lost:
        raise MELoRAError(
            f"{', '.join(f'`{name}`' for name in sorted(lost))}: the exporter writes these tensors in pieces (`split`) "
            "or folds them into others, so they cannot be inputs: export with `keep` or `fold`"
        )


def _adapter_inputs(export: Export) -> dict[onnx_ir.Value, torch.Tensor]:
    """Names and shapes the adapters' graph values as inputs; returns them with their defaults of rank 0."""
    inputs = {}
    for index, site in enumerate(export.sites):
        form = export.forms[site]
        initializers = initializer_names(site, form)
        for name, initializer, rank_axis in zip(factor_names(site), initializers, _RANK_AXES[form], strict=True):
            value = export.graph.initializers[initializer]
            sizes = [size for size in value.shape or () if isinstance(size, int)]
            if rank_axis == _RANK_AXES[form][0]:
                _forget_rank_after(value)
            value.name = name
            value.shape = onnx_ir.Shape([f"rank_{index}" if axis == rank_axis else n for axis, n in enumerate(sizes)])
            inputs[value] = torch.zeros([0 if axis == rank_axis else n for axis, n in enumerate(sizes)])
    return inputs


def _forget_rank_after(lora_a: onnx_ir.Value) -> None:
    """Clears the last axis of the products with A: it has the rank that the model was rewritten with."""
    for user in lora_a.consumers():
        for output in user.outputs:
            if output.shape is not None:
                output.shape = onnx_ir.Shape([*output.shape[:-1], None])


def _kept_inputs(export: Export) -> dict[onnx_ir.Value, torch.Tensor]:
    """Returns the graph values of the tensors of modules kept trainable, with their current values as defaults."""
    own = export.model.state_dict()
    inputs = {}
    for name, place in export.kept.items():
        assert place is not None
        value = export.graph.initializers[place.initializer]
        inputs[value] = own[name].t() if place.is_transposed else own[name]
    return inputs
