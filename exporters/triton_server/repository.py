"""`write_triton_repository`: a graph as a model of the Triton Inference Server, run by its ONNX Runtime backend.

    DIRECTORY/NAME/config.pbtxt
    DIRECTORY/NAME/VERSION/model.onnx, and its weights beside it

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
    """A model as written.

    Attributes:
        path: its folder, DIRECTORY/NAME; `version` the folder in it that holds the graph.
        files: every file written, relative to `path`.
        max_batch_size: largest batch that the server makes of requests; 0 where it makes none.
        notes: what the user should know, such as why there is no batching.
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

    Requests are batched where axis 0 of every input and output is one dynamic axis, and only those that are alike in
    all other axes: clients should pad sequences to a few lengths.

    A model of the same name is not overwritten. A new `version` is added to it where its config.pbtxt is the one that
    would be written; with "tensorrt" it never is, because engines are cached by model, not by version. All is
    written to a temporary folder and then moved.

    Args:
        onnx_path: the .onnx file.
        directory: the repository: what the server gets as `--model-repository`.
        shapes: smallest, usual and largest size of each dynamic axis; with "tensorrt" every axis must have a range.
        max_batch_size: None for the largest batch in `shapes`; 0 for no batching.
        name: None for the file's name, or its folder's where it is called model.onnx.
        version: number of the folder.
        provider: "tensorrt", "cuda" or "cpu".
        instances: copies of the model, on each GPU or on the CPU.
        max_queue_delay_us: how long a request may wait for others, in microseconds.
        preferred_batch_sizes: Triton advises to leave them out where all sizes are served alike.
        engine_cache: folder on the server's machine for TensorRT's engines; without one that stays, each start of the
            server builds them again.
        provider_options: further parameters of the backend for "tensorrt" or "cuda"; they go before ours.

    Raises:
        ValueError: for arguments of no accepted form, or that do not fit the graph.
        MELoRAError: for a file that is no ONNX graph, weights that are missing, a graph with optional inputs, or
            with types that Triton lacks, a model that is there already, and a folder that cannot be written.
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
        raise ValueError(f"`preferred_batch_sizes` (={list(preferred_batch_sizes)}) must be 1 to {size}")
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
        raise ValueError(f"`name` (={name!r}) must be letters, digits, `_`, `-` and `.`")
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
    """The axes of the graph's inputs, all of which Triton can name."""
    required = required_inputs(model)
    if len(required) < len(model.graph.inputs):
        raise MELoRAError(
            f"`{path}` has optional inputs, which Triton would leave at their defaults: export it with `fold` or `keep`"
        )
    for value in (*required, *model.graph.outputs):
        if type_name(value) not in TYPES:
            raise MELoRAError(f"`{path}`: `{value.name}` is {type_name(value)}, which Triton does not take")
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
    """What the backend gives to ONNX Runtime's provider."""
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
    """(largest batch, notes): 0 where rows cannot be batched."""
    values = {**inputs, **axes_by_name(model.graph.outputs)}
    axis, reason = _batch_axis(values)
    if reason:
        if asked:
            raise ValueError(f"`max_batch_size` (={asked}): {reason}")
        return 0, (f"no batching: {reason}",)
    if asked is None and axis not in shapes:
        raise ValueError(f"`max_batch_size` or a range of `{axis}` in `shapes` is needed")
    size = shapes[axis][2] if asked is None else asked
    if size < 0 or (axis in shapes and size > shapes[axis][2]):
        raise ValueError(f"`max_batch_size` (={size}) must be 0 to the largest `{axis}` in `shapes`")
    if size and provider == "tensorrt" and shapes[axis][0] > 1:
        raise ValueError(f"`{axis}` (={shapes[axis]}) must start at 1: the server also runs requests one by one")
    return size, ()


def _batch_axis(values: Axes) -> tuple[str, str]:
    """(name of the axis that requests are joined along, why there is none)."""
    first = {axes[0] if axes else "" for axes in values.values()}
    axis = first.pop() if len(first) == 1 else ""
    if not isinstance(axis, str) or axis in ("", "?"):
        return "", "axis 0 of the inputs and outputs is not one dynamic axis"
    elsewhere = [
        name for name, axes in values.items() if any(re.search(rf"\b{axis}\b", str(other)) for other in axes[1:])
    ]
    if elsewhere:  # one request's rows would be compared with those of another
        return "", f"`{axis}` is more than axis 0 of {', '.join(elsewhere)}"
    return axis, ""


def _write(target: Path, version: int, config: str, files: Mapping[str, Path]) -> tuple[str, ...]:
    """Writes the model's folder, or one more version of it, in one rename; the files written, relative to it."""
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
    """Refuses a version that is there, and one that another config.pbtxt describes."""
    if (target / str(version)).exists():
        raise MELoRAError(f"`{target}` has a version {version} already: give another `version` or `name`")
    present = target / "config.pbtxt"
    if not present.is_file() or present.read_text() != config:
        raise MELoRAError(
            f"`{target}` is there with another config.pbtxt (TensorRT's is of one graph and its weights): give "
            "another `name`"
        )
