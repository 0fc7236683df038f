"""Writes config.pbtxt, the description of a model for the Triton Inference Server, in protobuf's text format."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from exporters.onnx_files.onnx_file import axes_by_name, required_inputs

if TYPE_CHECKING:
    import onnx_ir

TYPES = {
    "BOOL": "TYPE_BOOL",
    "UINT8": "TYPE_UINT8",
    "UINT16": "TYPE_UINT16",
    "UINT32": "TYPE_UINT32",
    "UINT64": "TYPE_UINT64",
    "INT8": "TYPE_INT8",
    "INT16": "TYPE_INT16",
    "INT32": "TYPE_INT32",
    "INT64": "TYPE_INT64",
    "FLOAT16": "TYPE_FP16",
    "FLOAT": "TYPE_FP32",
    "DOUBLE": "TYPE_FP64",
    "STRING": "TYPE_STRING",
    "BFLOAT16": "TYPE_BF16",
}
"""ONNX's element types → Triton's."""

_TENSORRT_KEYS = frozenset(
    (
        "precision_mode",
        "max_workspace_size_bytes",
        "int8_calibration_table_name",
        "int8_use_native_calibration_table",
        "trt_max_partition_iterations",
        "trt_min_subgraph_size",
        "trt_dla_enable",
        "trt_dla_core",
        "trt_engine_cache_enable",
        "trt_engine_cache_path",
        "trt_engine_cache_prefix",
        "trt_dump_subgraphs",
        "trt_force_sequential_engine_build",
        "trt_context_memory_sharing_enable",
        "trt_layer_norm_fp32_fallback",
        "trt_timing_cache_enable",
        "trt_timing_cache_path",
        "trt_force_timing_cache",
        "trt_detailed_build_log",
        "trt_build_heuristics_enable",
        "trt_sparsity_enable",
        "trt_builder_optimization_level",
        "trt_auxiliary_streams",
        "trt_tactic_sources",
        "trt_extra_plugin_lib_paths",
        "trt_profile_min_shapes",
        "trt_profile_max_shapes",
        "trt_profile_opt_shapes",
        "trt_cuda_graph_enable",
        "trt_dump_ep_context_model",
        "trt_ep_context_file_path",
        "trt_ep_context_embed_mode",
    )
)
"""The parameters that the backend accepts for TensorRT; it refuses to load a model with any other parameter."""


@dataclass(frozen=True)
class Serving:
    """How a model is served, by the names of `write_triton_repository`'s arguments; `parameters`: the backend's."""

    name: str
    provider: str
    max_batch_size: int
    instances: int
    max_queue_delay_us: int
    preferred_batch_sizes: Sequence[int]
    parameters: Mapping[str, str]


def write_config(model: onnx_ir.Model, serving: Serving) -> str:
    """Returns the text of config.pbtxt; the types of the graph's inputs and outputs must be in `TYPES`."""
    size = serving.max_batch_size
    lines = [f"name: {json.dumps(serving.name)}", 'backend: "onnxruntime"', f"max_batch_size: {size}"]
    for kind, values in (("input", required_inputs(model)), ("output", model.graph.outputs)):
        lines += [line for value in values for line in _tensor(kind, value, batched=size > 0)]
    processor = "KIND_CPU" if serving.provider == "cpu" else "KIND_GPU"
    lines.append(f"instance_group {{ count: {serving.instances} kind: {processor} }}")
    if size:
        preferred = [f"  preferred_batch_size: {each}" for each in serving.preferred_batch_sizes]
        delay = f"  max_queue_delay_microseconds: {serving.max_queue_delay_us}"
        lines += ["dynamic_batching {", *preferred, delay, "}"]
    if serving.provider != "cpu":
        lines += ["optimization {", "  execution_accelerators {", "    gpu_execution_accelerator {"]
        lines.append(f"      name: {json.dumps(serving.provider)}")
        for key, value in sorted(serving.parameters.items()):
            lines.append(f"      parameters {{ key: {json.dumps(key)} value: {json.dumps(value)} }}")
        lines += ["    }", "  }", "}"]
    return "\n".join(lines) + "\n"


def type_name(value: onnx_ir.Value) -> str:
    """Returns the element type of an input or output."""
    return value.dtype.name if value.dtype else "UNDEFINED"


def _tensor(kind: str, value: onnx_ir.Value, *, batched: bool) -> list[str]:
    """Returns the lines of an input or output, with -1 for a dynamic axis.

    Triton has no empty shape: it is written as one element, reshaped to no axes.
    """
    (axes,) = axes_by_name([value]).values()
    dims = [-1 if isinstance(axis, str) else axis for axis in axes[batched:]]
    reshape = [] if dims else ["  reshape { shape: [] }"]
    return [
        f"{kind} {{",
        f"  name: {json.dumps(value.name)}",
        f"  data_type: {TYPES[type_name(value)]}",
        f"  dims: {dims or [1]}",
        *reshape,
        "}",
    ]


def tensorrt_parameters(options: Mapping[str, str]) -> dict[str, str]:
    """Returns ONNX Runtime's options for TensorRT under the names that Triton's backend has for them.

    Raises:
        ValueError: if the backend does not know an option.
    """
    parameters = dict(options)
    if parameters.pop("trt_fp16_enable", "False") in ("True", "true", "1"):
        parameters.setdefault("precision_mode", "FP16")
    if "trt_max_workspace_size" in parameters:
        parameters["max_workspace_size_bytes"] = parameters.pop("trt_max_workspace_size")
    if unknown := sorted(parameters.keys() - _TENSORRT_KEYS):
        raise ValueError(f"`provider_options`: Triton's ONNX Runtime backend does not know {', '.join(unknown)}")
    return parameters
