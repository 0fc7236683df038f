"""Sums and multiples of adapters, as adapters: what is written has exactly the update that the formula says.

    Δ = Σ_k w_k Δ_k      blocks by blocks: B_i = [f_1i B_1i, …, f_Ki B_Ki]   A_i = [A_1i; …; A_Ki]
    s_i = max_k |w_k s_ki|,   f_ki = w_k s_ki / s_i

Ranks stand side by side and add up. Mixing A with A and B with B instead gives the products of one adapter's A with
another one's B too, which nobody has trained.

N num_blocks, I in_features, O out_features, R the largest rank of a block, P parts of `split`, E matrices of a stack.
"""

import dataclasses
import math
import numbers
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from melora_fx import MELoRAError
from melora_fx.adapter.tensors import AdapterTensors
from melora_fx.config import MELoRAConfig, alpha_for, one_or_each
from melora_fx.files import output_path
from melora_fx.saving.adapter import Adapter
from melora_fx.saving.adapter_file import read_adapter

from .derived import Kept, all_sites, are_equal, refuse_other_bases, write_derived

Place = str | os.PathLike[str]
_Weighted = tuple[float, Adapter]
_Term = tuple[float, AdapterTensors]


def scale_adapter(adapter_dir: Place, factor: float, out_dir: Place) -> None:
    """Writes an adapter whose update is that of another one times `factor`.

    Exact: alpha is multiplied, a negative factor changes the sign of B. With 0 B is zero and A stays, an adapter
    without effect that can be trained.

    Args:
        adapter_dir: a folder written by `save_adapter`.
        factor: what Δ is multiplied by.
        out_dir: the folder to write; an adapter that is there is replaced.

    Raises:
        ValueError, TypeError: for a factor that is no finite number.
        MELoRAError: for a folder that cannot be read or written, the same folder twice, an adapter with a trained head
            unless the factor is 1, or an alpha out of the range of `MELoRAConfig`. Nothing is written then.
    """
    factor = _checked_number("`factor`", factor)
    adapter = read_adapter(adapter_dir)
    if adapter.kept and factor != 1:
        raise MELoRAError(
            f"`{adapter.directory}` has trained {_listed(adapter.kept)} whole, which is no update that could be "
            "multiplied: `add_adapters({folder: factor}, out)` multiplies the updates alone, and keeps it as it is"
        )
    updates = {name: _scaled(name, factor, adapter.tensors_of(name)) for name in adapter.configs}
    write_derived(output_path(out_dir), [adapter], updates, adapter.kept, adapter.kept_tensors())


def add_adapters(adapters: Mapping[str, float] | Mapping[Path, float] | Mapping[Place, float], out_dir: Place) -> None:
    """Writes the weighted sum of adapters, Σ w_k Δ_k, as one adapter.

    The ranks of each block are put side by side, so that their number is the sum of the adapters' and the result *is*
    the sum: as PEFT's combination_type="cat". Its "linear", and TIES and DARE, mix A with A and B with B instead, and
    get the products of unlike adapters too. `compress_adapter` takes ranks away again.

    B keeps its bits where all |w_k s_i| are equal, and its dtype where the ratios are exact in it; else the result is
    rounded once, to float32. A site that only some adapters have comes from these. Adapters of weight 0 are checked and
    left out. A trained head is kept as it is, whatever the weights: all adapters that have one must have the same.
    Settings that only training needs (dropout, init) are those of the first adapter that has the site.

    Args:
        adapters: folder written by `save_adapter` → its weight, which may be negative. One folder under two spellings
            is counted twice.
        out_dir: the folder to write; an adapter that is there is replaced.

    Raises:
        ValueError, TypeError: for no adapters, or weights that are no finite numbers or all 0.
        MELoRAError: for folders that cannot be read or written, the same folder to read and write, adapters of several
            bases or with other blocks, other trained heads, or an alpha out of the range of `MELoRAConfig`. Nothing is
            written then.
    """
    if not isinstance(adapters, Mapping):
        raise TypeError(f"`adapters` must be a dict, folder → weight, got {type(adapters).__name__}")
    if not adapters:
        raise ValueError("`adapters` is empty: name at least one")
    weights = [_checked_number(f"the weight of `{os.fspath(place)}`", weight) for place, weight in adapters.items()]
    if not any(weights):
        raise ValueError("all weights are 0: `scale_adapter(folder, 0, out)` writes an adapter without effect")
    read = [read_adapter(place) for place in adapters]
    refuse_other_bases(read)
    weighted = [(weight, adapter) for weight, adapter in zip(weights, read, strict=True) if weight]
    kept, kept_tensors = _common_head([adapter for _, adapter in weighted])
    write_derived(output_path(out_dir), read, _sum_of(weighted), kept, kept_tensors)


def average_adapters(adapter_dirs: Iterable[Place], out_dir: Place) -> None:
    """Writes the mean of adapters, Σ Δ_k / K, as one adapter: `add_adapters` with the weights 1/K.

    Ranks add up: `compress_adapter` takes them away again. The mean of trained heads is taken too, value by value:
    all adapters must have them, with equal shapes and labels, and integers, such as counters, must be equal.

    Args:
        adapter_dirs: folders written by `save_adapter`.
        out_dir: the folder to write; an adapter that is there is replaced.

    Raises:
        ValueError, TypeError: for no adapters.
        MELoRAError: as `add_adapters`, and for trained heads that have no mean.
    """
    if isinstance(adapter_dirs, str | os.PathLike):
        raise TypeError(f"`adapter_dirs` must be several folders, got one: {adapter_dirs!r}")
    read = [read_adapter(place) for place in adapter_dirs]
    if not read:
        raise ValueError("`adapter_dirs` is empty: name at least one")
    refuse_other_bases(read)
    updates = _sum_of([(1 / len(read), adapter) for adapter in read])
    write_derived(output_path(out_dir), read, updates, read[0].kept, _mean_head(read))


def _sum_of(weighted: Sequence[_Weighted]) -> dict[str, AdapterTensors]:
    """Site → the weighted sum of its updates; no weight is 0."""
    return {
        name: _summed(name, [(weight, each.tensors_of(name)) for weight, each in weighted if name in each.configs])
        for name in all_sites([adapter for _, adapter in weighted])
    }


def _scaled(name: str, factor: float, own: AdapterTensors) -> AdapterTensors:
    """One update times a factor: A and the size of B are as they were."""
    if not factor:
        return AdapterTensors(own.config, own.lora_a, torch.zeros_like(own.lora_b))
    config = own.config
    if abs(factor) != 1:
        alphas = config.alpha if isinstance(config.alpha, tuple) else (config.alpha,)
        config = _replaced(name, config, alpha=one_or_each([alpha * abs(factor) for alpha in alphas]))
    return AdapterTensors(config, own.lora_a, own.lora_b if factor > 0 else -own.lora_b)


def _summed(name: str, terms: Sequence[_Term]) -> AdapterTensors:
    """The weighted sum of the updates of one site; no weight is 0."""
    if len(terms) == 1:
        return _scaled(name, *terms[0])
    own = [tensors for _, tensors in terms]
    scalings = [[weight * scaling for scaling in each.config.scalings] for weight, each in terms]
    common = [max(map(abs, of_block)) for of_block in zip(*scalings, strict=True)]
    ranks = [sum(of_block) for of_block in zip(*(each.config.ranks for each in own), strict=True)]
    alphas = [alpha_for(scaling, rank) for scaling, rank in zip(common, ranks, strict=True)]
    config = _replaced(
        name, own[0].config, rank=one_or_each(ranks), alpha=one_or_each(alphas), use_rslora=False
    )  # its bounds are those of `common` too
    ratios = [[scaling / most for scaling, most in zip(each, common, strict=True)] for each in scalings]
    return _side_by_side(config, own, _multiplied(own, ratios))


def _multiplied(own: Sequence[AdapterTensors], ratios: Sequence[Sequence[float]]) -> list[torch.Tensor]:
    """The B of each adapter, times the ratio of each block: in their own dtype if that is exact, else in float32."""
    dtype = own[0].lora_b.dtype
    for each in own:
        dtype = torch.promote_types(dtype, torch.promote_types(each.lora_a.dtype, each.lora_b.dtype))
    wide = torch.promote_types(dtype, torch.float32)
    products = [
        (each.lora_b.double() * each.lora_b.new_tensor(factors * each.num_experts, dtype=torch.float64)[:, None, None])
        for each, factors in zip(own, map(list, ratios), strict=True)
    ]
    products = [product.to(wide) for product in products]
    is_exact = all(torch.equal(product.to(dtype).to(wide), product) for product in products)
    return [product.to(dtype) for product in products] if is_exact else products


def _side_by_side(
    config: MELoRAConfig, own: Sequence[AdapterTensors], lora_bs: Sequence[torch.Tensor]
) -> AdapterTensors:
    """The ranks of all adapters in each block, in their order; `lora_bs`: what stands in the place of their B."""
    first, experts, blocks, parts = own[0], own[0].num_experts, config.num_blocks, len(own[0].part_sizes)
    a_shape, b_shape = config.adapter_shapes(first.in_features, sum(first.part_sizes), experts)
    lora_a, lora_b = lora_bs[0].new_zeros(a_shape), lora_bs[0].new_zeros(b_shape)
    to_a = lora_a.view(experts, blocks, parts, -1, a_shape[2])
    to_b = lora_b.view(experts, blocks, b_shape[1], -1)
    for block in range(blocks):
        start = 0
        for each, scaled_b in zip(own, lora_bs, strict=True):
            rank = each.config.ranks[block]
            from_a = each.lora_a.reshape(experts, blocks, parts, -1, a_shape[2])
            from_b = scaled_b.reshape(experts, blocks, b_shape[1], -1)
            to_a[:, block, :, start : start + rank] = from_a[:, block, :, :rank]
            to_b[:, block, :, start : start + rank] = from_b[:, block, :, :rank]
            start += rank
    return AdapterTensors(config, lora_a, lora_b)


def _common_head(adapters: Sequence[Adapter]) -> tuple[tuple[str, ...], Kept]:
    """What the adapters that have trained something whole all have: names, and tensors."""
    first, *others = [adapter for adapter in adapters if adapter.kept] or adapters[:1]
    tensors = first.kept_tensors()
    for other in others:
        own = other.kept_tensors()
        if own.keys() != tensors.keys() or not all(are_equal(own[name], tensors[name]) for name in own):
            raise MELoRAError(
                f"`{other.directory}` has trained {_listed(other.kept)} whole, and not to what `{first.directory}` has "
                f"in {_listed(first.kept)}: these are no updates that could be added; `average_adapters` takes a mean"
            )
    return first.kept, tensors


def _mean_head(adapters: Sequence[Adapter]) -> Kept:
    """The mean of what the adapters have trained whole: value by value."""
    first, *others = adapters
    heads = [adapter.kept_tensors() for adapter in adapters]
    for other, head in zip(others, heads[1:], strict=True):
        if reason := _no_mean(first, heads[0], other, head):
            raise MELoRAError(f"`{other.directory}` and `{first.directory}` have no mean: {reason}")
    return {name: _mean([head[name] for head in heads]) for name in heads[0]}


def _no_mean(first: Adapter, expected: Kept, other: Adapter, actual: Kept) -> str | None:
    """Why two trained heads have no mean, or None."""
    if expected.keys() != actual.keys():
        return f"they have trained others whole, {_listed(other.kept)} and {_listed(first.kept)}"
    if actual and any(first.model.get(fact) != other.model.get(fact) for fact in ("num_labels", "labels")):
        return "the labels of their trained heads are others, or stand in another order"
    for name, tensor in actual.items():
        if tensor.shape != expected[name].shape:
            return f"`{name}` has the shapes {tuple(tensor.shape)} and {tuple(expected[name].shape)}"
        is_floating = tensor.is_floating_point() and expected[name].is_floating_point()
        if not is_floating and not are_equal(tensor, expected[name]):
            return f"`{name}` holds integers, and others"
    return None


def _mean(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The mean, rounded to float32 at least; the first one's bits where all are equal."""
    first = tensors[0]
    if all(are_equal(first, tensor) for tensor in tensors):
        return first
    dtype = first.dtype
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    mean = sum((tensor.double() / len(tensors) for tensor in tensors), torch.zeros(first.shape, dtype=torch.float64))
    return mean.to(torch.promote_types(dtype, torch.float32))


def _replaced(name: str, config: MELoRAConfig, **changes: object) -> MELoRAConfig:
    """The configuration of a site with other values; what it refuses is an error that names the site."""
    try:
        return dataclasses.replace(config, **changes)  # type: ignore[arg-type]
    except ValueError as error:
        raise MELoRAError(f"the update of `{name}` would be out of range: {error}") from error


def _checked_number(what: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{what} must be a number, got {value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{what} (={number}) must be finite")
    return number


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "nothing"
