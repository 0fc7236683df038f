"""Adapters made of adapters: whether they are of one base, and the folder of what is made of them."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from melora_fx import MELoRAError
from melora_fx.adapter.tensors import AdapterTensors
from melora_fx.config import MELoRAConfig
from melora_fx.files import refuse_source
from melora_fx.saving.adapter import Adapter
from melora_fx.saving.adapter_file import write_adapter
from melora_fx.saving.fingerprint import fingerprint_misfit
from melora_fx.saving.well_formed import non_finite_names

Kept = dict[str, torch.Tensor]
_FACTS = ("class", "num_labels", "labels", "pad_token_id", "tied", "shared")


def write_derived(
    out: Path,
    sources: Sequence[Adapter],
    updates: Mapping[str, AdapterTensors],
    kept: Sequence[str] = (),
    kept_tensors: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Writes an adapter folder that is made of `sources`, which are of one base.

    Args:
        out: the folder to write.
        sources: the adapters that were read; what they say of base and model is kept.
        updates: site → A and B.
        kept, kept_tensors: what is trained whole: names of modules and parameters, and their tensors.

    Raises:
        MELoRAError: where `out` is one of the sources or lies in it, a value is not finite, or a source says too little
            of its base; nothing is written then. And for a folder that cannot be written.
    """
    for source in sources:
        refuse_source(out, source.directory)
    tensors = dict(kept_tensors or {})
    for name, own in updates.items():
        tensors |= own.named(name)
    if wrong := non_finite_names(tensors):
        raise MELoRAError(f"`{out}` is not written: {', '.join(map(repr, wrong))} would hold values out of range")
    sites = {name: _entry(name, own.config, sources) for name, own in updates.items()}
    write_adapter(out, tensors, {"sites": sites, "kept": list(kept), "model": _agreed_facts(sources)})


def refuse_other_bases(adapters: Sequence[Adapter]) -> None:
    """Raises MELoRAError for adapters of several bases, or with other blocks on one site; names each site."""
    if lines := [line for name in all_sites(adapters) for line in _misfits(name, adapters)]:
        raise MELoRAError("adapters of one base with equal blocks can be combined, these are not:\n" + "\n".join(lines))
    first = adapters[0]
    for other in adapters[1:]:
        classes = first.model.get("class"), other.model.get("class")
        if None not in classes and classes[0] != classes[1] and not first.configs.keys() & other.configs.keys():
            raise MELoRAError(
                f"`{other.directory}` has no site of `{first.directory}`, and is of a {classes[1]}, not a "
                f"{classes[0]}: no model has the sites of both"
            )


def all_sites(adapters: Sequence[Adapter]) -> list[str]:
    """The sites of all adapters, each once, in their order."""
    return list(dict.fromkeys(name for adapter in adapters for name in adapter.configs))


def are_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether dtype, shape and all values are the same."""
    return one.dtype == other.dtype and torch.equal(one, other)


def _misfits(name: str, adapters: Sequence[Adapter]) -> Iterator[str]:
    """Why the adapters' weights of one site are not the same, or are cut in other ways."""
    known, *others = [adapter for adapter in adapters if name in adapter.configs]
    for other in others:
        if reason := _misfit(name, known, other):
            yield f"`{name}` of `{other.directory}`: {reason}; compared with `{known.directory}`"
        if "values" not in known.fingerprints.get(name, {}):
            known = other


def _misfit(name: str, expected: Adapter, actual: Adapter) -> str | None:
    if expected.row_dims.get(name) != actual.row_dims.get(name):
        return "its weight is another matrix of three dimensions"
    directions = {adapter.transposed[name] for adapter in (expected, actual) if name in adapter.transposed}
    if len(directions) > 1:
        return "its weight lies the other way, (in, out) and (out, in)"
    if name in expected.fingerprints and name in actual.fingerprints:
        reason = fingerprint_misfit(actual.fingerprints[name], expected.fingerprints[name])
        if reason is not None:
            return reason
    blocks, expected_blocks = (_blocks(adapter.tensors_of(name)) for adapter in (actual, expected))
    if blocks != expected_blocks:
        return f"it has {blocks}, not {expected_blocks}"
    return None


def _blocks(own: AdapterTensors) -> str:
    """How an update is cut, in words: equal where ranks of the blocks can stand side by side."""
    config = own.config
    sizes = own.in_features, config.num_blocks * own.lora_b.size(1)
    stack = f"{own.num_experts} matrices of " if own.num_experts > 1 else ""
    parts = f", split {own.part_sizes}" if len(own.part_sizes) > 1 else ""
    return f"{stack}{sizes[0]} → {sizes[1]} features in num_blocks {config.num_blocks}{parts}"


def _entry(name: str, config: MELoRAConfig, sources: Sequence[Adapter]) -> dict[str, Any]:
    """What the header says of a site: see `melora_fx/saving/header.py`."""
    holders = [source for source in sources if name in source.configs]
    bases = [source.fingerprints[name] for source in holders if name in source.fingerprints]
    base = next((base for base in bases if "values" in base), None)
    base = base or next((base for base in bases if "without_values" in base), None)
    if base is None:
        raise MELoRAError(
            f"`{holders[0].directory}` does not say which weight `{name}` was trained on, as an early version has "
            "saved it: load it into its model and save it again"
        )
    entry: dict[str, Any] = {"config": config.to_dict(), "base": base}
    directions = [source.transposed[name] for source in holders if name in source.transposed]
    if directions:
        entry["is_transposed"] = directions[0]
    if name in holders[0].row_dims:
        entry["row_dims"] = holders[0].row_dims[name]
    if name in holders[0].parameters:
        entry["parameter"] = holders[0].parameters[name]
    return entry


def _agreed_facts(sources: Sequence[Adapter]) -> dict[str, Any]:
    """What the sources say of their model, as far as they agree; of those with a trained head, if there are any."""
    sources = [source for source in sources if source.kept] or sources
    agreed = {}
    for fact in _FACTS:
        values = [source.model[fact] for source in sources if source.model.get(fact) is not None]
        if values and all(value == values[0] for value in values):
            agreed[fact] = values[0]
    if len(agreed.get("labels", ())) != agreed.get("num_labels"):
        agreed.pop("labels", None)
    return agreed
