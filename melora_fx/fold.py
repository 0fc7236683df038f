"""Merges adapters into the weights: Δ and sum in float32 or wider, rounded once to the weight's dtype.

    W' = W + blockdiag(s_1 B_1 A_1, …, s_N B_N A_N)

Only the N diagonal blocks, 1/N of the weight, are read and written.
N num_blocks, R the largest rank of a block, I in_features, O out_features, P parts of `split`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .adapter import AdapterSite, is_folded, refuse_folded, require_sites, running_base
from .config import MELoRAConfig
from .errors import MELoRAError
from .match import shared_parameters
from .rewrite import STATE, RewriteState
from .rewritten import FOLDED, TENSORS, owner_of, rewritten_modules, scaling_tensor, uninstall, unwrap


def delta_blocks(config: MELoRAConfig, lora_a: torch.Tensor, lora_b: torch.Tensor) -> list[torch.Tensor]:
    """The diagonal blocks of the update, one tensor (N, O_p/N, I/N) for each part p of `config.split`.

    The one place where an update is computed, for every kind of fold, in float32 or wider.

    Args:
        config: the site's configuration.
        lora_a: (N, P·R, I/N).
        lora_b: (N, O/N, R).
    """
    wide = torch.promote_types(lora_b.dtype, torch.float32)
    wide_b = lora_b.detach().to(wide)
    scaled = wide_b * scaling_tensor(config, wide_b)
    sizes = [size // config.num_blocks for size in config.parts(lora_b.size(0) * lora_b.size(1))]
    a_parts = lora_a.detach().to(wide).chunk(len(sizes), dim=1)
    return [torch.bmm(b, a) for b, a in zip(scaled.split(sizes, dim=1), a_parts, strict=True)]


def diagonal_blocks(config: MELoRAConfig, weight: torch.Tensor) -> list[torch.Tensor]:
    """Views (N, O_p/N, I/N) of the blocks of `weight` (O, I) that an adapter of `config` changes, one for each part."""
    num_blocks, in_features = config.num_blocks, weight.size(1)
    return [
        part.unflatten(0, (num_blocks, -1)).unflatten(2, (num_blocks, in_features // num_blocks)).diagonal(0, 0, 2)
        for part in weight.split(config.parts(weight.size(0)))
    ]


def add_blocks(weight_blocks: Sequence[torch.Tensor], deltas: Sequence[torch.Tensor]) -> None:
    """Adds each delta (N, o, i) to its view (o, i, N) of a weight, in the wider dtype, rounding once."""
    for block, delta in zip(weight_blocks, deltas, strict=True):
        block.copy_(delta.permute(1, 2, 0) + block)


def _fold_site(site: AdapterSite) -> None:
    add_blocks(_site_blocks(site), delta_blocks(site.config, site.lora_a, site.lora_b))


def _site_blocks(site: AdapterSite) -> list[torch.Tensor]:
    weight = site.weight.detach()
    return diagonal_blocks(site.config, weight.t() if site.weight_is_transposed else weight)


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
    _refuse_unfoldable(found)
    shared = _shared_sites(inner, found)
    if not untie:
        _refuse_shared(shared)
    for name in shared:
        _untie(inner, found[name])
    with torch.no_grad():
        for site in require_sites(model, "fold").values():
            _fold_site(site)
    _remove_adapters(inner)
    return model


@contextmanager
def folded(model: nn.Module) -> Iterator[None]:
    """Inside the block the adapters are merged and the graphs are the base's; afterwards the weights are as before,
    bit for bit, also after an exception. Inside another `folded` it does nothing.

    Raises:
        MELoRAError: as `fold`, for weights that cannot be changed. Shared weights are refused too.
    """
    found = require_sites(model, "folded")
    if is_folded(model):
        yield
        return
    _refuse_unfoldable(found)
    _refuse_shared(_shared_sites(unwrap(model), found))
    saved: list[tuple[AdapterSite, list[torch.Tensor]]] = []
    try:
        with torch.no_grad():
            for site in found.values():
                saved.append((site, [block.clone() for block in _site_blocks(site)]))
                _fold_site(site)
        for site in found.values():
            site.module.__dict__[FOLDED] = True
        with running_base(model):
            yield
    finally:
        for site in found.values():
            site.module.__dict__.pop(FOLDED, None)
        with torch.no_grad():
            for site, blocks in saved:
                for block, original in zip(_site_blocks(site), blocks, strict=True):
                    block.copy_(original)


def _refuse_unfoldable(found: dict[str, AdapterSite]) -> None:
    lines = []
    for name, site in found.items():
        if site.record.parameter_name not in site.owner._parameters:
            lines.append(f"`{name}`: its weight is pruned or parametrized: make it permanent first")
        elif type(site.weight.detach()) is not torch.Tensor or not site.weight.is_floating_point():
            kind = f"{type(site.weight.detach()).__name__} of {site.weight.dtype}"
            lines.append(f"`{name}`: its weight is a {kind}: dequantise the base, fold, and quantise again")
        elif site.weight.is_meta:
            lines.append(f"`{name}`: its weight is on the meta device: load the model's weights first")
        elif not all(torch.isfinite(value).all() for value in (site.lora_a, site.lora_b)):
            lines.append(f"`{name}`: its adapter holds NaN or infinity")
    if lines:
        raise MELoRAError("cannot fold:\n" + "\n".join(lines))


def _shared_sites(model: nn.Module, found: dict[str, AdapterSite]) -> dict[str, list[str]]:
    """The sites whose weight is another parameter of the model too: site name → names of the other users."""
    names = shared_parameters(model)
    others = {name: [other for other in names[id(site.weight)] if other != name] for name, site in found.items()}
    return {name: users for name, users in others.items() if users}


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
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for holder_path, holder in model.named_modules():
        state: RewriteState | None = holder.__dict__.pop(STATE, None)
        if state:
            holder.__dict__.pop("save_pretrained", None)
        for name, requires_grad in state.requires_grad.items() if state else ():
            parameter = parameters.get(f"{holder_path}.{name}" if holder_path else name)
            if parameter is not None:
                parameter.requires_grad_(requires_grad)
