"""Removes the adapters of a model in memory; `fold` does so after it has merged them."""

from typing import TypeVar

from torch import nn

from melora_fx.adapter.site import owner_of
from melora_fx.adapter.tensors import TENSORS
from melora_fx.distributed.wrappers import forget_removed
from melora_fx.matching.refusals import refuse_change_under_zero3
from melora_fx.names import join_path, unwrap, without_wrappers
from melora_fx.rewriting.adapted_module import rewritten_modules
from melora_fx.rewriting.marks import ROOT_MARK, root_marks
from melora_fx.rewriting.module import uninstall
from melora_fx.rewriting.sites import refuse_folded, require_sites, warn_of_lost_sites
from melora_fx.rewriting.stale_optimizer import stop_watching
from melora_fx.rewriting.watch import stop_watching_reads

from .refusals import refuse_parametrized, refuse_replaced_forward

_Model = TypeVar("_Model", bound=nn.Module)


def unload(model: _Model) -> _Model:
    """Removes the adapters of `model` in place, without merging them, and returns the same model.

    Weights of sites, module types, hooks, `requires_grad` and the keys of the `state_dict` are as before `rewrite`, bit
    for bit. What was kept trainable and the statistics of norms keep their present values: the old ones are not stored.
    A whole capture stays a GraphModule, without adapters. A `torch.compile` wrapper is unloaded inside, and compiles
    again.

    Call `save_adapter` before `unload` to keep the adapters; `disabled` leaves them out only temporarily.

    Args:
        model: a rewritten model, changed in place.

    Raises:
        MELoRAError: if the model is plain or inside `folded`, or someone has replaced a forward or a class of the model
            since `rewrite`, and under DeepSpeed's ZeRO-3. Nothing is changed then.
    """
    refuse_change_under_zero3(model, "unload")
    found = require_sites(model, "unload")
    refuse_folded(model, "unload")
    warn_of_lost_sites(model, found)
    refuse_parametrized(found, "unload")
    refuse_replaced_forward(found, "unload")
    remove_adapters(unwrap(model))
    return model


def remove_adapters(model: nn.Module) -> None:
    """Removes everything that `rewrite` has put on modules, and restores `requires_grad`."""
    for _, module in list(rewritten_modules(model)):
        for record in module.melora_mark.records:
            owner = owner_of(module, record)
            for kind in TENSORS:
                if hasattr(owner, record.attribute(kind)):
                    nn.Module.__delattr__(owner, record.attribute(kind))
        uninstall(module)
    forget_removed(model)
    named = model.named_parameters(remove_duplicate=False)
    parameters = {without_wrappers(name): parameter for name, parameter in named}
    for path, root, mark in list(root_marks(model)):
        mark.patches.take_all_off(root)
        stop_watching(root)
        stop_watching_reads(root)
        del vars(root)[ROOT_MARK]
        for name, requires_grad in mark.requires_grad.items():
            parameter = parameters.get(join_path(path, name))
            if parameter is not None:
                parameter.requires_grad_(requires_grad)
