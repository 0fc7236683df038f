"""Chooses the ONNX Runtime providers of a session and their options: decisions only, nothing here needs a GPU.

Options are those that ONNX Runtime documents (read in November 2026):
https://onnxruntime.ai/docs/execution-providers/TensorRT-ExecutionProvider.html
https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html

By design, ONNX Runtime may place single nodes of a CUDA session on the CPU: those that compute shapes. So the session
option `session.disable_cpu_ep_fallback`, which refuses any such node, is not set; `OrtRunner.describe` counts the nodes
of each provider instead. Only a session that lacks the provider altogether is refused.

Booleans are written "True" and "False": the TensorrtExecutionProvider refuses "1" and "0".
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporters.onnx_files.cache_names import PAST_AXIS

Shapes = Mapping[str, tuple[int, int, int]]
"""Dynamic axis, such as "batch" or "sequence" → its smallest, usual and largest size (min, opt, max)."""

Axes = Mapping[str, tuple[int | str, ...]]
"""Input of a graph → its axes, each a size or the name of a dynamic axis."""

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
PROVIDERS = {"cpu": (CPU,), "cuda": (CUDA, CPU), "tensorrt": (TENSORRT, CUDA, CPU)}
"""Our name → ONNX Runtime's providers in order of preference; each gets the nodes that those before it leave."""

_TENSORRT_PRECISION = {"fp16": {"trt_fp16_enable": "True", "trt_layer_norm_fp32_fallback": "True"}}
"""Precision of a graph's weights → TensorRT's options; without the second, a layer norm's squares and sums overflow in
half precision.
"""

_CUDA_GRAPH = {"cuda": "enable_cuda_graph", "tensorrt": "trt_cuda_graph_enable"}


@dataclass(frozen=True)
class ProviderChoice:
    """The settings of a session.

    Attributes:
        provider: "cpu", "cuda" or "tensorrt".
        providers: the same in ONNX Runtime's form: (name, options) in order of preference.
        device: the device of bound inputs and outputs, "cpu" or "cuda"; `device_id`: the number of the GPU.
        threads: intra-operator threads; None for ONNX Runtime's default.
        fixed_axes: dynamic axis → the only size that the session accepts.
        io_binding: whether inputs and outputs are bound to the device's memory.
        cuda_graph: whether runs are captured once and replayed, in buffers that keep their addresses.
    """

    provider: str
    providers: tuple[tuple[str, dict[str, str]], ...]
    device: str
    device_id: int
    threads: int | None
    fixed_axes: dict[str, int]
    io_binding: bool
    cuda_graph: bool


def profile_shapes(inputs: Axes, shapes: Shapes) -> dict[str, str]:
    """Returns TensorRT's optimisation profile as ONNX Runtime's options.

    `trt_profile_min_shapes`, `trt_profile_opt_shapes` and `trt_profile_max_shapes` each have the form
    "input_ids:1x16,attention_mask:1x16". Inputs without a dynamic axis are left out, as TensorRT requires. If no input
    has a dynamic axis, the result is empty.

    Raises:
        ValueError: if a dynamic axis has no range, no input has an axis of `shapes`, or sizes are out of order.
    """
    check_shapes(inputs, shapes, all_axes=True)
    dynamic = {name: axes for name, axes in inputs.items() if any(isinstance(axis, str) for axis in axes)}
    if not dynamic:
        return {}
    return {
        f"trt_profile_{kind}_shapes": ",".join(
            f"{name}:{'x'.join(str(shapes[axis][index] if isinstance(axis, str) else axis) for axis in axes)}"
            for name, axes in dynamic.items()
        )
        for index, kind in enumerate(("min", "opt", "max"))
    }


def check_shapes(inputs: Axes, shapes: Shapes, *, all_axes: bool) -> None:
    """Refuses ranges that do not fit the graph's inputs; with `all_axes`, every dynamic axis must have a range.

    Raises:
        ValueError: if ranges do not fit; names every such axis.
    """
    users: dict[str, list[str]] = {}
    for name, axes in inputs.items():
        for axis in axes:
            if isinstance(axis, str):
                users.setdefault(axis, []).append(name)
    missing = [axis for axis in users if axis not in shapes] if all_axes else []
    lines = [f"no range for the axis `{axis}` of {', '.join(users[axis])}" for axis in missing]
    known = f"the dynamic axes are {', '.join(users)}" if users else "no axis is dynamic"
    lines += [f"no input has an axis `{axis}`: {known}" for axis in shapes if axis not in users]
    lines += [
        f"`{axis}` (={sizes!r}) must be (min, opt, max), {_least(axis)} or more and in this order"
        for axis, sizes in shapes.items()
        if not _is_range(sizes, _least(axis))
    ]
    if lines:
        raise ValueError("`shapes` does not fit the graph: " + "; ".join(lines))


def _least(axis: str) -> int:
    """Returns the smallest size that an axis may have: 0 for a cache, which may be empty, else 1."""
    return 0 if axis == PAST_AXIS else 1


def _is_range(sizes: Any, least: int) -> bool:
    return (
        isinstance(sizes, tuple | list)
        and len(sizes) == 3
        and all(isinstance(size, int) for size in sizes)
        and least <= sizes[0] <= sizes[1] <= sizes[2]
    )


def tensorrt_options(
    graph: Path,
    inputs: Axes,
    *,
    precision: str = "fp32",
    shapes: Shapes | None = None,
    content: str = "",
    ep_context: bool = False,
) -> dict[str, str]:
    """Returns options for the TensorrtExecutionProvider.

    Engines are cached in the folder NAME.tensorrt next to the graph. ONNX Runtime identifies a cached engine only by
    the graph's name and structure (https://github.com/microsoft/onnxruntime/issues/6455): a graph with another adapter
    merged into it would silently get the old engine. So the cache's prefix contains a hash of `content` and `shapes`.

    Args:
        graph: the .onnx file.
        inputs: the graph's inputs.
        precision: precision of the graph's weights, as returned by `precision_of`.
        shapes: range of each dynamic axis; without them TensorRT builds an engine for the sizes that it sees, and again
            whenever a size is outside the range seen before.
        content: hash of the graph and its weights.
        ep_context: also write NAME_ctx.onnx, which contains the engine instead of the graph and loads without building.

    Raises:
        ValueError: if `shapes` do not fit the inputs.
    """
    folder = graph.absolute().with_name(f"{graph.stem}.tensorrt")
    identity = json.dumps([content, sorted((shapes or {}).items())])
    digest = hashlib.sha256(identity.encode()).hexdigest()
    options = {
        "trt_engine_cache_enable": "True",
        # an EP context model stores the engine's path, which must be relative to that model
        "trt_engine_cache_path": folder.name if ep_context else str(folder),
        "trt_engine_cache_prefix": f"{graph.stem}_{digest[:16]}",
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(folder),
    }
    options |= _TENSORRT_PRECISION.get(precision, {})
    if shapes is not None:
        options |= profile_shapes(inputs, shapes)
    if ep_context:
        context = graph.absolute().with_name(f"{graph.stem}_ctx.onnx")
        options |= {"trt_dump_ep_context_model": "True", "trt_ep_context_file_path": str(context)}
    return options


def cuda_options(inputs: Axes) -> dict[str, str]:
    """Returns options for the CUDAExecutionProvider.

    float32 is computed in float32, as torch does by default: TF32, which ONNX Runtime turns on, keeps only 10 bits.
    If an input has a dynamic axis, convolution algorithms are chosen by heuristics: the default measures all of them
    again at each new size.
    """
    options = {"use_tf32": "False"}
    if any(isinstance(axis, str) for axes in inputs.values() for axis in axes):
        options["cudnn_conv_algo_search"] = "HEURISTIC"
    return options


def choose_provider(
    provider: str,
    graph: Path,
    inputs: Axes,
    *,
    precision: str = "fp32",
    content: str = "",
    threads: int | None = None,
    provider_options: Mapping[str, Any] | None = None,
    shapes: Shapes | None = None,
    io_binding: bool | None = None,
) -> ProviderChoice:
    """Chooses the settings of a session for `graph`; the arguments are those of `OrtRunner` and `tensorrt_options`.

    `provider_options` override ours; None as a value restores ONNX Runtime's default. Axes whose smallest and largest
    size are equal are fixed.

    Raises:
        ValueError: if the provider is unknown, `threads` is below 1, options are invalid or exclude each other, or
            `shapes` do not fit the inputs.
    """
    _check_arguments(provider, threads, provider_options or {})
    if shapes is not None:
        check_shapes(inputs, shapes, all_axes=False)
    given = {name: None if value is None else str(value) for name, value in (provider_options or {}).items()}
    fixed = {axis: smallest for axis, (smallest, _, largest) in (shapes or {}).items() if smallest == largest}
    is_bound = provider != "cpu" if io_binding is None else io_binding
    cuda_graph = _is_on(given.get(_CUDA_GRAPH.get(provider, "")))
    if cuda_graph:
        _check_cuda_graph(_CUDA_GRAPH[provider], inputs, fixed, is_bound)

    options = {CPU: {}, CUDA: cuda_options(inputs)}
    if provider == "tensorrt":
        options[TENSORRT] = tensorrt_options(
            graph,
            _with_fixed_axes(inputs, fixed),
            precision=precision,
            shapes=None if shapes is None else {axis: shapes[axis] for axis in shapes if axis not in fixed},
            content=json.dumps([content, sorted(fixed.items())]),
            ep_context=_is_on(given.get("trt_dump_ep_context_model")),
        )
        options[CUDA] |= {name: value for name, value in given.items() if name == "device_id" and value}
    first, *others = PROVIDERS[provider]
    return ProviderChoice(
        provider=provider,
        providers=((first, _merge_options(options[first], given)), *((name, options[name]) for name in others)),
        device="cpu" if provider == "cpu" else "cuda",
        device_id=int(given.get("device_id") or 0),
        threads=threads,
        fixed_axes=fixed,
        io_binding=is_bound,
        cuda_graph=cuda_graph,
    )


def _merge_options(ours: Mapping[str, str], given: Mapping[str, str | None]) -> dict[str, str]:
    """Returns our options, overridden by the given ones; None removes ours."""
    kept = {name: value for name, value in ours.items() if name not in given}
    return kept | {name: value for name, value in given.items() if value is not None}


def _check_arguments(provider: str, threads: int | None, options: Mapping[str, Any]) -> None:
    if provider not in PROVIDERS:
        raise ValueError(f"`provider` (={provider!r}) must be one of {', '.join(map(repr, PROVIDERS))}")
    if provider == "cpu" and options:
        raise ValueError(f"`provider_options` (={dict(options)}): the CPU provider has none")
    if threads is not None and threads < 1:
        raise ValueError(f"`threads` (={threads}) must be 1 or more, or None for ONNX Runtime's default")
    if not str(options.get("device_id") or 0).isdigit():
        raise ValueError(f"`device_id` (={options['device_id']!r}) must be the number of a GPU")


def _check_cuda_graph(option: str, inputs: Axes, fixed: Mapping[str, int], io_binding: bool) -> None:
    axes = dict.fromkeys(axis for axes in _with_fixed_axes(inputs, fixed).values() for axis in axes)
    free = [axis for axis in axes if isinstance(axis, str)]
    if free:
        raise ValueError(
            f"`{option}` replays runs at the sizes of the first one: fix {', '.join(map(repr, free))} with "
            f"`shapes`, for example {{{free[0]!r}: (8, 8, 8)}}"
        )
    if not io_binding:
        raise ValueError(f"`{option}` needs inputs and outputs that stay in place: leave `io_binding` on")


def _with_fixed_axes(inputs: Axes, fixed: Mapping[str, int]) -> dict[str, tuple[int | str, ...]]:
    return {
        name: tuple(fixed.get(axis, axis) if isinstance(axis, str) else axis for axis in axes)
        for name, axes in inputs.items()
    }


def _is_on(value: str | None) -> bool:
    return value is not None and value.lower() in ("1", "true")
