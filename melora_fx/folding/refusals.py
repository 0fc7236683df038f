"""Refuses what a fold in memory must not merge: weights that cannot be changed, or that others use."""

from collections.abc import Iterable

import torch
from torch import nn

from melora_fx.adapter.update import non_finite
from melora_fx.capture.packed import is_packed_linear
from melora_fx.distributed.tensors import is_sharded, own_part
from melora_fx.distributed.wrappers import class_inside
from melora_fx.errors import MELoRAError
from melora_fx.names import site_of
from melora_fx.rewriting.module import replaced_forward
from melora_fx.rewriting.sites import AdapterSite, resized
from melora_fx.shared_memory import sharing_parameters
from melora_fx.torch_private import registered

from .site_weight import oriented_weight

_DEQUANTISE = "save the adapter, load it into the dequantised base, fold, and quantise again (docs/FOLD.md)"

_PARAMETRIZED = "its module was parametrized after `rewrite`: call `parametrize.remove_parametrizations` first"


def refuse_unfoldable(found: dict[str, AdapterSite]) -> None:
    """Raises MELoRAError if a weight cannot be changed, or a sum would not be finite."""
    lines = [f"`{name}`: {reason}" for name, site in found.items() if (reason := _obstacle(site))]
    if lines:
        raise MELoRAError("cannot fold:\n" + "\n".join(lines))


def refuse_parametrized(found: dict[str, AdapterSite], action: str) -> None:
    """Raises MELoRAError if the original class of a module could not be restored."""
    lines = [f"`{name}`: {_PARAMETRIZED}" for name, site in found.items() if _is_changed_since(site.module)]
    if lines:
        raise MELoRAError(f"cannot {action}:\n" + "\n".join(lines))


def refuse_replaced_forward(found: dict[str, AdapterSite], action: str) -> None:
    """Raises MELoRAError if the forward of a module would keep the adapter; `action`: "fold" or "unload"."""
    names = [f"`{name}`" for name, site in found.items() if replaced_forward(site.module)]
    if names:
        raise MELoRAError(
            f"cannot {action} {', '.join(names)}: its `forward` was replaced on the instance after `rewrite`, as "
            "accelerate does, and would keep the adapter: "
            "call `accelerator.unwrap_model(model, keep_fp32_wrapper=False)` first"
        )


def shared_sites(model: nn.Module, found: dict[str, AdapterSite]) -> dict[str, list[str]]:
    """Maps each site whose weight overlaps other parameters of the model in memory to the names of the others."""
    shared = {site_of(name): others for name, others in sharing_parameters(model).items()}
    return {name: [site_of(other) for other in shared[name]] for name in found if name in shared}


def refuse_shared(shared: dict[str, list[str]]) -> None:
    """Raises MELoRAError if `shared_sites` has found any."""
    if not shared:
        return
    lines = [f"`{name}` shares its weight with {', '.join(map(repr, users))}" for name, users in shared.items()]
    raise MELoRAError(
        "\n".join(lines) + "\nfolding would change the others too: `fold(model, untie=True)` copies the weight first"
    )


def refuse_untying(found: dict[str, AdapterSite], shared: Iterable[str]) -> None:
    """Raises MELoRAError if a shared weight is sharded, because FSDP keeps one parameter for all its names."""
    if names := [f"`{name}`" for name in shared if is_sharded(found[name].weight)]:
        raise MELoRAError(
            f"{', '.join(names)}: sharded over processes, so `untie` cannot give it its own weight: save the adapter, "
            "and fold it in one process"
        )


def _is_changed_since(module: nn.Module) -> bool:
    """Returns whether someone has exchanged the class of a rewritten module, as parametrizing its tensors does."""
    return "melora_replaced" not in vars(class_inside(module))


def _obstacle(site: AdapterSite) -> str | None:
    """Returns why the site cannot be folded, or None."""
    if is_packed_linear(site.owner):
        return f"the weight of a {site.pattern} is packed: {_DEQUANTISE}"
    if site.record.parameter_name not in registered(site.owner)[0]:
        return "its weight is pruned or parametrized: make it permanent first"
    if _is_changed_since(site.module):
        return _PARAMETRIZED
    if reason := resized(site):
        return reason
    weight = own_part(site.weight)
    if type(weight) is not torch.Tensor or not weight.is_floating_point():
        kind = f"{type(weight).__name__} of {weight.dtype}"
        return f"its weight is a {kind}: {_DEQUANTISE}"
    if weight.is_meta:
        return "its weight is on the meta device: load the model's weights first"
    if weight.is_inference() and not torch.is_inference_mode_enabled():
        return "its weight was made in `torch.inference_mode`: load the model outside of it, or fold inside"
    return non_finite(site.tensors, weight.dtype, lambda: oriented_weight(site))
