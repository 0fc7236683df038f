"""Computes sums, means and multiples of adapters; the adapter that is written has exactly the update of the formula.

    Δ = Σ_k w_k Δ_k      block by block: B_i = [f_1i B_1i, …, f_Ki B_Ki]   A_i = [A_1i; …; A_Ki]
    s_i = max_k |w_k s_ki|,   f_ki = w_k s_ki / s_i

Ranks are placed side by side and add up. Mixing A with A and B with B instead would also add the products of one
adapter's A with another one's B, which nobody has trained.

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
    """Writes a copy of an adapter whose update is multiplied by `factor`.

    The result is exact: alpha is multiplied by |factor|, and a negative factor changes the sign of B. With 0, B becomes
    zero and A is unchanged: the adapter has no effect, and can still be trained.

    Args:
        adapter_dir: a folder written by `save_adapter`.
        factor: the number that multiplies Δ.
        out_dir: the folder to write; an adapter that is already there is replaced.

    Raises:
        ValueError, TypeError: if `factor` is not a finite number, or `out_dir` is "".
        MELoRAError: if a folder cannot be read or written, `out_dir` is `adapter_dir` or inside it, the adapter has a
            trained head and `factor` is not 1, the adapter does not say which base it was trained on, or an alpha
            leaves the range of `MELoRAConfig`. Nothing is written then.
    """
    factor = _checked_number("`factor`", factor)
    adapter = read_adapter(adapter_dir)
    if adapter.kept and factor != 1:
        raise MELoRAError(
            f"`{adapter.directory}` has trained {_listed(adapter.kept)} in full, which is not an update that can be "
            "multiplied: call `add_adapters({folder: factor}, out)`, which multiplies only the updates"
        )
    updates = {name: _scaled(name, factor, adapter.tensors_of(name)) for name in adapter.configs}
    write_derived(output_path(out_dir), [adapter], updates, adapter.kept, adapter.kept_tensors())


def add_adapters(adapters: Mapping[str, float] | Mapping[Path, float] | Mapping[Place, float], out_dir: Place) -> None:
    """Writes the weighted sum of adapters, Σ w_k Δ_k, as one adapter.

    The ranks of each block are placed side by side, as with PEFT's combination_type="cat". The rank of a block is the
    sum of the adapters' ranks, and the result *is* the sum. PEFT's "linear", TIES and DARE mix A with A and B with B
    instead, which adds the products of different adapters. `compress_adapter` reduces the ranks again.

    B keeps its bits, except for the sign, if all |w_k s_i| of a block are equal. B keeps the adapters' dtype if its
    products with the ratios are exact in it; otherwise they are rounded once, to float32 (float64 stays). A site that
    only some adapters have is the sum over these adapters. Adapters with weight 0 are checked and then left out. A
    trained head is kept unchanged, whatever the weights: all adapters that have one must have the same one. Settings
    that only training needs (dropout, init) come from the first adapter that has the site.

    Args:
        adapters: folder written by `save_adapter` → its weight, which may be negative. A folder under two spellings
            counts twice.
        out_dir: the folder to write; an adapter that is already there is replaced.

    Raises:
        ValueError, TypeError: if `adapters` is empty or not a mapping, a weight is not a finite number, all weights
            are 0, or `out_dir` is "".
        MELoRAError: if a folder cannot be read or written, `out_dir` is one of the folders or inside one, the adapters
            have different bases, blocks or trained heads, a site's adapters do not say which base they were trained
            on, or an alpha leaves the range of `MELoRAConfig`. Nothing is written then.
    """
    if not isinstance(adapters, Mapping):
        raise TypeError(f"`adapters` must be a dict, folder → weight, got {type(adapters).__name__}")
    if not adapters:
        raise ValueError("`adapters` is empty: name at least one")
    weights = [_checked_number(f"the weight of `{os.fspath(place)}`", weight) for place, weight in adapters.items()]
    if not any(weights):
        raise ValueError("all weights are 0: call `scale_adapter(folder, 0, out)` for an adapter without effect")
    read = [read_adapter(place) for place in adapters]
    refuse_other_bases(read)
    weighted = [(weight, adapter) for weight, adapter in zip(weights, read, strict=True) if weight]
    kept, kept_tensors = _common_head([adapter for _, adapter in weighted])
    write_derived(output_path(out_dir), read, _sum_of(weighted), kept, kept_tensors)


def average_adapters(adapter_dirs: Iterable[Place], out_dir: Place) -> None:
    """Writes the mean of adapters, Σ Δ_k / K, as one adapter: `add_adapters` with the weights 1/K.

    Ranks add up; `compress_adapter` reduces them again. Trained heads are averaged too, value by value: all adapters
    must have them, with equal shapes and labels. Integers in them, such as counters, must be equal.

    Args:
        adapter_dirs: folders written by `save_adapter`.
        out_dir: the folder to write; an adapter that is already there is replaced.

    Raises:
        ValueError, TypeError: if `adapter_dirs` is empty or a single folder, or `out_dir` is "".
        MELoRAError: as for `add_adapters`, and if the trained heads have no mean.
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
    """Maps each site to the weighted sum of its updates; no weight may be 0."""
    return {
        name: _summed(name, [(weight, each.tensors_of(name)) for weight, each in weighted if name in each.configs])
        for name in all_sites([adapter for _, adapter in weighted])
    }


def _scaled(name: str, factor: float, own: AdapterTensors) -> AdapterTensors:
    """Multiplies one update by a factor: A is unchanged, and so is the size of B's values unless the factor is 0."""
    if not factor:
        return AdapterTensors(own.config, own.lora_a, torch.zeros_like(own.lora_b))
    config = own.config
    if abs(factor) != 1:
        alphas = config.alpha if isinstance(config.alpha, tuple) else (config.alpha,)
        config = _replaced(name, config, alpha=one_or_each([alpha * abs(factor) for alpha in alphas]))
    return AdapterTensors(config, own.lora_a, own.lora_b if factor > 0 else -own.lora_b)


def _summed(name: str, terms: Sequence[_Term]) -> AdapterTensors:
    """Returns the weighted sum of the updates of one site; no weight may be 0."""
    if len(terms) == 1:
        return _scaled(name, *terms[0])
    own = [tensors for _, tensors in terms]
    scalings = [[weight * scaling for scaling in each.config.scalings] for weight, each in terms]
    common = [max(map(abs, of_block)) for of_block in zip(*scalings, strict=True)]
    ranks = [sum(of_block) for of_block in zip(*(each.config.ranks for each in own), strict=True)]
    alphas = [alpha_for(scaling, rank) for scaling, rank in zip(common, ranks, strict=True)]
    config = _replaced(
        name, own[0].config, rank=one_or_each(ranks), alpha=one_or_each(alphas), use_rslora=False
    )  # its checks also bound `common`, a divisor below
    ratios = [[scaling / most for scaling, most in zip(each, common, strict=True)] for each in scalings]
    return _side_by_side(config, own, _multiplied(own, ratios))


def _multiplied(own: Sequence[AdapterTensors], ratios: Sequence[Sequence[float]]) -> list[torch.Tensor]:
    """Returns the B of each adapter times the ratio of each block: in their dtype if exact, else float32 or wider."""
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
    """Places the ranks of all adapters side by side in each block, in order; `lora_bs` replaces their B."""
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
    """Returns the names and tensors of the trained head; raises MELoRAError if two adapters have different ones."""
    first, *others = [adapter for adapter in adapters if adapter.kept] or adapters[:1]
    tensors = first.kept_tensors()
    for other in others:
        own = other.kept_tensors()
        if own.keys() != tensors.keys() or not all(are_equal(own[name], tensors[name]) for name in own):
            raise MELoRAError(
                f"`{other.directory}` has trained {_listed(other.kept)} in full, to other values than "
                f"`{first.directory}` in {_listed(first.kept)}: trained heads cannot be added; `average_adapters` "
                "takes their mean"
            )
    return first.kept, tensors


def _mean_head(adapters: Sequence[Adapter]) -> Kept:
    """Returns the mean of the adapters' trained heads, value by value."""
    first, *others = adapters
    heads = [adapter.kept_tensors() for adapter in adapters]
    for other, head in zip(others, heads[1:], strict=True):
        if reason := _no_mean(first, heads[0], other, head):
            raise MELoRAError(f"`{other.directory}` and `{first.directory}` have no mean: {reason}")
    return {name: _mean([head[name] for head in heads]) for name in heads[0]}


def _no_mean(first: Adapter, expected: Kept, other: Adapter, actual: Kept) -> str | None:
    """Returns why two trained heads have no mean, or None."""
    if expected.keys() != actual.keys():
        return f"they have trained different modules in full, {_listed(other.kept)} and {_listed(first.kept)}"
    if actual and any(first.model.get(fact) != other.model.get(fact) for fact in ("num_labels", "labels")):
        return "the labels of their trained heads differ, or are in a different order"
    for name, tensor in actual.items():
        if tensor.shape != expected[name].shape:
            return f"`{name}` has the shapes {tuple(tensor.shape)} and {tuple(expected[name].shape)}"
        is_floating = tensor.is_floating_point() and expected[name].is_floating_point()
        if not is_floating and not are_equal(tensor, expected[name]):
            return f"`{name}` holds integers that differ"
    return None


def _mean(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns the mean, rounded to at least float32, or the first tensor if all are equal."""
    first = tensors[0]
    if all(are_equal(first, tensor) for tensor in tensors):
        return first
    dtype = first.dtype
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    mean = sum((tensor.double() / len(tensors) for tensor in tensors), torch.zeros(first.shape, dtype=torch.float64))
    return mean.to(torch.promote_types(dtype, torch.float32))


def _replaced(name: str, config: MELoRAConfig, **changes: object) -> MELoRAConfig:
    """Returns a site's configuration with changed values; raises MELoRAError, naming the site, if it is invalid."""
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
