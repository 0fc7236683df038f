"""Merges an adapter into an ONNX graph of its base by changing the bytes of the weights.

The graph's metadata names the initializer, or the columns of one, that stores each weight. No model is built, and no
node is changed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from exporters.onnx_files.companions import copy_companions, copy_genai_config
from exporters.onnx_files.metadata import METADATA_KEY, GraphFacts, facts_of
from exporters.onnx_files.onnx_file import read_graph
from exporters.onnx_files.weight_place import WeightPlace, find_tensor
from melora_fx import FoldReport, MELoRAError, SiteFold
from melora_fx.adapter.update import Scratch
from melora_fx.files import output_path, staging_folder, writing
from melora_fx.folding.measured_fold import fold_and_measure
from melora_fx.folding.report import make_report
from melora_fx.matching.keep_trainable import is_within
from melora_fx.matching.targets import nearest
from melora_fx.names import site_of
from melora_fx.progress import show_progress
from melora_fx.saving.adapter import Adapter
from melora_fx.saving.adapter_file import read_adapter
from melora_fx.saving.checks import check_base
from melora_fx.saving.fingerprint import fingerprint

from .export_files import onnx_file_path, publish, refuse_folder, refuse_other_model

if TYPE_CHECKING:
    import onnx_ir

    from exporters.onnx_files.weight_bytes import Change, WeightBytes


def fold_onnx(
    onnx_path: str | os.PathLike[str], adapter_dir: str | os.PathLike[str], out_path: str | os.PathLike[str]
) -> FoldReport:
    """Merges an adapter into an ONNX graph of its base, and writes a new graph.

    In float32 the new graph is bit-identical to an export of the folded model. In float16 the update is added to
    weights that the export of the base has already rounded. A trained head replaces the graph's head, which must have
    the same shape. The weights are written to NAME.onnx.HASH.data next to NAME.onnx. Configurations and the tokenizer's
    files are copied if they are next to the base's graph; other files in the folder stay. Whenever the process is
    killed, either an earlier graph of this name or the new one is there, each with its own weights. A fold cannot be
    undone: keep the base's graph.

    Args:
        onnx_path: a graph that `export_onnx` wrote from a model without adapters: a .onnx file, or a folder with a
            model.onnx.
        adapter_dir: a folder written by `save_adapter`; its adapter must have been trained on the same base.
        out_path: the .onnx file to write, or a folder for model.onnx.

    Returns:
        the report on how much of each site's update is lost by rounding to the graph's dtype. Warns if a site loses
        more than 25 % of its update.

    Raises:
        ValueError: if `out_path` is empty.
        MELoRAError: if the graph or the adapter cannot be read, or they belong to different models; if the graph
            already contains an adapter; if it does not say where a weight is, because the weight is tied or the
            exporter has merged it with others; if a weight is quantised; if `out_path` is the base's graph or one of
            its files; if the adapter or a sum is not finite; if the file cannot be written, or its folder contains
            another model's configuration, tokenizer or weights. Nothing is written then.
    """
    from exporters.onnx_files.weight_bytes import WeightBytes  # imports onnx_ir

    source = onnx_file_path(onnx_path)
    out = onnx_file_path(output_path(out_path))
    refuse_folder(source)
    refuse_folder(out)
    adapter = read_adapter(adapter_dir)
    graph = read_graph(source)
    facts = facts_of(graph, source)
    _refuse_graph(facts, source)
    weights = WeightBytes(source, graph)
    _refuse_overwriting(weights, out)
    places = _site_places(adapter, facts)
    _refuse_weights(weights, places)
    _refuse_adapter(adapter, weights, places, facts)
    measured: list[SiteFold] = []
    scratch = Scratch()
    for site, place in places.items():
        weights.change(place, partial(_fold_weight, site, adapter, scratch, measured))
    for place, exchange in _head_changes(adapter, facts, weights):
        weights.change(place, exchange)
    with show_progress(f"folding into {out.name}"), staging_folder(out) as staging, writing(out):
        if source.parent.resolve() != out.parent.resolve():
            copy_companions(source.parent, staging)
        copy_genai_config(source, staging / out.name)
        refuse_other_model(staging, out)
        weights.write(staging / out.name, _new_facts(graph, adapter, weights, places))
        publish(staging, out, keep=weights.files.values())
    return make_report(measured, adapter.sha256)


def _refuse_graph(facts: GraphFacts, source: Path) -> None:
    """Raises MELoRAError if the graph contains an adapter, or inputs for one."""
    if facts.adapter == "fold":
        raise MELoRAError(
            f"`{source}` already contains an adapter (sha256 {facts.adapter_sha256[:12]}…): fold into the base's graph"
        )
    if facts.adapter != "none":
        raise MELoRAError(
            f"`{source}` is not a graph of only the base (`{facts.adapter}`): export the base once, before `rewrite`, "
            "and fold into that graph"
        )


def _refuse_overwriting(weights: WeightBytes, out: Path) -> None:
    """Raises MELoRAError if `out` is the base's graph or a file of its weights."""
    own = {file.resolve() for file in (weights.path, *weights.files.values())}
    if out.resolve() in own:
        raise MELoRAError(f"`{out}` belongs to the base's graph, which a fold keeps: name another file")


def _site_places(adapter: Adapter, facts: GraphFacts) -> dict[str, WeightPlace]:
    """Maps each site to the place of its weight in the graph; raises MELoRAError if the graph does not say it."""
    places: dict[str, WeightPlace] = {}
    lines = []
    for site in adapter.configs:
        place = facts.weights.get(f"{site}.weight", facts.weights.get(site))
        if place is not None and not (place.is_transposed and site in adapter.row_dims):
            places[site] = place
        else:
            known = [site_of(name) for name in facts.weights]
            lines.append(f"`{site}`; nearest: {nearest(site, known)}")
    if lines:
        raise MELoRAError(
            f"`{facts.path}` does not say where the weights of these sites of `{adapter.directory}` are: they "
            "belong to another model, are tied, or the exporter merged them with others; fold in memory and export:\n"
            + "\n".join(lines)
        )
    return places


def _refuse_weights(weights: WeightBytes, places: Mapping[str, WeightPlace]) -> None:
    """Raises MELoRAError if the weight of a site is not floating point."""
    tensors = {site: weights.tensors[place.initializer] for site, place in places.items()}
    quantised = [
        f"`{site}`: {tensor.dtype.name}" for site, tensor in tensors.items() if not weights.is_floating(places[site])
    ]
    if quantised:
        raise MELoRAError(
            f"weights of `{weights.path}` are quantised, fold before quantising:\n" + "\n".join(quantised)
        )


def _refuse_adapter(
    adapter: Adapter, weights: WeightBytes, places: Mapping[str, WeightPlace], facts: GraphFacts
) -> None:
    """Raises MELoRAError if the adapter belongs to another base, or replaces only a part of a head."""
    found = {site: weights.read(place) for site, place in places.items()}
    names = {initializer.removesuffix(".T"): initializer for initializer in weights.tensors}
    places = {name: place for name in names if (place := find_tensor(weights.tensors, name))} | facts.weights
    heads = {
        name: weights.read(place)
        for name, place in places.items()
        if any(is_within(name, kept) for kept in adapter.kept) and weights.is_floating(place)
    }
    fingerprints = {site: fingerprint(weight) for site, weight in found.items()}
    check_base(adapter, found, fingerprints, adapter.kept_tensors() | heads, "the graph")


def _fold_weight(
    site: str, adapter: Adapter, scratch: Scratch, measured: list[SiteFold], parameter: torch.Tensor
) -> None:
    measured.append(fold_and_measure(site, adapter, parameter, scratch))


def _head_changes(adapter: Adapter, facts: GraphFacts, weights: WeightBytes) -> list[tuple[WeightPlace, Change]]:
    """Returns the place of each tensor that was kept trainable, with the change that replaces it in the graph."""
    found: list[tuple[WeightPlace, Change]] = []
    lines = []
    for name, tensor in adapter.kept_tensors().items():
        if not tensor.is_floating_point():  # counters of a normalisation are in no graph
            continue
        place = facts.weights.get(name) or find_tensor(weights.tensors, name)
        if place is None or _num_uses(weights.graph.graph.initializers[place.initializer]) != 1:
            lines.append(f"`{name}`: the graph has no such weight, or uses it more than once")
        elif not weights.is_floating(place):
            lines.append(f"`{name}`: the graph's weight is quantised")
        else:
            found.append((place, partial(_exchange, tensor)))
    if lines:
        raise MELoRAError(
            f"tensors that `{adapter.directory}` has trained in addition to its sites do not fit `{facts.path}`: "
            "export the base with this head, or fold in memory and export:\n" + "\n".join(lines)
        )
    return found


def _num_uses(value: onnx_ir.Value) -> int:
    return len(value.uses()) + value.is_graph_output()


def _exchange(tensor: torch.Tensor, parameter: torch.Tensor) -> None:
    limit = torch.finfo(parameter.dtype).max  # clamped, as in exports to half precision
    wide = tensor.to(torch.promote_types(tensor.dtype, parameter.dtype))
    parameter.copy_(wide.clamp(-limit, limit))


def _new_facts(graph: onnx_ir.Model, adapter: Adapter, weights: WeightBytes, places: Mapping[str, WeightPlace]) -> str:
    """Returns the description of the folded graph: the base's, with the adapter that the graph now contains."""
    facts = json.loads(graph.metadata_props[METADATA_KEY])
    facts |= {"adapter": "fold", "adapter_sha256": adapter.sha256}
    facts["sites"] = {
        site: {
            "config": config.to_dict(),
            "base": adapter.fingerprints.get(site) or fingerprint(weights.read(places[site])),
            "is_transposed": adapter.transposed.get(site, False),
            **({"row_dims": adapter.row_dims[site]} if site in adapter.row_dims else {}),
            **({"parameter": adapter.parameters[site]} if site in adapter.parameters else {}),
        }
        for site, config in adapter.configs.items()
    }
    return json.dumps(facts)
