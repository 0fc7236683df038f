"""Graphs whose adapters are optional inputs: one session, many adapters, of any rank.

    y = x Wᵀ + b + concat_i( x_i Aᵀ_i (s_i B_i)ᵀ )      <site>.lora_a: (N, I/N, R)   <site>.lora_b: (N, R, O/N), s in it

Each adapter tensor is an initializer that is also a graph input, of rank 0 by default: an empty product is zero, so
that without an adapter the graph computes the base, bit for bit.

N num_blocks, I in_features, O out_features, R the rank.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import torch
from torch import nn

from melora_fx import MELoRAConfig, MELoRAError, sites
from melora_fx.adapter_file import Adapter, fingerprint_misfit, read_adapter
from melora_fx.rewritten import scaling_tensor

from .metadata import GraphFacts, read_facts
from .runtime import Arrays, import_onnxruntime
from .weights import WeightPlace


def make_swappable(graph_model: onnx_ir.Model, model: nn.Module, kept: Mapping[str, WeightPlace | None]) -> None:
    """Turns the adapters' initializers of an unmerged graph into optional inputs of rank 0, and those of `kept` too.

    Args:
        graph_model: an unmerged graph whose weights have been named.
        model: the rewritten model that it was exported from.
        kept: where the tensors of the modules kept trainable live; their present values are the defaults.

    Raises:
        MELoRAError: for a tensor that the exporter has folded away.
    """
    graph = graph_model.graph
    lost = [name for name, place in kept.items() if place is None]
    if lost:
        raise MELoRAError(
            f"{', '.join(map(repr, lost))} cannot be made swappable: the exporter stores tensors of equal values once, "
            "and these equal others (a bias that is still zero?): train them first"
        )
    for index, name in enumerate(sites(model)):
        for kind, rank_axis in (("lora_a", 2), ("lora_b", 1)):
            value = graph.initializers.get(f"{name}.{kind}.T")
            if value is None or value.shape is None:
                raise MELoRAError(
                    f"`{name}`: the exporter has folded its adapter away; export it with `keep` or `fold`"
                )
            sizes = [size for size in value.shape if isinstance(size, int)]
            for user in value.consumers():
                for output in user.outputs:
                    output.shape = None  # it had the rank that the model was rewritten with
            empty = np.zeros([0 if axis == rank_axis else size for axis, size in enumerate(sizes)], np.float32)
            shape = [f"rank_{index}" if axis == rank_axis else size for axis, size in enumerate(sizes)]
            value.name = f"{name}.{kind}"
            value.const_value = onnx_ir.tensor(empty, name=value.name)
            value.shape = onnx_ir.Shape(shape)
            graph.inputs.append(value)
    for place in kept.values():
        assert place is not None
        graph.inputs.append(graph.initializers[place.initializer])


def swap_tensors(adapter: Adapter, facts: GraphFacts) -> Arrays:
    """An adapter's tensors by the names of a swappable graph's inputs.

    Raises:
        MELoRAError: for a graph without swappable adapters, or an adapter of another base, with other sites or blocks.
    """
    if facts.adapter != "swap":
        raise MELoRAError(f'`{facts.path}` has no swappable adapters: export it with `adapter="swap"`')
    unknown = [name for name in adapter.configs if name not in facts.configs]
    if unknown:
        raise MELoRAError(f"`{adapter.directory}` has sites that `{facts.path}` lacks: {', '.join(unknown)}")
    lines = [line for name in adapter.configs if (line := _misfit(name, adapter, facts))]
    if lines:
        raise MELoRAError(f"`{adapter.directory}` does not fit `{facts.path}`:\n" + "\n".join(lines))
    tensors: Arrays = {}
    for name, config in adapter.configs.items():
        tensors[f"{name}.lora_a"] = _array(adapter.tensors[f"{name}.lora_a"].transpose(1, 2))
        lora_b = adapter.tensors[f"{name}.lora_b"]
        tensors[f"{name}.lora_b"] = _array((lora_b * scaling_tensor(config, lora_b)).transpose(1, 2))
    for name, tensor in adapter.kept_tensors().items():
        place = facts.kept.get(name)
        if place is None:
            raise MELoRAError(
                f"`{facts.path}` has no input for `{name}`, which `{adapter.directory}` has trained: export the graph "
                "from a model that keeps it trainable"
            )
        tensors[place.initializer] = _array(tensor.t() if place.is_transposed else tensor)
    return tensors


def _misfit(name: str, adapter: Adapter, facts: GraphFacts) -> str | None:
    config, expected = adapter.configs[name], facts.configs[name]
    if (config.num_blocks, config.split) != (expected.num_blocks, expected.split):
        return f"`{name}`: num_blocks {config.num_blocks} and split {config.split}, the graph's are {_cut(expected)}"
    if name in adapter.fingerprints and (
        reason := fingerprint_misfit(facts.fingerprints[name], adapter.fingerprints[name])
    ):
        return f"`{name}`: {reason}"
    return None


def _cut(config: MELoRAConfig) -> str:
    return f"{config.num_blocks} and {config.split}"


def _array(tensor: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().float().numpy())


def write_ort_adapter(adapter_dir: str | Path, onnx_path: str | Path, out_path: str | Path) -> None:
    """Writes an adapter folder as an .onnx_adapter file for `onnxruntime.LoraAdapter`, for one swappable graph.

    Args:
        adapter_dir: a folder written by `melora_fx.save_adapter`.
        onnx_path: the graph, exported with `adapter="swap"` from the same base.
        out_path: the file to write.

    Raises:
        MELoRAError: for a graph that was not written by `export_onnx`, or is not swappable, an adapter that does not
            fit it, or a file that cannot be written.
    """
    ort = import_onnxruntime()
    facts = read_facts(onnx_path)
    tensors = swap_tensors(read_adapter(adapter_dir), facts)
    adapter_format = ort.AdapterFormat()
    adapter_format.set_adapter_version(1)
    adapter_format.set_model_version(_base_version(facts))
    values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in tensors.items()}
    adapter_format.set_parameters(values)  # refers to the arrays, which must live until the export
    temporary = Path(out_path).with_name(f".{Path(out_path).name}.tmp")
    try:
        adapter_format.export_adapter(str(temporary))
        temporary.replace(out_path)
    except Exception as error:  # ONNX Runtime's own exception types are private
        raise MELoRAError(f"`{out_path}` cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_ort_adapter(path: str | Path, facts: GraphFacts) -> tuple[Any, Arrays]:
    """An .onnx_adapter file as ONNX Runtime's own `LoraAdapter`, and its tensors by the names of the graph's inputs.

    Raises:
        MELoRAError: for a file that ONNX Runtime cannot read, a graph without swappable adapters, or an adapter that
            was written for another base.
    """
    ort = import_onnxruntime()
    try:
        file = ort.AdapterFormat.read_adapter(str(path))
        tensors = {name: value.numpy().copy() for name, value in file.get_parameters().items()}  # they live in `file`
        version = file.get_model_version()
        adapter = ort.LoraAdapter()
        adapter.Load(str(path))
    except Exception as error:  # ONNX Runtime's own exception types are private
        raise MELoRAError(f"`{path}` is not an .onnx_adapter file that ONNX Runtime can read: {error}") from error
    if facts.adapter != "swap":
        raise MELoRAError(f'`{facts.path}` has no swappable adapters: export it with `adapter="swap"`')
    if version != _base_version(facts):
        raise MELoRAError(
            f"`{path}` is for another graph or base than `{facts.path}`: write it for this one by `write_ort_adapter`"
        )
    return adapter, tensors


def _base_version(facts: GraphFacts) -> int:
    """A checksum of the base's fingerprints: the format has no place for them but its model version, 31 bits."""
    return zlib.crc32(json.dumps(facts.fingerprints, sort_keys=True).encode()) >> 1
