"""Reads and switches the adapters of a rewritten model."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from melora_fx.adapter.site import SiteRecord, owner_of
from melora_fx.adapter.tensors import FACTORS, SCALING, AdapterTensors, factor_names, features_of, num_matrices
from melora_fx.config import MELoRAConfig
from melora_fx.distributed.placement import added_bytes
from melora_fx.distributed.tensors import as_parameter, is_sharded, own_part, whole
from melora_fx.distributed.wrappers import is_held_from_above, reshard
from melora_fx.errors import MELoRAError
from melora_fx.lowering.adapted_linear import RESIZED
from melora_fx.lowering.lowerings import lowering_named
from melora_fx.matching.refusals import refuse_opaque, refuse_partitioned
from melora_fx.names import join_path
from melora_fx.patterns.node import weight_of

from .adapted_module import AdaptedModule, code_of, rewritten_modules
from .marks import root_marks
from .running import run_adapted, run_base


@dataclass(frozen=True)
class AdapterSite:
    """One site of a rewritten model. Its tensors are the model's own, not copies.

    N: num_blocks, R: the largest rank of a block, I: in_features, O: out_features, P: parts of `split` (1 without it).
    A stack has E matrices, such as the experts of a mixture; block i of expert e has index e·N + i among the E·N.

    Attributes:
        name: the site's dotted name in the model.
        config: the adapter's configuration.
        pattern: the kind of linear that was recognised.
        lowering: how the site is computed in training.
        in_features: I, the number of inputs of one matrix.
        out_features: O, the number of its outputs.
        weight_is_transposed: whether the weight is stored as (I, O).
        weight: the base parameter: (O, I), or (I, O) if `weight_is_transposed`; (E, O, I) or (E, I, O) for a stack; for
            a packed linear a tensor (O, I) on the meta device. One matrix may have three dimensions, such as
            (I, heads, O / heads): `record.matrices_of(weight)` returns it as a matrix.
        lora_a: (N, P·R, I/N), or (E·N, P·R, I/N) for a stack.
        lora_b: (N, O/N, R), or (E·N, O/N, R) for a stack.
        scaling: the scaling s_i of each block, (N, 1, 1), or (E·N, 1, 1) for a stack.
        owner: the module that holds these tensors.
        record: what the rewritten module stores about the site.
        module: the rewritten module that computes the site, often the owner itself.
    """

    name: str
    config: MELoRAConfig
    pattern: str
    lowering: str
    in_features: int
    out_features: int
    weight_is_transposed: bool
    weight: torch.Tensor
    lora_a: nn.Parameter
    lora_b: nn.Parameter
    scaling: torch.Tensor
    owner: nn.Module
    record: SiteRecord
    module: AdaptedModule

    @property
    def code(self) -> str:
        """The Python code that computes the site."""
        return code_of(self.module)

    @property
    def tensors(self) -> AdapterTensors:
        """A and B with the configuration, in the form that folds and files need."""
        return AdapterTensors(self.config, self.lora_a, self.lora_b)

    @property
    def is_absent(self) -> bool:
        """Whether the adapter loaded last lacks the site: A and B are then zero, in training too, and not saved."""
        return self.record.is_absent

    @property
    def num_experts(self) -> int:
        """The number of matrices in the weight; 1 if it is not a stack."""
        return num_matrices(self.record.matrices_of(self.weight))

    @property
    def num_bytes(self) -> int:
        """Bytes that this process holds for the adapter in addition to the base: A, B and the scaling."""
        held = [own_part(tensor) for tensor in (self.lora_a, self.lora_b, self.scaling)]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    @property
    def num_reduced_bytes(self) -> int:
        """Bytes of gradients that each step sums over the processes of a tensor-parallel linear for its adapter: 0 if
        `num_blocks` is a multiple of the number of processes, so that each process has its own blocks.
        """
        return added_bytes(self.lora_a, self.lora_b, self.scaling)


def sites(model: nn.Module) -> dict[str, AdapterSite]:
    """Returns the rewritten sites of `model` by name, in the model's order; empty for a plain model.

    If the model is sharded over processes, the tensors are what each process trains: DTensors. FSDP's root may still
    hold full parameters after a forward; they are freed, so call `sites` between forwards.

    Args:
        model: a plain or rewritten model, or a wrapper around one.

    Raises:
        MELoRAError: if the model is rewritten and ZeRO-3 has partitioned its weights.
    """
    reshard(model)
    if _is_rewritten(model):
        refuse_partitioned(model, "sites")
    return {
        record.site_name(path): make_site(path, module, record)
        for path, module in rewritten_modules(model)
        for record in module.melora_mark.records
    }


def make_site(path: str, module: AdaptedModule, record: SiteRecord) -> AdapterSite:
    """Returns the public view of one record of the rewritten module at `path`."""
    owner = owner_of(module, record)
    weight = weight_of(owner, record.parameter_name)
    in_features, out_features = features_of(record.matrices_of(weight), is_transposed=record.weight_is_transposed)
    lora_a, lora_b, scaling = (getattr(owner, record.attribute(kind)) for kind in (*FACTORS, SCALING))
    return AdapterSite(
        name=record.site_name(path),
        config=record.config,
        pattern=record.pattern,
        lowering=lowering_named(record.lowering).shown_as,
        in_features=in_features,
        out_features=out_features,
        weight_is_transposed=record.weight_is_transposed,
        weight=weight,
        lora_a=lora_a,
        lora_b=lora_b,
        scaling=scaling,
        owner=owner,
        record=record,
        module=module,
    )


def whole_sites(found: Mapping[str, AdapterSite]) -> dict[str, AdapterSite]:
    """Returns the sites with all of A, B and scaling on each process. Gathers sharded ones, which is a collective."""
    return {name: _whole_site(site) for name, site in found.items()}


def _whole_site(site: AdapterSite) -> AdapterSite:
    tensors: Any = [site.lora_a, site.lora_b, site.scaling]
    if not any(map(is_sharded, tensors)):
        return site
    lora_a, lora_b, scaling = map(whole, tensors)
    return replace(
        site, lora_a=as_parameter(lora_a, tensors[0]), lora_b=as_parameter(lora_b, tensors[1]), scaling=scaling
    )


def require_sites(model: nn.Module, action: str) -> dict[str, AdapterSite]:
    """Returns `sites(model)`; raises MELoRAError if there are none or a wrapper, ZeRO-3 or FSDP hides their tensors."""
    require_rewritten(model, action)
    refuse_partitioned(model, action)
    found = sites(model)
    held = [name for name, site in found.items() if is_held_from_above(site.owner, (site.weight, site.lora_a))]
    if held:
        raise MELoRAError(
            f"`{action}`: `{held[0]}` currently has FSDP's full parameters, which belong to a module above this "
            f"{type(model).__name__}: call it with the model that `fully_shard` was called with last"
        )
    return found


def require_rewritten(model: nn.Module, action: str) -> None:
    """Raises MELoRAError if `model` has no sites or a wrapper hides them."""
    refuse_opaque(model, action)
    if not _is_rewritten(model):
        raise MELoRAError(f"`{action}` needs a rewritten model, but this {type(model).__name__} has no adapter sites")


def _is_rewritten(model: nn.Module) -> bool:
    return next(rewritten_modules(model), None) is not None


def resized(site: AdapterSite) -> str | None:
    """Returns why the adapter of `site` no longer fits its weight, or None if it fits."""
    in_features = site.config.num_blocks * site.lora_a.size(2)
    out_features = site.config.num_blocks * site.lora_b.size(1)
    if (site.in_features, site.out_features) == (in_features, out_features):
        return None
    weight_shape = (site.out_features, site.in_features)
    return f"its weight is {weight_shape} and its adapter is for {(out_features, in_features)}: {RESIZED}"


def warn_of_lost_sites(model: nn.Module, found: Mapping[str, AdapterSite]) -> None:
    """Warns if modules that `rewrite` has adapted are no longer in `model`, whose present sites are `found`."""
    lost: list[str] = []
    for path, _, mark in root_marks(model):
        names = [join_path(path, name) for name in mark.sites]
        lost += [f"`{name}`" for name in names if name not in found]
    if lost:
        warnings.warn(f"{', '.join(lost)}: adapted by `rewrite`, and replaced, removed or folded since", stacklevel=3)


def is_folded(model: nn.Module) -> bool:
    """Returns whether `model` is inside a `folded` block."""
    return any(module.melora_mark.is_folded for _, module in rewritten_modules(model))


def is_disabled(model: nn.Module) -> bool:
    """Returns whether `model` is inside a `disabled` block."""
    return not is_folded(model) and any(_runs_base(module) for _, module in rewritten_modules(model))


def refuse_folded(model: nn.Module, action: str) -> None:
    """Raises MELoRAError if `model` is inside a `folded` block."""
    if is_folded(model):
        raise MELoRAError(f"`{action}` inside `folded` would mistake the merged weights for the base: call it outside")


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the adapters' parameters by name, `<site>.lora_a` and `<site>.lora_b`; pass them to the optimizer.

    They are the model's own, not copies, with the shapes of `AdapterSite`; empty for a plain model.

    Args:
        model: a plain or rewritten model, or a wrapper around one.
    """
    reshard(model)
    parameters: dict[str, nn.Parameter] = {}
    for path, module in rewritten_modules(model):
        for record in module.melora_mark.records:
            factors = (getattr(owner_of(module, record), record.attribute(kind)) for kind in FACTORS)
            parameters |= zip(factor_names(record.site_name(path)), factors, strict=True)
    return parameters


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Makes `model` compute the base's outputs inside the block, bit for bit, for any values of the adapters.

    Modules kept trainable are not affected. Compiled code stays valid: the first use compiles the base once, and later
    uses reuse it.

    Args:
        model: a rewritten model, or a wrapper around one.

    Raises:
        MELoRAError: if the model has no sites or a wrapper hides them, and inside `folded`, because the weights are
            not the base's there.
    """
    require_rewritten(model, "disabled")
    refuse_folded(model, "disabled")
    with running_base(model):
        yield


@contextmanager
def running_base(model: nn.Module) -> Iterator[None]:
    """Makes every rewritten module run its base inside the block."""
    switched = [module for _, module in rewritten_modules(model) if not _runs_base(module)]
    try:
        for module in switched:
            run_base(module)
        yield
    finally:
        for module in switched:
            run_adapted(module)


def _runs_base(module: AdaptedModule) -> bool:
    return module.melora_mark.runs_base
