"""`fold_onnx`: an adapter merged into a graph that was exported once from the base, as a change of its weights' bytes.

The graph says in its metadata which initializer, or which columns of one, holds each weight. No model is built, and no
node is touched.
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
    """Merges an adapter into an ONNX graph of its base, which was exported once, and writes a new graph.

    In float32 the new graph is the one that an export of the folded model would give, bit for bit. In float16 the
    base's weights have been rounded before the update is added. A trained head is exchanged where the graph has one of
    the same shape. Beside NAME.onnx stand its weights NAME.onnx.HASH.data, and config.json and the tokenizer's files
    where they stand beside the base's graph; other files in the folder stay. Wherever the process is killed, an earlier
    graph of this name or the new one is there, each with its own weights. There is no way back from a folded graph:
    keep the base's.

    Args:
        onnx_path: a graph that `export_onnx` wrote from a model without adapters; a .onnx file, or a folder with a
            model.onnx.
        adapter_dir: a folder written by `save_adapter`, of an adapter that was trained on the same base.
        out_path: the .onnx file, or a folder, in which it is called model.onnx.

    Returns:
        what the rounding to the graph's precision has taken, site by site. Warns where it is much.

    Raises:
        MELoRAError: where the graph or the adapter cannot be read or belong to different models; where the graph holds
            an adapter already, or does not say where a weight is: it is tied, or the exporter has merged it with
            others; where the adapter is not finite, the file cannot be written, or its folder holds another model's
            configuration, tokenizer or weights. Nothing is written then.
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
    """Raises for a graph that is not the base's alone."""
    if facts.adapter == "fold":
        raise MELoRAError(
            f"`{source}` holds an adapter already (sha256 {facts.adapter_sha256[:12]}…): fold into the base's graph"
        )
    if facts.adapter != "none":
        raise MELoRAError(
            f"`{source}` is no graph of the base alone (`{facts.adapter}`): export the base before `rewrite`, once, "
            "and fold into that"
        )


def _refuse_overwriting(weights: WeightBytes, out: Path) -> None:
    """Raises where the base's graph, or a file of its weights, would be overwritten."""
    own = {file.resolve() for file in (weights.path, *weights.files.values())}
    if out.resolve() in own:
        raise MELoRAError(f"`{out}` is the base's own: a fold keeps it, name another file")


def _site_places(adapter: Adapter, facts: GraphFacts) -> dict[str, WeightPlace]:
    """Where each site's weight is in the graph."""
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
            f"`{facts.path}` does not say where the weights of these sites of `{adapter.directory}` are: they are "
            "another model's, or tied, or the exporter has merged them with others; fold in memory and export:\n"
            + "\n".join(lines)
        )
    return places


def _refuse_weights(weights: WeightBytes, places: Mapping[str, WeightPlace]) -> None:
    """Raises for weights of sites that are not floating point."""
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
    """Raises for an adapter of another base, and for one that exchanges a part of a head."""
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
    """Where the tensors that were kept trainable are in the graph, and their exchange."""
    found: list[tuple[WeightPlace, Change]] = []
    lines = []
    for name, tensor in adapter.kept_tensors().items():
        if not tensor.is_floating_point():  # counters of a normalisation are in no graph
            continue
        place = facts.weights.get(name) or find_tensor(weights.tensors, name)
        if place is None or _num_uses(weights.graph.graph.initializers[place.initializer]) != 1:
            lines.append(f"`{name}`: the graph has no such weight, or one that is also another's")
        elif not weights.is_floating(place):
            lines.append(f"`{name}`: the graph's is quantised")
        else:
            found.append((place, partial(_exchange, tensor)))
    if lines:
        raise MELoRAError(
            f"what `{adapter.directory}` has trained beside its sites does not fit `{facts.path}`: export the base "
            "with this head, or fold in memory and export\n" + "\n".join(lines)
        )
    return found


def _num_uses(value: onnx_ir.Value) -> int:
    return len(value.uses()) + value.is_graph_output()


def _exchange(tensor: torch.Tensor, parameter: torch.Tensor) -> None:
    limit = torch.finfo(parameter.dtype).max  # as exports to half precision do
    wide = tensor.to(torch.promote_types(tensor.dtype, parameter.dtype))
    parameter.copy_(wide.clamp(-limit, limit))


def _new_facts(graph: onnx_ir.Model, adapter: Adapter, weights: WeightBytes, places: Mapping[str, WeightPlace]) -> str:
    """The description of the folded graph: the base's, and which adapter it holds."""
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
