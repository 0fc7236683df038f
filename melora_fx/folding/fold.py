"""Merges adapters into the weights of a model in memory, for good or for a while.

`update.py` says what a merge is; here is what must be refused, and how everything else of the model comes back.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from melora_fx.adapter.site import TENSORS, owner_of
from melora_fx.adapter.tensors import by_matrix, diagonal_blocks
from melora_fx.adapter.update import Scratch, add_update, non_finite
from melora_fx.capture.packed import is_packed_linear
from melora_fx.errors import MELoRAError
from melora_fx.names import join_path, unwrap, without_wrappers
from melora_fx.rewriting.hugging_face import detach
from melora_fx.rewriting.module import replaced_forward, rewritten_modules, uninstall
from melora_fx.rewriting.rewrite_state import REWRITE_STATE_ATTRIBUTE, RewriteState
from melora_fx.rewriting.running import FOLDED_ATTRIBUTE
from melora_fx.rewriting.sites import (
    AdapterSite,
    is_folded,
    refuse_folded,
    require_sites,
    resized,
    running_base,
    warn_of_lost_sites,
)
from melora_fx.saving.model_adapter import adapter_of
from melora_fx.torch_private import preserve_versions, registered

from .measured import measure_update
from .report import FoldReport, make_report
from .shared_memory import in_one_memory


def fold(model: nn.Module, *, untie: bool = False) -> nn.Module:
    """The model with its adapters merged into the weights and no trace of them left; changed in place.

    Module types, hooks and `requires_grad` are again as before `rewrite`. A `torch.compile` wrapper is folded inside.

    Args:
        model: a rewritten model.
        untie: gives a site whose weight other modules also use a copy of its own, and sets `tie_word_embeddings` to
            False, instead of refusing.

    Raises:
        MELoRAError: for a plain model, a shared weight, or a weight that cannot be changed; nothing is changed then.
    """
    found = require_sites(model, "fold")
    inner = unwrap(model)
    refuse_folded(model, "fold")
    warn_of_lost_sites(model, found)
    _refuse_unfoldable(found)
    _refuse_replaced_forward(found)
    shared = _shared_sites(inner, found)
    if not untie:
        _refuse_shared(shared)
    for name in shared:
        _untie(inner, found[name])
    scratch = Scratch()
    with torch.no_grad():
        for site in (require_sites(model, "fold") if shared else found).values():
            add_update(site.config, oriented_weight(site), site.lora_a, site.lora_b, scratch)
    _remove_adapters(inner)
    return model


def check_fold(model: nn.Module) -> FoldReport:
    """What folding will round away, measured on the present values; the model is not changed.

    Warns, naming the worst site and the remedy, where a site loses more than a quarter of its adapter.

    Raises:
        MELoRAError: for a plain model, inside `folded`, and for weights that cannot be changed.
    """
    found = require_sites(model, "check_fold")
    refuse_folded(model, "check_fold")
    _refuse_unfoldable(found)
    scratch = Scratch()
    with torch.no_grad():
        measured = [
            measure_update(name, site.config, oriented_weight(site), site.lora_a, site.lora_b, scratch, write=False)
            for name, site in found.items()
        ]
    return make_report(measured, adapter_of(model).sha256)


@contextmanager
def folded(model: nn.Module) -> Iterator[None]:
    """Inside the block the adapters are merged and the graphs are the base's; afterwards the weights are as before,
    bit for bit, also after an exception. Inside another `folded` it does nothing.

    A backward that is pending when the block begins is right after it; inside, autograd refuses it, as it refuses after
    the block the backward of a forward inside.

    Raises:
        MELoRAError: as `fold`, for weights that cannot be changed. Shared weights are refused too.
    """
    found = require_sites(model, "folded")
    if is_folded(model):
        yield
        return
    _refuse_unfoldable(found)
    _refuse_shared(_shared_sites(unwrap(model), found))
    weights = {name: oriented_weight(site) for name, site in found.items()}
    tracked = [weight for weight in weights.values() if not weight.is_inference()]
    saved: list[tuple[torch.Tensor, torch.Tensor]] = []
    scratch = Scratch()
    with preserve_versions(tracked):  # the bits come back: graphs recorded before may be backpropagated afterwards
        try:
            with torch.no_grad():
                for name, site in found.items():
                    saved += [(block, block.clone()) for block in changed_blocks(site)]
                    add_update(site.config, weights[name], site.lora_a, site.lora_b, scratch)
            for site in found.values():
                site.module.__dict__[FOLDED_ATTRIBUTE] = True
            with running_base(model):
                yield
        finally:
            for site in found.values():
                site.module.__dict__.pop(FOLDED_ATTRIBUTE, None)
            with torch.no_grad():
                for block, original in saved:
                    block.copy_(original)


def changed_blocks(site: AdapterSite) -> Iterator[torch.Tensor]:
    """Views of the blocks of the site's weight that a fold changes, one (N, O_p/N, I/N) for each part of `split`
    and each matrix of a stack.
    """
    for matrix, _, _ in by_matrix(oriented_weight(site), site.lora_a, site.lora_b):
        yield from diagonal_blocks(matrix, site.config.num_blocks, site.config.parts(site.out_features))


def oriented_weight(site: AdapterSite) -> torch.Tensor:
    """The site's weight as (O, I) or (E, O, I), a view."""
    weight = site.weight.detach()
    return weight.mT if site.weight_is_transposed else weight


def _refuse_unfoldable(found: dict[str, AdapterSite]) -> None:
    lines = [f"`{name}`: {reason}" for name, site in found.items() if (reason := _obstacle(site))]
    if lines:
        raise MELoRAError("cannot fold:\n" + "\n".join(lines))


def _refuse_replaced_forward(found: dict[str, AdapterSite]) -> None:
    names = [f"`{name}`" for name, site in found.items() if replaced_forward(site.module)]
    if names:
        raise MELoRAError(
            f"cannot fold {', '.join(names)}: its `forward` was replaced on the instance after `rewrite`, as accelerate"
            " does, and would keep the adapter: `accelerator.unwrap_model(model, keep_fp32_wrapper=False)` first"
        )


_DEQUANTISE = "save the adapter, load it into the dequantised base, fold, and quantise again (docs/FOLD.md)"


def _obstacle(site: AdapterSite) -> str | None:
    """Why the site cannot be folded, or None."""
    if is_packed_linear(site.owner):
        return f"the weight of a {site.pattern} is packed: {_DEQUANTISE}"
    if site.record.parameter_name not in registered(site.owner)[0]:
        return "its weight is pruned or parametrized: make it permanent first"
    if reason := resized(site):
        return reason
    weight = site.weight.detach()
    if type(weight) is not torch.Tensor or not weight.is_floating_point():
        kind = f"{type(weight).__name__} of {weight.dtype}"
        return f"its weight is a {kind}: {_DEQUANTISE}"
    if weight.is_meta:
        return "its weight is on the meta device: load the model's weights first"
    if weight.is_inference() and not torch.is_inference_mode_enabled():
        return "its weight was made in `torch.inference_mode`: load the model outside of it, or fold inside"
    return non_finite(site.config, oriented_weight(site), site.lora_a, site.lora_b)


def _shared_sites(model: nn.Module, found: dict[str, AdapterSite]) -> dict[str, list[str]]:
    """The sites whose weight is in part another parameter of the model too: site name → names of the others."""
    shared: dict[str, list[str]] = {}
    for names in in_one_memory(model):
        shared |= {name: [other for other in names if other != name] for name in names if name in found}
    return shared


def _refuse_shared(shared: dict[str, list[str]]) -> None:
    if not shared:
        return
    lines = [f"`{name}` shares its weight with {', '.join(map(repr, users))}" for name, users in shared.items()]
    raise MELoRAError(
        "\n".join(lines) + "\nfolding would change those too: `fold(model, untie=True)` copies the weight first"
    )


def _untie(model: nn.Module, site: AdapterSite) -> None:
    """Gives the site a weight of its own."""
    own = nn.Parameter(site.weight.detach().clone(), requires_grad=site.weight.requires_grad)
    setattr(site.owner, site.record.parameter_name, own)
    config: Any = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False


def _remove_adapters(model: nn.Module) -> None:
    for _, module in list(rewritten_modules(model)):
        for record in module.melora_records:
            owner = owner_of(module, record)
            for kind in TENSORS:
                if hasattr(owner, record.attribute(kind)):
                    delattr(owner, record.attribute(kind))
        uninstall(module)
    named = model.named_parameters(remove_duplicate=False)
    parameters = {without_wrappers(name): parameter for name, parameter in named}
    for holder_path, holder in model.named_modules():
        detach(holder)
        state: RewriteState | None = holder.__dict__.pop(REWRITE_STATE_ATTRIBUTE, None)
        for name, requires_grad in state.requires_grad.items() if state else ():
            parameter = parameters.get(without_wrappers(join_path(holder_path, name)))
            if parameter is not None:
                parameter.requires_grad_(requires_grad)
