"""Writes a graph as a model of the Triton Inference Server, which its ONNX Runtime backend runs.

    DIRECTORY/NAME/config.pbtxt
    DIRECTORY/NAME/VERSION/model.onnx, and its weights next to it

Sources, read in November 2026:
https://github.com/triton-inference-server/onnxruntime_backend (README, src/onnxruntime.cc: the parameters it knows)
https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/user_guide/model_configuration.html
https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/user_guide/batcher.html
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exporters.onnx_files.onnx_file import (
    axes_by_name,
    content_hash,
    data_files,
    precision_of,
    read_graph,
    required_inputs,
)
from exporters.runtime.providers import PROVIDERS, Axes, Shapes, check_shapes, cuda_options, tensorrt_options
from melora_fx import MELoRAError
from melora_fx.files import new_folder, output_path

from .config import TYPES, Serving, tensorrt_parameters, type_name, write_config

if TYPE_CHECKING:
    import onnx_ir


@dataclass(frozen=True)
class TritonModel:
    """A model in a Triton model repository, as it was written.

    Attributes:
        path: its folder, DIRECTORY/NAME.
        version: the number of the folder in it that contains the graph.
        files: every file written, relative to `path`.
        max_batch_size: the largest batch that the server builds from requests; 0 if it builds none.
        notes: facts that the user should know, such as why there is no batching.
    """

    path: str
    version: int
    files: tuple[str, ...]
    max_batch_size: int
    notes: tuple[str, ...]

    def __str__(self) -> str:
        batching = f"batches of up to {self.max_batch_size}" if self.max_batch_size else "no batching"
        lines = [f"{self.path}: version {self.version}, {batching}", f"  files  {', '.join(self.files)}"]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def write_triton_repository(
    onnx_path: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    shapes: Shapes,
    max_batch_size: int | None = None,
    name: str | None = None,
    version: int = 1,
    provider: str = "tensorrt",
    instances: int = 1,
    max_queue_delay_us: int = 100,
    preferred_batch_sizes: Sequence[int] = (),
    engine_cache: str = "/tmp/tensorrt-engines",
    provider_options: Mapping[str, str] | None = None,
) -> TritonModel:
    """Adds a graph to a Triton model repository; the graph and its weights are copied.

    The server batches requests if axis 0 of every input and output is the same dynamic axis, which occurs in no other
    axis. It batches only requests that are equal in all other axes, so clients should pad sequences to a few lengths.

    A model of the same name is not overwritten. A new `version` is added to it if its config.pbtxt is equal to the new
    one. With "tensorrt" this needs the same graph and weights, because engines are cached by model, not by version. All
    files are written to a temporary folder, which is then moved.

    Args:
        onnx_path: the .onnx file.
        directory: the repository, which the server gets as `--model-repository`.
        shapes: the smallest, usual and largest size of each dynamic axis; with "tensorrt" every dynamic axis must have
            a range.
        max_batch_size: the largest batch; None for the largest one in `shapes`, 0 for no batching.
        name: the name of the model; None for the file's name, or its folder's name if the file is called model.onnx.
        version: the number of the version and its folder.
        provider: "tensorrt", "cuda" or "cpu".
        instances: the number of copies of the model, on each GPU or on the CPU.
        max_queue_delay_us: how long a request may wait for others, in microseconds.
        preferred_batch_sizes: the batch sizes to prefer; Triton advises to leave them out if no size is served better.
        engine_cache: the folder for TensorRT's engines on the server's machine. If it is not kept, each start of the
            server builds the engines again.
        provider_options: further parameters of the backend for "tensorrt" or "cuda"; they override ours.

    Raises:
        ValueError: if an argument is invalid or does not fit the graph.
        MELoRAError: if the file is not an ONNX graph, or its weights are missing; the graph has optional inputs, types
            that Triton lacks, or an unknown number of axes; the model exists already with this version or another
            config.pbtxt; a folder cannot be written.
    """
    path = Path(onnx_path)
    model = read_graph(path)
    name = _default_name(path) if name is None else name
    _check_arguments(name, version, provider, instances, max_queue_delay_us)
    inputs = _described(path, model)
    check_shapes(inputs, shapes, all_axes=provider == "tensorrt")
    weights = data_files(path, model)
    size, notes = _batch_size(model, inputs, shapes, max_batch_size, provider)
    if any(not 1 <= preferred <= size for preferred in preferred_batch_sizes):
        raise ValueError(f"`preferred_batch_sizes` (={list(preferred_batch_sizes)}) must be from 1 to {size}")
    serving = Serving(
        name=name,
        provider=provider,
        max_batch_size=size,
        instances=instances,
        max_queue_delay_us=max_queue_delay_us,
        preferred_batch_sizes=preferred_batch_sizes,
        parameters=_parameters(path, model, inputs, shapes, provider, f"{engine_cache}/{name}", provider_options or {}),
    )
    files = {"model.onnx": path, **weights}
    target = output_path(directory) / name
    written = _write(target, version, write_config(model, serving), files)
    return TritonModel(str(target), version, written, size, notes)


def _default_name(path: Path) -> str:
    return path.parent.resolve().name if path.stem == "model" else path.stem


def _check_arguments(name: str, version: int, provider: str, instances: int, max_queue_delay_us: int) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise ValueError(f"`name` (={name!r}) must be letters, digits, `_`, `-` and `.`, and not start with `-` or `.`")
    if provider not in PROVIDERS:
        raise ValueError(f"`provider` (={provider!r}) must be one of {', '.join(map(repr, PROVIDERS))}")
    for label, value, least in (
        ("version", version, 1),
        ("instances", instances, 1),
        ("max_queue_delay_us", max_queue_delay_us, 0),
    ):
        if value < least:
            raise ValueError(f"`{label}` (={value}) must be {least} or more")


def _described(path: Path, model: onnx_ir.Model) -> Axes:
    """Returns the axes of the graph's inputs; raises MELoRAError if Triton cannot describe an input or output."""
    required = required_inputs(model)
    if len(required) < len(model.graph.inputs):
        raise MELoRAError(
            f"`{path}` has optional inputs, which Triton would leave at their defaults: export it with `fold` or `keep`"
        )
    for value in (*required, *model.graph.outputs):
        if type_name(value) not in TYPES:
            raise MELoRAError(f"`{path}`: `{value.name}` is {type_name(value)}, which Triton does not accept")
        if value.shape is None:
            raise MELoRAError(f"`{path}`: the number of axes of `{value.name}` is not known")
    return axes_by_name(required)


def _parameters(
    path: Path,
    model: onnx_ir.Model,
    inputs: Axes,
    shapes: Shapes,
    provider: str,
    engine_cache: str,
    given: Mapping[str, str],
) -> dict[str, str]:
    """Returns the parameters that the backend passes to ONNX Runtime's provider."""
    if provider == "cpu" and given:
        raise ValueError(f"`provider_options` (={dict(given)}): the CPU provider has none")
    if provider != "tensorrt":
        return {} if provider == "cpu" else {**cuda_options(inputs), **given}
    options = tensorrt_options(
        path, inputs, precision=precision_of(model), shapes=shapes, content=content_hash(path, model)
    )
    caches = dict.fromkeys(("trt_engine_cache_path", "trt_timing_cache_path"), engine_cache)
    return tensorrt_parameters({**options, **caches, **given})


def _batch_size(
    model: onnx_ir.Model, inputs: Axes, shapes: Shapes, asked: int | None, provider: str
) -> tuple[int, tuple[str, ...]]:
    """Returns (largest batch, notes); the largest batch is 0 if rows cannot be batched."""
    values = {**inputs, **axes_by_name(model.graph.outputs)}
    axis, reason = _batch_axis(values)
    if reason:
        if asked:
            raise ValueError(f"`max_batch_size` (={asked}): {reason}")
        return 0, (f"no batching: {reason}",)
    if asked is None and axis not in shapes:
        raise ValueError(f"pass `max_batch_size`, or a range of `{axis}` in `shapes`")
    size = shapes[axis][2] if asked is None else asked
    if size < 0 or (axis in shapes and size > shapes[axis][2]):
        raise ValueError(f"`max_batch_size` (={size}) must be from 0 to the largest `{axis}` in `shapes`")
    if size and provider == "tensorrt" and shapes[axis][0] > 1:
        raise ValueError(f"`{axis}` (={shapes[axis]}) must start at 1: the server also runs requests one by one")
    return size, ()


def _batch_axis(values: Axes) -> tuple[str, str]:
    """Returns (name of the axis along which requests are joined, reason why there is none)."""
    first = {axes[0] if axes else "" for axes in values.values()}
    axis = first.pop() if len(first) == 1 else ""
    if not isinstance(axis, str) or axis in ("", "?"):
        return "", "axis 0 of the inputs and outputs is not the same dynamic axis"
    elsewhere = [
        name for name, axes in values.items() if any(re.search(rf"\b{axis}\b", str(other)) for other in axes[1:])
    ]
    if elsewhere:  # one request's rows would be compared with those of another
        return "", f"`{axis}` also occurs in other axes of {', '.join(elsewhere)}"
    return axis, ""


def _write(target: Path, version: int, config: str, files: Mapping[str, Path]) -> tuple[str, ...]:
    """Writes the model's folder, or another version in it, with one rename; returns the files, relative to it."""
    names = tuple(f"{version}/{name}" for name in files)
    if os.path.exists(target):
        _check_addable(target, version, config)
        with new_folder(target / str(version)) as made:
            _copy(files, made)
        return names
    with new_folder(target) as made:
        _copy(files, made / str(version))
        (made / "config.pbtxt").write_text(config)
    return ("config.pbtxt", *names)


def _copy(files: Mapping[str, Path], folder: Path) -> None:
    for name, file in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / name)


def _check_addable(target: Path, version: int, config: str) -> None:
    """Raises MELoRAError if the version exists already, or the model has another config.pbtxt."""
    if (target / str(version)).exists():
        raise MELoRAError(f"`{target}` already has a version {version}: pass another `version` or `name`")
    present = target / "config.pbtxt"
    if not present.is_file() or present.read_text() != config:
        raise MELoRAError(
            f"`{target}` already exists with another config.pbtxt (TensorRT's is for one graph and its weights): "
            "pass another `name`"
        )
