"""Checks that adapters have the same base, and writes the folder of an adapter computed from them."""

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
    """Writes the folder of an adapter that was computed from `sources`, which must have the same base.

    Args:
        out: the folder to write.
        sources: the adapters that were read; their facts about the base and the model are kept.
        updates: site → A and B.
        kept, kept_tensors: names of the modules and parameters that were trained in full, and their tensors.

    Raises:
        MELoRAError: if `out` is one of the sources or inside one, a value is not finite, or a source says too little
            about its base; nothing is written then. Also if the folder cannot be written.
    """
    for source in sources:
        refuse_source(out, source.directory)
    tensors = dict(kept_tensors or {})
    for name, own in updates.items():
        tensors |= own.named(name)
    if wrong := non_finite_names(tensors):
        raise MELoRAError(f"`{out}` is not written: {', '.join(map(repr, wrong))} would contain values out of range")
    sites = {name: _entry(name, own.config, sources) for name, own in updates.items()}
    write_adapter(out, tensors, {"sites": sites, "kept": list(kept), "model": _agreed_facts(sources)})


def refuse_other_bases(adapters: Sequence[Adapter]) -> None:
    """Raises MELoRAError, naming each site, if the adapters have different bases or blocks.

    Also raises it if an adapter shares no site with the first one and belongs to another class of models.
    """
    if lines := [line for name in all_sites(adapters) for line in _misfits(name, adapters)]:
        raise MELoRAError("combined adapters must have one base and equal blocks; these differ:\n" + "\n".join(lines))
    first = adapters[0]
    for other in adapters[1:]:
        classes = first.model.get("class"), other.model.get("class")
        if None not in classes and classes[0] != classes[1] and not first.configs.keys() & other.configs.keys():
            raise MELoRAError(
                f"`{other.directory}` shares no site with `{first.directory}`, and was trained in a {classes[1]}, not "
                f"in a {classes[0]}: no model has the sites of both"
            )


def all_sites(adapters: Sequence[Adapter]) -> list[str]:
    """Returns the sites of all adapters, each once, in the order in which they first appear."""
    return list(dict.fromkeys(name for adapter in adapters for name in adapter.configs))


def are_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Returns whether dtype, shape and all values are equal."""
    return one.dtype == other.dtype and torch.equal(one, other)


def _misfits(name: str, adapters: Sequence[Adapter]) -> Iterator[str]:
    """Yields a line for each adapter whose base weight of one site differs from the others', or is cut differently."""
    known, *others = [adapter for adapter in adapters if name in adapter.configs]
    for other in others:
        if reason := _misfit(name, known, other):
            yield f"`{name}` of `{other.directory}`: {reason}; compared with `{known.directory}`"
        if "values" not in known.fingerprints.get(name, {}):
            known = other


def _misfit(name: str, expected: Adapter, actual: Adapter) -> str | None:
    if expected.row_dims.get(name) != actual.row_dims.get(name):
        return "its weight has three dimensions, and is read as a different matrix"
    directions = {adapter.transposed[name] for adapter in (expected, actual) if name in adapter.transposed}
    if len(directions) > 1:
        return "its weight has the other orientation, (in, out) instead of (out, in) or vice versa"
    if name in expected.fingerprints and name in actual.fingerprints:
        reason = fingerprint_misfit(actual.fingerprints[name], expected.fingerprints[name])
        if reason is not None:
            return reason
    blocks, expected_blocks = (_blocks(adapter.tensors_of(name)) for adapter in (actual, expected))
    if blocks != expected_blocks:
        return f"it has {blocks}, not {expected_blocks}"
    return None


def _blocks(own: AdapterTensors) -> str:
    """Describes how an update is cut; descriptions are equal if the ranks of the blocks can be placed side by side."""
    config = own.config
    sizes = own.in_features, config.num_blocks * own.lora_b.size(1)
    stack = f"{own.num_experts} matrices of " if own.num_experts > 1 else ""
    parts = f", split {own.part_sizes}" if len(own.part_sizes) > 1 else ""
    return f"{stack}{sizes[0]} → {sizes[1]} features in num_blocks {config.num_blocks}{parts}"


def _entry(name: str, config: MELoRAConfig, sources: Sequence[Adapter]) -> dict[str, Any]:
    """Returns the header's entry for a site; see `melora_fx/saving/header.py`."""
    holders = [source for source in sources if name in source.configs]
    bases = [source.fingerprints[name] for source in holders if name in source.fingerprints]
    base = next((base for base in bases if "values" in base), None)
    base = base or next((base for base in bases if "without_values" in base), None)
    if base is None:
        raise MELoRAError(
            f"`{holders[0].directory}` does not say which weight `{name}` was trained on, because an early version "
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
    """Returns the facts about the model on which the sources agree; if some have a trained head, only those count."""
    sources = [source for source in sources if source.kept] or sources
    agreed = {}
    for fact in _FACTS:
        values = [source.model[fact] for source in sources if source.model.get(fact) is not None]
        if values and all(value == values[0] for value in values):
            agreed[fact] = values[0]
    if len(agreed.get("labels", ())) != agreed.get("num_labels"):
        agreed.pop("labels", None)
    return agreed
