"""Reads and writes the description of an exported file: the `melora` entry of its `metadata_props`, as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from melora_fx import AdapterSite, MELoRAConfig, MELoRAError
from melora_fx.rewriting.module import class_name
from melora_fx.saving.adapter import hash_adapter
from melora_fx.saving.header import parse_json, parse_sites
from melora_fx.saving.model_adapter import adapter_tensors, present_sites, site_entries
from melora_fx.versions import package_version
from melora_fx.whole_capture.conditions import Condition, Shaped

from .onnx_file import read_graph
from .weight_place import WeightPlace

if TYPE_CHECKING:
    import onnx
    import onnx_ir

METADATA_KEY = "melora"
_VERSION = 1


@dataclass(frozen=True)
class GraphFacts:
    """The description of a graph, as read from its file.

    Attributes:
        path: the file, for error texts.
        model: the name of the model's class.
        adapter: the form of the adapters in the graph, a name in `exporters.targets.ADAPTERS`, or "none".
        adapter_sha256: SHA-256 of the adapter that the graph contains, or "none".
        configs: site → its configuration.
        fingerprints: site → its base weight's fingerprint.
        weights: parameter → its place in the graph, without parameters that have several names, or that the exporter
            could not distinguish.
        kept: the places of the tensors of modules kept trainable.
        dense: the sites whose update is a product of block-diagonal matrices.
        row_dims: site → `row_dims` as in `as_matrices`, for the sites that have one.
        conditions: the conditions that the export assumed on the inputs' sizes; none in graphs of earlier versions.
        constants: argument of the model → its constant value in the graph.
        elsewhere: sites of the model that are in another graph: the encoder's, or the decoder's.
    """

    path: Path
    model: str
    adapter: str
    adapter_sha256: str
    configs: dict[str, MELoRAConfig]
    fingerprints: dict[str, dict[str, Any]]
    weights: dict[str, WeightPlace]
    kept: dict[str, WeightPlace]
    dense: frozenset[str] = frozenset()
    row_dims: dict[str, int] = field(default_factory=dict)
    conditions: tuple[Condition, ...] = ()
    constants: dict[str, Any] = field(default_factory=dict)
    elsewhere: tuple[str, ...] = ()


def describe(
    model: nn.Module,
    sites: Mapping[str, AdapterSite],
    whole: Mapping[str, AdapterSite],
    adapter: str,
    target: str,
    *,
    is_swappable: bool,
) -> dict[str, Any]:
    """Returns the description of a graph of `model` without the facts that the passes find, such as weights' places.

    Args:
        model: the model, before it is folded, because the fingerprints are of the base.
        sites: the sites whose adapters the graph contains or accepts.
        whole: all sites of the model; those not in `sites` are in another graph.
        adapter, target: as for `export_onnx`; "none" for a graph of the base.
        is_swappable: whether the adapters are inputs, so that the graph itself contains none.
    """
    described = sites if is_swappable else present_sites(sites)
    identified = {} if is_swappable else present_sites(whole)
    configs = {name: site.record.file_config for name, site in identified.items()}
    return {
        "format_version": _VERSION,
        "model": class_name(model),
        "adapter": adapter,
        "adapter_sha256": hash_adapter(configs, adapter_tensors(model, identified)) if identified else "none",
        "target": target,
        "sites": site_entries(described),
        "elsewhere": [name for name in whole if name not in sites],
        "versions": {package: package_version(package) for package in ("melora_fx", "torch", "transformers", "onnx")},
    }


def places_as_json(places: dict[str, WeightPlace]) -> dict[str, Any]:
    """Returns the places as JSON-ready values."""
    return {name: asdict(place) for name, place in places.items()}


def write_description(path: Path, facts: Mapping[str, Any]) -> None:
    """Replaces the description in an exported file, without reading the weights in its data file."""
    import onnx  # slow to import, so only here

    graph = onnx.load(path, load_external_data=False)
    for entry in graph.metadata_props:
        if entry.key == METADATA_KEY:
            entry.value = json.dumps(facts)
    onnx.save(graph, path)


def read_facts(path: str | Path) -> GraphFacts:
    """Returns the description in an exported file.

    Raises:
        MELoRAError: if the file is missing, is not an ONNX graph, lacks its weights, or was not written by
            `export_onnx`.
    """
    return facts_of(read_graph(path), path)


def is_ours(path: Path) -> bool:
    """Returns whether a file is a graph with a description."""
    graph = _read_proto(path)
    return graph is not None and any(entry.key == METADATA_KEY for entry in graph.metadata_props)


def is_foreign(path: Path) -> bool:
    """Returns whether a file is a graph without a description, written by another tool."""
    graph = _read_proto(path)
    return graph is not None and all(entry.key != METADATA_KEY for entry in graph.metadata_props)


def _read_proto(path: Path) -> onnx.ModelProto | None:
    """Returns the graph in a file without its external data; None if the file is not a graph."""
    import onnx

    try:
        graph = onnx.load(path, load_external_data=False)
    except Exception:  # protobuf raises its own types
        return None
    return graph if graph.HasField("graph") else None


def facts_of(graph: onnx_ir.Model, path: str | Path) -> GraphFacts:
    """Returns the description in a graph that has been read from `path`; raises MELoRAError if it cannot be read."""
    text = graph.metadata_props.get(METADATA_KEY)
    if text is None:
        raise MELoRAError(f"`{path}` was not written by `export_onnx`: it has no `{METADATA_KEY}` entry")
    try:
        facts = parse_json(text)
        if facts["format_version"] != _VERSION:
            raise ValueError(f"it has format_version {facts['format_version']!r}; this melora_fx reads {_VERSION}")
        described = parse_sites(facts["sites"])
        if unknown := [name for name, site in described.items() if not site.base]:
            raise ValueError(f"site {unknown[0]!r} has no `base`")
        for name in ("model", "adapter", "adapter_sha256"):
            if not isinstance(facts[name], str):
                raise TypeError(f"`{name}` must be a string, got {facts[name]!r}")
        return GraphFacts(
            path=Path(path),
            model=facts["model"],
            adapter=facts["adapter"],
            adapter_sha256=facts["adapter_sha256"],
            configs={name: site.config for name, site in described.items()},
            fingerprints={name: site.base for name, site in described.items()},
            dense=frozenset(name for name, form in facts.get("forms", {}).items() if form == "dense"),
            row_dims={name: site.row_dims for name, site in described.items() if site.row_dims is not None},
            weights=_places(facts["weights"], graph),
            kept=_places(facts["kept"], graph),
            conditions=_conditions(facts.get("assumed", []), graph),
            constants=dict(facts.get("constants", {})),
            elsewhere=tuple(map(str, facts.get("elsewhere", []))),
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise MELoRAError(f"`{path}`: its `{METADATA_KEY}` entry cannot be read: {str(error)[:300]!r}") from error
    except MELoRAError as error:
        raise MELoRAError(f"`{path}`: its `{METADATA_KEY}` entry cannot be read: {error}") from error


def conditions_in(graph: onnx_ir.Model, path: str | Path) -> tuple[Condition, ...]:
    """Returns the conditions that a graph's export assumed on its inputs' sizes; none for another tool's graph."""
    return facts_of(graph, path).conditions if METADATA_KEY in graph.metadata_props else ()


def _conditions(texts: Any, graph: onnx_ir.Model) -> tuple[Condition, ...]:
    conditions = tuple(Condition(text) for text in texts)
    ranks = {value.name: len(value.shape) for value in graph.graph.inputs if value.shape is not None}
    for condition in conditions:
        if unknown := [name for name in condition.names if name not in ranks]:
            raise ValueError(f"`{condition.text}` is about {unknown[0]!r}, which is not an input of the graph")
        condition.holds({name: Shaped((1,) * ranks[name]) for name in condition.names})
    return conditions


def _places(entries: dict[str, Any], graph: onnx_ir.Model) -> dict[str, WeightPlace]:
    """Returns the inverse of `places_as_json`, after checking that each place is in the graph.

    Raises:
        ValueError, TypeError, KeyError: if an entry has another form, or the graph lacks a place.
    """
    return {name: _place(name, entry, graph) for name, entry in entries.items()}


def _place(name: str, entry: dict[str, Any], graph: onnx_ir.Model) -> WeightPlace:
    columns = entry["columns"]
    place = WeightPlace(entry["initializer"], entry["is_transposed"], tuple(columns) if columns else None)
    value = graph.graph.initializers.get(place.initializer)
    if value is None or value.const_value is None:
        raise ValueError(f"the graph has no weight {place.initializer!r}, the recorded place of `{name}`")
    if not isinstance(place.is_transposed, bool):
        raise TypeError(f"`is_transposed` of `{name}` must be true or false, got {place.is_transposed!r}")
    rank = len(value.const_value.shape)
    if place.is_transposed and rank < 2:
        raise ValueError(f"`{name}` is recorded as transposed, but has {rank} dimensions")
    if place.columns is not None:
        start, stop = place.columns
        width = value.const_value.shape.numpy()[1] if rank == 2 else 0
        if not all(type(column) is int for column in place.columns) or not 0 <= start < stop <= width:
            raise ValueError(f"`{name}` is recorded as columns {start!r} to {stop!r} of {width}")
    return place
