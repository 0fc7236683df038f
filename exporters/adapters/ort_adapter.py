"""Converts adapters for ONNX Runtime, to arrays for a swappable graph's inputs and to .onnx_adapter files.

A swappable graph accepts A transposed, (N, I/N, R), and B transposed and scaled, (N, R, O/N). In the dense form both
are block-diagonal matrices, (I, N·R) and (N·R, O). `exporters/graph/swap_inputs.py` says what the graph computes with
them. An .onnx_adapter file stores the arrays under the names of the inputs.

N num_blocks, I in_features, O out_features, R the rank.
"""

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exporters.onnx_files.metadata import GraphFacts, facts_of
from exporters.onnx_files.onnx_file import axes_by_name, optional_inputs, read_graph
from exporters.onnx_runtime import Arrays, import_onnxruntime
from melora_fx import MELoRAError
from melora_fx.adapter.tensors import factor_names
from melora_fx.files import made_folder, output_path, refuse_source, write_atomically, writing
from melora_fx.saving.adapter import Adapter
from melora_fx.saving.adapter_file import read_adapter
from melora_fx.saving.checks import check_fingerprints, check_shapes


def swap_tensors(adapter: Adapter, facts: GraphFacts) -> Arrays:
    """Returns an adapter's tensors in float32, by the names of a swappable graph's inputs.

    Raises:
        MELoRAError: if the graph has no swappable adapters, or the adapter has another base, sites that the graph
            lacks, other blocks, or other trained modules.
    """
    _refuse_unswappable(facts)
    adapter = _without(adapter, facts.elsewhere)
    unknown = [name for name in adapter.configs if name not in facts.configs]
    if unknown:
        raise MELoRAError(f"`{adapter.directory}` has sites that `{facts.path}` lacks: {', '.join(unknown)}")
    misfits = [misfit for name in adapter.configs if (misfit := _misfit(name, adapter, facts))]
    if misfits:
        raise MELoRAError(f"`{adapter.directory}` does not fit `{facts.path}`:\n" + "\n".join(misfits))
    _check_base(adapter, facts)
    return _site_tensors(adapter, facts) | _kept_tensors(adapter, facts)


def _without(adapter: Adapter, sites: Sequence[str]) -> Adapter:
    """Returns the adapter without these sites, which are in another graph."""
    left_out = {name for site in sites for name in factor_names(site)}
    return replace(
        adapter,
        configs={site: config for site, config in adapter.configs.items() if site not in sites},
        fingerprints={site: found for site, found in adapter.fingerprints.items() if site not in sites},
        tensors={name: tensor for name, tensor in adapter.tensors.items() if name not in left_out},
    )


def check_inputs(
    path: str | Path, tensors: Arrays, graph: str | Path, inputs: Mapping[str, Sequence[int | str]]
) -> None:
    """Checks that the names and shapes of tensors fit a graph's optional inputs.

    Args:
        path: the source of the tensors, for error texts.
        tensors: the tensors by the names of inputs.
        graph: the graph's file, for error texts.
        inputs: the graph's optional inputs: name → axes, each a size or the name of a dynamic axis, which must have
            the same size in all tensors.

    Raises:
        MELoRAError: if a tensor does not fit; names every such tensor.
    """
    unknown = [name for name in tensors if name not in inputs]
    if unknown:
        raise MELoRAError(f"`{path}` is for another graph: `{graph}` has no inputs {unknown}")
    sizes: dict[str, int] = {}
    lines = []
    for name, array in tensors.items():
        axes = inputs[name]
        free = {axis: size for axis, size in zip(axes, array.shape, strict=False) if isinstance(axis, str)}
        right = tuple(sizes.setdefault(axis, free[axis]) if axis in free else axis for axis in axes)
        if len(axes) != array.ndim or right != array.shape:
            lines.append(f"`{name}` has the shape {array.shape}, the graph's is ({', '.join(map(str, axes))})")
    if lines:
        raise MELoRAError(f"`{path}` is for another graph, not for `{graph}`: " + "; ".join(lines))


def write_ort_adapter(adapter_dir: str | Path, onnx_path: str | Path, out_path: str | Path) -> None:
    """Writes an adapter folder as an .onnx_adapter file for `onnxruntime.LoraAdapter` and one swappable graph.

    The file stores float32 arrays: A as (N, I/N, R) and B, scaled, as (N, R, O/N), or as (I, N·R) and (N·R, O) in the
    graph's dense form.

    Args:
        adapter_dir: a folder written by `melora_fx.save_adapter`.
        onnx_path: the graph, exported with `adapter="swap"` from the same base.
        out_path: the file to write; an .onnx_adapter file that is already there is replaced.

    Raises:
        ValueError: if `out_path` is "".
        MELoRAError: if ONNX Runtime is not installed; the graph was not written by `export_onnx`, or is not swappable;
            the adapter cannot be read, or does not fit the graph; `out_path` cannot be written, is inside
            `adapter_dir`, or is another file.
    """
    ort = import_onnxruntime()
    out_path = output_path(out_path)
    graph = read_graph(onnx_path)
    facts = facts_of(graph, onnx_path)
    adapter = read_adapter(adapter_dir)
    refuse_source(out_path, adapter.directory)
    if os.path.isfile(out_path) and not _is_adapter_file(ort, out_path):
        raise MELoRAError(f"`{out_path}` already exists and is not an .onnx_adapter file: name another place")
    tensors = swap_tensors(adapter, facts)
    check_inputs(adapter_dir, tensors, onnx_path, axes_by_name(optional_inputs(graph)))
    adapter_format = ort.AdapterFormat()
    adapter_format.set_adapter_version(1)
    adapter_format.set_model_version(_base_version(facts))
    values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in tensors.items()}
    adapter_format.set_parameters(values)  # refers to the arrays, which must live until the export
    try:
        with writing(out_path), made_folder(out_path.parent):
            write_atomically(out_path, lambda path: adapter_format.export_adapter(str(path)))
    except MELoRAError:
        raise
    except Exception as error:  # ONNX Runtime's own exception types are private
        raise MELoRAError(f"`{out_path}` cannot be written: {error}") from error


def _is_adapter_file(ort: Any, path: Path) -> bool:
    try:
        ort.AdapterFormat.read_adapter(str(path))
    except Exception:  # ONNX Runtime's own exception types are private
        return False
    return True


def read_ort_adapter(path: str | Path, facts: GraphFacts) -> tuple[Any, Arrays]:
    """Returns an .onnx_adapter file as ONNX Runtime's `LoraAdapter`, and its tensors by the names of graph inputs.

    Raises:
        MELoRAError: if ONNX Runtime cannot read the file, the graph has no swappable adapters, or the adapter was
            written for another base.
    """
    ort = import_onnxruntime()
    try:
        file = ort.AdapterFormat.read_adapter(str(path))
        tensors = {name: value.numpy().copy() for name, value in file.get_parameters().items()}  # in memory of `file`
        version = file.get_model_version()
        adapter = ort.LoraAdapter()
        adapter.Load(str(path))
    except Exception as error:  # ONNX Runtime's own exception types are private
        raise MELoRAError(f"`{path}` is not an .onnx_adapter file that ONNX Runtime can read: {error}") from error
    _refuse_unswappable(facts)
    if version != _base_version(facts):
        raise MELoRAError(
            f"`{path}` is for another graph or base, not for `{facts.path}`: write it again with `write_ort_adapter`"
        )
    return adapter, tensors


def _refuse_unswappable(facts: GraphFacts) -> None:
    if facts.adapter != "swap":
        raise MELoRAError(f'`{facts.path}` has no swappable adapters: export it with `adapter="swap"`')


def _site_tensors(adapter: Adapter, facts: GraphFacts) -> Arrays:
    tensors: Arrays = {}
    for site in adapter.configs:
        own = adapter.tensors_of(site)
        name_a, name_b = factor_names(site)
        factors = own.lora_a.mT, own.scaled_b().mT
        if site in facts.dense:
            factors = torch.block_diag(*factors[0]), torch.block_diag(*factors[1])
        tensors |= {name_a: _array(factors[0]), name_b: _array(factors[1])}
    return tensors


def _kept_tensors(adapter: Adapter, facts: GraphFacts) -> Arrays:
    """Returns the tensors that were trained in addition to the sites, by the names of the graph's inputs."""
    tensors: Arrays = {}
    for name, tensor in adapter.kept_tensors().items():
        place = facts.kept.get(name)
        if place is None or not tensor.is_floating_point():
            raise MELoRAError(
                f"`{facts.path}` has no input for `{name}`, which `{adapter.directory}` has trained: export the graph "
                "from a model that keeps it trainable"
            )
        tensors[place.initializer] = _array(tensor.t() if place.is_transposed else tensor)
    return tensors


def _misfit(name: str, adapter: Adapter, facts: GraphFacts) -> str | None:
    """Returns why one site of an adapter does not fit the graph's site, or None."""
    config = adapter.configs[name]
    expected = facts.configs[name]
    if (config.num_blocks, config.split) != (expected.num_blocks, expected.split):
        return (
            f"`{name}`: num_blocks {config.num_blocks} and split {config.split}, "
            f"the graph's are {expected.num_blocks} and {expected.split}"
        )
    if adapter.row_dims.get(name) != facts.row_dims.get(name):
        return f"`{name}`: its weight has three dimensions, and the graph reads it as a different matrix"
    return None


def _check_base(adapter: Adapter, facts: GraphFacts) -> None:
    """Raises MELoRAError if the adapter has another base than the graph, or lacks trained modules of the graph."""
    described = {name: facts.fingerprints[name] for name in adapter.configs}
    weights = {name: torch.empty(base["shape"], device="meta") for name, base in described.items()}
    check_shapes(adapter, weights)
    check_fingerprints(adapter, described)
    saved = adapter.kept_tensors()
    if lost := [name for name in facts.kept if name not in saved]:
        raise MELoRAError(
            f"`{adapter.directory}` lacks {', '.join(map(repr, lost))}, which `{facts.path}` expects with an "
            "adapter: without it, the graph would keep another head"
        )


def _array(tensor: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().float().numpy())


def _base_version(facts: GraphFacts) -> int:
    """Returns a checksum of the base's fingerprints; the format only has room for its 31 bits, as the model version."""
    return zlib.crc32(json.dumps(facts.fingerprints, sort_keys=True).encode()) >> 1
