"""What an exported file says of itself: the `melora` entry of its `metadata_props`, as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from melora_fx import AdapterSite, MELoRAConfig, MELoRAError
from melora_fx.rewriting.module import class_name
from melora_fx.saving.adapter_file import hash_adapter
from melora_fx.saving.model_adapter import adapter_tensors, site_entries
from melora_fx.versions import package_version
from melora_fx.whole_capture.conditions import Condition

from .onnx_file import read_graph
from .weight_place import WeightPlace

if TYPE_CHECKING:
    import onnx_ir

METADATA_KEY = "melora"
_VERSION = 1


@dataclass(frozen=True)
class GraphFacts:
    """A graph's description, as read.

    Attributes:
        path: the file, for error texts.
        adapter: which adapters the graph has, as in `exporters/targets.py`: "fold", say, or "none".
        adapter_sha256: the identity of the adapter that it holds, or "none".
        configs: site → its configuration.
        fingerprints: site → its base weight's fingerprint.
        weights: parameter → where it lives in the graph; without those that go by several names, or that the exporter
            could not tell apart.
        kept: the same for the tensors of the modules kept trainable.
        conditions: what the export assumed of the sizes of inputs; none in graphs of earlier versions.
        constants: argument of the model → what the export took it to be.
    """

    path: Path
    adapter: str
    adapter_sha256: str
    configs: dict[str, MELoRAConfig]
    fingerprints: dict[str, dict[str, Any]]
    weights: dict[str, WeightPlace]
    kept: dict[str, WeightPlace]
    conditions: tuple[Condition, ...] = ()
    constants: dict[str, Any] = field(default_factory=dict)


def describe(
    model: nn.Module, sites: Mapping[str, AdapterSite], adapter: str, target: str, *, is_swappable: bool
) -> dict[str, Any]:
    """The description of a graph of `model`, but for where its weights live.

    Args:
        model: the model, before it is folded: fingerprints are of the base.
        sites: those whose adapters the graph holds, or can take.
        adapter, target: as for `export_onnx`; "none" for a graph of the base.
        is_swappable: whether the graph has no adapter of its own.
    """
    configs = {name: site.config for name, site in sites.items()}
    has_identity = bool(sites) and not is_swappable
    return {
        "format_version": _VERSION,
        "model": class_name(model),
        "adapter": adapter,
        "adapter_sha256": hash_adapter(configs, adapter_tensors(model, sites)) if has_identity else "none",
        "target": target,
        "sites": site_entries(sites),
        "versions": {package: package_version(package) for package in ("melora_fx", "torch", "transformers", "onnx")},
    }


def places_as_json(places: dict[str, WeightPlace]) -> dict[str, Any]:
    """Places as JSON-ready values."""
    return {name: asdict(place) for name, place in places.items()}


def write_description(path: Path, facts: Mapping[str, Any]) -> None:
    """Exchanges the description in an exported file; weights in its data file are not read."""
    import onnx  # heavy: only where it is used

    graph = onnx.load(path, load_external_data=False)
    for entry in graph.metadata_props:
        if entry.key == METADATA_KEY:
            entry.value = json.dumps(facts)
    onnx.save(graph, path)


def read_facts(path: str | Path) -> GraphFacts:
    """The description in an exported file.

    Raises:
        MELoRAError: for a file that is missing, is no ONNX graph, lacks its weights, or was not written by
            `export_onnx`.
    """
    return facts_of(read_graph(path), path)


def facts_of(graph: onnx_ir.Model, path: str | Path) -> GraphFacts:
    """The description in a graph that has been read from `path`."""
    text = graph.metadata_props.get(METADATA_KEY)
    if text is None:
        raise MELoRAError(f"`{path}` was not written by `export_onnx`: it has no `{METADATA_KEY}` entry")
    try:
        facts = json.loads(text)
        if facts["format_version"] > _VERSION:
            raise MELoRAError(f"`{path}` has format_version {facts['format_version']}; this one reads up to {_VERSION}")
        return GraphFacts(
            path=Path(path),
            adapter=facts["adapter"],
            adapter_sha256=facts["adapter_sha256"],
            configs={name: MELoRAConfig.from_dict(entry["config"]) for name, entry in facts["sites"].items()},
            fingerprints={name: entry["base"] for name, entry in facts["sites"].items()},
            weights=_places(facts["weights"]),
            kept=_places(facts["kept"]),
            conditions=tuple(Condition(text) for text in facts.get("assumed", ())),
            constants=facts.get("constants", {}),
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise MELoRAError(f"`{path}`: its `{METADATA_KEY}` entry cannot be read: {error!r}") from error


def conditions_in(graph: onnx_ir.Model, path: str | Path) -> tuple[Condition, ...]:
    """What the export of a graph assumed of the sizes of its inputs; nothing is known of one that is not ours."""
    return facts_of(graph, path).conditions if METADATA_KEY in graph.metadata_props else ()


def _places(entries: dict[str, Any]) -> dict[str, WeightPlace]:
    """The inverse of `places_as_json`."""
    return {
        name: WeightPlace(
            initializer=entry["initializer"],
            is_transposed=entry["is_transposed"],
            columns=tuple(entry["columns"] or ()) or None,
        )
        for name, entry in entries.items()
    }
