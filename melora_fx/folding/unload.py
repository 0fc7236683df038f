"""Takes adapters out of a model in memory; `fold` does so when it has merged them."""

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
    """The model without its adapters, nothing merged; changed in place.

    Weights of sites, module types, hooks, `requires_grad` and the keys of the `state_dict` are as before `rewrite`, bit
    for bit. What was kept trainable and the statistics of norms stay as they are now: their old values are nowhere. A
    whole capture stays a GraphModule, the plain one. A `torch.compile` wrapper is unloaded inside, and compiles anew.

    Call `save_adapter` before, to keep the adapters; `disabled` leaves them out for a while only.

    Raises:
        MELoRAError: for a plain model, inside `folded`, and where another has replaced a forward or a class of the
            model since `rewrite`; nothing is changed then.
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
    """Takes away all that `rewrite` has put on modules, and puts `requires_grad` back."""
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
