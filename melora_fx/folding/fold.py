"""Merges adapters into the weights of a model in memory, permanently or temporarily.

`adapter/update.py` defines the merge; this file restores everything else of the model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from melora_fx.adapter.update import Scratch
from melora_fx.distributed.tensors import own_part
from melora_fx.distributed.wrappers import reshard
from melora_fx.matching.refusals import refuse_change_under_zero3
from melora_fx.names import unwrap
from melora_fx.rewriting.sites import (
    AdapterSite,
    is_folded,
    refuse_folded,
    require_sites,
    running_base,
    warn_of_lost_sites,
    whole_sites,
)
from melora_fx.saving.model_adapter import adapter_of
from melora_fx.torch_private import preserve_versions

from .measured_fold import measure_fold
from .refusals import refuse_replaced_forward, refuse_shared, refuse_unfoldable, refuse_untying, shared_sites
from .report import FoldReport, make_report
from .site_weight import merge, oriented_weight, restore, saved_values
from .unload import remove_adapters

_Model = TypeVar("_Model", bound=nn.Module)


def fold(model: _Model, *, untie: bool = False) -> _Model:
    """Merges the adapters into the weights of `model`, removes every trace of them, and returns the same model.

    Module types, hooks and `requires_grad` are as before `rewrite`. A `torch.compile` wrapper is folded inside. Call it
    on every process if the model is sharded: weights are gathered one at a time, and each process keeps its shard.

    Args:
        model: a rewritten model, changed in place.
        untie: if True, does not refuse a site whose weight other modules also use: gives the site its own copy of the
            weight, and sets `tie_word_embeddings` to False.

    Raises:
        MELoRAError: if the model is plain or inside `folded`, a weight is shared or cannot be changed, a sum would not
            be finite, or someone has replaced a forward since `rewrite`, and under DeepSpeed's ZeRO-3. Nothing is
            changed then.
    """
    refuse_change_under_zero3(model, "fold")
    found = require_sites(model, "fold")
    inner = unwrap(model)
    refuse_folded(model, "fold")
    warn_of_lost_sites(model, found)
    found = whole_sites(found)
    refuse_unfoldable(found)
    refuse_replaced_forward(found, "fold")
    shared = shared_sites(inner, found)
    if not untie:
        refuse_shared(shared)
    refuse_untying(found, shared)
    for name in shared:
        _untie(inner, found[name])
    if shared:
        found = whole_sites(require_sites(model, "fold"))  # now with their own weights
    scratch = Scratch()
    with torch.no_grad():
        for site in found.values():
            merge(site, scratch)
    remove_adapters(inner)
    return model


def check_fold(model: nn.Module) -> FoldReport:
    """Measures what folding would lose to rounding, on the present values; the model is not changed.

    Warns if a site loses more than a quarter of its adapter; the warning names the worst site and the remedy. Call it
    on every process if the model is sharded.

    Args:
        model: a rewritten model.

    Returns:
        what folding would do to the weight of each site.

    Raises:
        MELoRAError: if the model is plain or inside `folded`, a weight cannot be changed, or a sum would not be finite.
    """
    found = require_sites(model, "check_fold")
    refuse_folded(model, "check_fold")
    found = whole_sites(found)
    refuse_unfoldable(found)
    adapter = adapter_of(model)
    scratch = Scratch()
    with torch.no_grad():
        measured = [
            measure_fold(name, found[name].tensors, oriented_weight(found[name]), scratch) for name in adapter.configs
        ]
    return make_report(measured, adapter.sha256)


@contextmanager
def folded(model: nn.Module) -> Iterator[None]:
    """Merges the adapters inside the block, and runs the base's graphs.

    After the block, and after an exception, the weights are as before, bit for bit. If the model was moved or cast
    inside the block, so are the restored weights. Inside another `folded` block it does nothing.

    Graphs recorded before the block can be backpropagated after it. Autograd refuses their backward inside the block.
    After the block, it refuses the backward of graphs recorded inside.

    Args:
        model: a rewritten model, whose weights are changed in place and restored.

    Raises:
        MELoRAError: as in `fold`, if a weight cannot be changed or is shared.
    """
    refuse_change_under_zero3(model, "folded")
    found = require_sites(model, "folded")
    if is_folded(model):
        yield
        return
    found = whole_sites(found)
    refuse_unfoldable(found)
    refuse_shared(shared_sites(unwrap(model), found))
    weights = [own_part(site.weight) for site in found.values()]
    tracked = [weight for weight in weights if not weight.is_inference()]
    saved: list[tuple[AdapterSite, list[torch.Tensor]]] = []
    scratch = Scratch()
    with preserve_versions(tracked):  # the bits are restored, so earlier graphs can be backpropagated afterwards
        try:
            with torch.no_grad():
                for site in found.values():
                    saved.append((site, saved_values(site)))
                    merge(site, scratch)
            for site in found.values():
                site.module.melora_mark.is_folded = True
            with running_base(model):
                yield
        finally:
            for site in found.values():
                site.module.melora_mark.is_folded = False
            reshard(model)
            with torch.no_grad():
                for site, originals in saved:  # into the present weight, since it may have been moved
                    restore(replace(site, weight=getattr(site.owner, site.record.parameter_name)), originals)


def _untie(model: nn.Module, site: AdapterSite) -> None:
    """Gives the site its own copy of the weight."""
    own = nn.Parameter(site.weight.detach().clone(), requires_grad=site.weight.requires_grad)
    setattr(site.owner, site.record.parameter_name, own)
    config: Any = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False
