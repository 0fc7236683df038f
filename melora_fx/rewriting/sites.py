"""Reading and switching the adapters of a rewritten model."""

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
    """Public: one site of a rewritten model. Its tensors are the model's own, not copies.

    N num_blocks, R the largest rank of a block, I in_features, O out_features, P parts of `split` (1 without).
    In a stack of E matrices, the experts of a mixture, block i of expert e is number e·N + i of E·N.

    Attributes:
        in_features, out_features: of one matrix.
        weight: the base parameter, (O, I), or (I, O) where `weight_is_transposed`; a stack is (E, O, I) or (E, I, O);
            of a packed linear a tensor (O, I) on the meta device. One matrix may have three dimensions, as
            (I, heads, O / heads): `record.matrices_of(weight)` is the matrix.
        lora_a: (N, P·R, I/N), or (E·N, P·R, I/N).
        lora_b: (N, O/N, R), or (E·N, O/N, R).
        scaling: s_i, (N, 1, 1) or (E·N, 1, 1).
        owner: the module that holds these tensors.
        record: what the rewritten module keeps about the site.
        module: the rewritten module whose graph computes the site, often the owner itself.
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
        """A and B with the configuration, as folds and files take them."""
        return AdapterTensors(self.config, self.lora_a, self.lora_b)

    @property
    def is_absent(self) -> bool:
        """Whether the adapter that was loaded last lacks the site: A and B are zero, in training too, and not saved."""
        return self.record.is_absent

    @property
    def num_experts(self) -> int:
        """How many matrices the weight is a stack of; 1 for a matrix."""
        return num_matrices(self.record.matrices_of(self.weight))

    @property
    def num_bytes(self) -> int:
        """Bytes that this process holds of the adapter beside the base: A, B and the scaling."""
        held = [own_part(tensor) for tensor in (self.lora_a, self.lora_b, self.scaling)]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    @property
    def num_reduced_bytes(self) -> int:
        """Bytes of gradients that each step adds up over the processes of a tensor-parallel linear for its adapter
        alone: 0 where `num_blocks` is a multiple of their number, so that each has blocks of its own.
        """
        return added_bytes(self.lora_a, self.lora_b, self.scaling)


def sites(model: nn.Module) -> dict[str, AdapterSite]:
    """The rewritten sites of `model` by name, in the model's order; empty for a plain model.

    Of a model that is sharded over processes, the tensors are what each process trains: DTensors. FSDP frees the whole
    parameters that its root may hold for that; so it is called between forwards.

    Raises:
        MELoRAError: for a rewritten model whose weights ZeRO-3 has partitioned.
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
    """The public view of one record of the rewritten module at `path`."""
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
    """The sites with all of A, B and scaling on each process: those that are sharded are gathered, by all together."""
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
    """`sites(model)`, or MELoRAError where there are none or a wrapper hides them."""
    require_rewritten(model, action)
    refuse_partitioned(model, action)
    found = sites(model)
    held = [name for name, site in found.items() if is_held_from_above(site.owner, (site.weight, site.lora_a))]
    if held:
        raise MELoRAError(
            f"`{action}`: `{held[0]}` has FSDP's whole parameters now, which belong to a module above this "
            f"{type(model).__name__}: call it with the model that `fully_shard` was called with last"
        )
    return found


def require_rewritten(model: nn.Module, action: str) -> None:
    """Raises MELoRAError for a model without sites, or where a wrapper hides them."""
    refuse_opaque(model, action)
    if not _is_rewritten(model):
        raise MELoRAError(f"`{action}` needs a rewritten model, but this {type(model).__name__} has no adapter sites")


def _is_rewritten(model: nn.Module) -> bool:
    return next(rewritten_modules(model), None) is not None


def resized(site: AdapterSite) -> str | None:
    """Why the adapter of `site` no longer fits its weight, or None."""
    in_features = site.config.num_blocks * site.lora_a.size(2)
    out_features = site.config.num_blocks * site.lora_b.size(1)
    if (site.in_features, site.out_features) == (in_features, out_features):
        return None
    weight_shape = (site.out_features, site.in_features)
    return f"its weight is {weight_shape} and its adapter is for {(out_features, in_features)}: {RESIZED}"


def warn_of_lost_sites(model: nn.Module, found: Mapping[str, AdapterSite]) -> None:
    """Warns where modules that `rewrite` had adapted are no longer in `model`, whose sites are `found`."""
    lost: list[str] = []
    for path, _, mark in root_marks(model):
        names = [join_path(path, name) for name in mark.sites]
        lost += [f"`{name}`" for name in names if name not in found]
    if lost:
        warnings.warn(f"{', '.join(lost)}: adapted by `rewrite`, and replaced, removed or folded since", stacklevel=3)


def is_folded(model: nn.Module) -> bool:
    """Whether `model` is inside a `folded` block."""
    return any(module.melora_mark.is_folded for _, module in rewritten_modules(model))


def is_disabled(model: nn.Module) -> bool:
    """Whether `model` is inside a `disabled` block."""
    return not is_folded(model) and any(_runs_base(module) for _, module in rewritten_modules(model))


def refuse_folded(model: nn.Module, action: str) -> None:
    """Raises MELoRAError inside a `folded` block."""
    if is_folded(model):
        raise MELoRAError(f"`{action}` inside `folded` would take the merged weights for the base: call it outside")


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters, `<site>.lora_a` and `<site>.lora_b`: what an optimizer should be given."""
    reshard(model)
    parameters: dict[str, nn.Parameter] = {}
    for path, module in rewritten_modules(model):
        for record in module.melora_mark.records:
            factors = (getattr(owner_of(module, record), record.attribute(kind)) for kind in FACTORS)
            parameters |= zip(factor_names(record.site_name(path)), factors, strict=True)
    return parameters


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside the block `model` computes the base's outputs, bit for bit, whatever the adapters hold.

    Modules kept trainable stay as they are. Compiled code stays valid: a first use compiles the base once, later uses
    reuse it.

    Raises:
        MELoRAError: for a model without sites, and inside `folded`, where the weights are not the base's.
    """
    require_rewritten(model, "disabled")
    refuse_folded(model, "disabled")
    with running_base(model):
        yield


@contextmanager
def running_base(model: nn.Module) -> Iterator[None]:
    """Inside the block every rewritten module runs its base."""
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
