"""`export_onnx`: a model, merged or unmerged, as an ONNX file that has been compared with torch."""

import contextlib
import inspect
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import torch
from torch import nn
from transformers import PretrainedConfig

from melora_fx import MELoRAError, disabled, folded, sites
from melora_fx.adapter import is_disabled
from melora_fx.rewritten import unwrap
from melora_fx.state import adapter_of, kept_names
from melora_fx.whole_model import as_arguments, in_mode, without_cache

from .compare import compare
from .metadata import METADATA_KEY, describe, places_as_json, read_facts
from .model_folder import TOKENIZER_FILES
from .onnx_graph import axes_of, build_graph, count_ops
from .ort_runner import OrtRunner
from .runners import TorchRunner
from .runtime import import_onnxruntime
from .swap import make_swappable, swap_tensors
from .weights import drop_traces, find_tensor, name_weights

ADAPTERS = ("fold", "keep", "swap")
TARGETS = ("portable",)
TOLERANCE = 1e-4
"""Largest relative error against torch that a float32 export may have."""


@dataclass(frozen=True)
class ExportReport:
    """What was written and how near it is to torch.

    Attributes:
        path: the .onnx file; `files` lists every file written, names relative to its folder.
        op_counts: number of nodes by operator type.
        inputs, outputs: name → axes, a number for a fixed size or a name for a dynamic one.
        num_adapter_inputs: number of optional inputs that an adapter's tensors go to.
        compared: the dynamic sizes at which the graph was compared with torch.
        max_abs_error, max_rel_error: the worst of those comparisons; None where nothing was compared.
        notes: what the user should know, such as missing tokenizer files.
        seconds: time that the whole export took.
    """

    path: str
    files: tuple[str, ...]
    adapter: str
    target: str
    opset: int
    num_nodes: int
    op_counts: dict[str, int]
    inputs: dict[str, tuple[int | str, ...]]
    num_adapter_inputs: int
    outputs: dict[str, tuple[int | str, ...]]
    compared: tuple[dict[str, int], ...]
    max_abs_error: float | None
    max_rel_error: float | None
    notes: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in list(self.op_counts.items())[:6])
        lines = [f"{self.path}: {self.num_nodes} nodes ({counts}, …), opset {self.opset}, {self.seconds:.1f} s"]
        lines += [f"  in   {name} ({', '.join(map(str, axes))})" for name, axes in self.inputs.items()]
        if self.num_adapter_inputs:
            lines.append(f"  in   {self.num_adapter_inputs} optional tensors of an adapter, of any rank")
        lines += [f"  out  {name} ({', '.join(map(str, axes))})" for name, axes in self.outputs.items()]
        if self.max_abs_error is not None:
            lines.append(
                f"  equal to torch at {len(self.compared)} shapes: "
                f"max abs error {self.max_abs_error:.1e}, relative {self.max_rel_error:.1e}"
            )
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def export_onnx(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | Sequence[Any],
    path: str | os.PathLike[str],
    *,
    adapter: str = "fold",
    target: str = "portable",
    opset: int | None = None,
    verify: bool = True,
) -> ExportReport:
    """Writes `model` as an ONNX graph with dynamic batch and sequence; the model is as before afterwards.

    Beside NAME.onnx: its weights NAME.onnx.data, the report NAME.export.json and, for a Hugging Face model, its
    configuration and its tokenizer's files, from `config._name_or_path` where that is a local folder. All is written to
    a temporary folder, checked there, and then moved; other files in the folder stay.

    Args:
        model: a rewritten model, or a plain one, which is exported as it is.
        example_inputs: a dict of keyword arguments or a tuple of positional ones; a batch of one is doubled.
        path: the .onnx file, or a folder, in which it is called model.onnx.
        adapter: "fold" exports the merged weights, "keep" the adapters as nodes of the graph, "swap" these nodes with
            the adapters as optional inputs, of any rank: without any the graph computes the base.
        target: "portable": standard ONNX operators only.
        opset: ONNX operator set; None leaves the exporter's default.
        verify: check the graph by `onnx.checker` and compare it with torch on ONNX Runtime, at other shapes too.

    Raises:
        ValueError, TypeError: for an option or inputs of no accepted form.
        MELoRAError: where the model cannot be folded, or has no sites for "swap"; where it cannot be exported, the
            folder not written, ONNX Runtime is not installed (with `verify`), or the graph is not equal to torch.
            Nothing is left behind.
    """
    start = time.perf_counter()
    for name, value, allowed in (("adapter", adapter, ADAPTERS), ("target", target, TARGETS)):
        if value not in allowed:
            raise ValueError(f"`{name}` (={value!r}) must be one of {', '.join(map(repr, allowed))}")
    inputs = _as_keywords(model, example_inputs)
    if verify:
        import_onnxruntime()
    if half := {str(p.dtype) for p in model.parameters() if p.dtype in (torch.float16, torch.bfloat16)}:
        raise MELoRAError(f"the model holds {' and '.join(sorted(half))} weights: export `model.float()`")
    path = _onnx_path(path)
    model = unwrap(model)
    if is_disabled(model):
        adapter = "keep"  # the base is what the model computes now
    if adapter == "swap" and not sites(model):
        raise MELoRAError('`adapter="swap"` needs a rewritten model: its sites say where adapters go')
    facts = describe(model, adapter, target)
    with _staging_folder(path) as staging, _prepared(model, adapter):
        graph_model = build_graph(model, inputs, opset)
        weights = name_weights(graph_model, model)
        kept = {name: find_tensor(graph_model, name) for name in kept_names(model)}
        drop_traces(graph_model)
        if adapter == "swap":
            make_swappable(graph_model, model, kept)
        facts |= {
            "weights": places_as_json(weights),
            "kept": places_as_json({name: place for name, place in kept.items() if place}),
        }
        graph_model.metadata_props[METADATA_KEY] = json.dumps(facts)
        staged = staging / path.name
        onnx_ir.save(graph_model, staged, external_data=f"{path.name}.data")
        compared, abs_error, rel_error = _verify(model, inputs, staged) if verify else ((), None, None)
        notes = _copy_configuration(model, staging)
        graph = graph_model.graph
        report = ExportReport(
            path=str(path),
            files=(f"{path.stem}.export.json", *sorted(file.name for file in staging.iterdir())),
            adapter=facts["adapter"],
            target=target,
            opset=graph_model.opset_imports[""],
            num_nodes=sum(1 for _ in graph.all_nodes()),
            op_counts=count_ops(graph_model),
            inputs={value.name or "": axes_of(value) for value in graph.inputs if not value.is_initializer()},
            num_adapter_inputs=sum(1 for value in graph.inputs if value.is_initializer()),
            outputs={value.name or "": axes_of(value) for value in graph.outputs},
            compared=compared,
            max_abs_error=abs_error,
            max_rel_error=rel_error,
            notes=notes,
            seconds=time.perf_counter() - start,
        )
        (staging / f"{path.stem}.export.json").write_text(json.dumps(asdict(report), indent=2) + "\n")
        for file in sorted(staging.iterdir(), key=lambda file: file.suffix == ".onnx"):  # the graph itself comes last
            os.replace(file, path.parent / file.name)
    return report


def _as_keywords(model: nn.Module, example_inputs: Mapping[str, Any] | Sequence[Any]) -> dict[str, Any]:
    """The example inputs by name: a graph's inputs have names."""
    args, kwargs = as_arguments(example_inputs)
    parameters = inspect.signature(model.forward).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    if len(args) > len(names):
        raise TypeError(
            f"`{type(model).__name__}.forward` takes {len(names)} named arguments, `example_inputs` gives {len(args)}: "
            "pass a dict"
        )
    inputs = dict(zip(names, args, strict=False)) | kwargs
    return {name: inputs[name] for name in sorted(inputs, key=lambda name: names.index(name) if name in names else -1)}


def _onnx_path(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    path = path if path.suffix == ".onnx" else path / "model.onnx"
    if path.is_dir():
        raise MELoRAError(f"`{path}` is a folder: it cannot be written as a file")
    return path


@contextlib.contextmanager
def _staging_folder(path: Path) -> Iterator[Path]:
    """A temporary folder on the disk of `path`, removed in any case."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{path.stem}.", suffix=".tmp", dir=path.parent))
    except OSError as error:
        raise MELoRAError(f"`{path.parent}` cannot be written: {error.strerror or error}") from error
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _prepared(model: nn.Module, adapter: str) -> contextlib.AbstractContextManager[None]:
    return folded(model) if adapter == "fold" and sites(model) else contextlib.nullcontext()


def _verify(
    model: nn.Module, inputs: Mapping[str, torch.Tensor], path: Path
) -> tuple[tuple[dict[str, int], ...], float, float]:
    """Checks the file and compares it with torch at the example's shapes and others.

    Returns:
        the dynamic sizes of each comparison, the largest absolute and the largest relative error.
    """
    try:
        onnx.checker.check_model(path, full_check=True)
    except onnx.checker.ValidationError as error:
        raise MELoRAError(f"onnx.checker refuses the export: {error}") from error
    runner = OrtRunner(path)
    axes = {value.name: value.shape for value in runner.session.get_inputs()}
    trials, comparisons = _trial_sizes(inputs, axes), []
    own = swap_tensors(adapter_of(model), read_facts(path)) if runner.adapter_names else {}
    with in_mode(model, training=False), without_cache(model):
        for sizes in trials:
            trial = _resized(inputs, axes, sizes)
            comparisons.append(compare(runner.with_tensors(own), TorchRunner(model), trial))
            if own:
                with disabled(model):
                    comparisons.append(compare(runner, TorchRunner(model), trial))
            for comparison in comparisons:
                if not comparison.max_rel_error <= TOLERANCE:
                    raise MELoRAError(f"the ONNX graph is not equal to torch at {sizes}: {comparison}")
    worst_abs = max(comparison.max_abs_error for comparison in comparisons)
    worst_rel = max(comparison.max_rel_error for comparison in comparisons)
    return tuple(trials), worst_abs, worst_rel


def _trial_sizes(inputs: Mapping[str, torch.Tensor], axes: Mapping[str, list[Any]]) -> list[dict[str, int]]:
    """Sizes of the dynamic axes to compare at: the example's, a single row, and more rows of half the length."""
    example = {
        axis: inputs[name].size(index)
        for name, shape in axes.items()
        for index, axis in enumerate(shape)
        if isinstance(axis, str)
    }
    single = {axis: 1 if axis == "batch" else size for axis, size in example.items()}
    other = {axis: size + 1 if axis == "batch" else max(2, size // 2 + 1) for axis, size in example.items()}
    return [dict(sizes) for sizes in dict.fromkeys(tuple(sizes.items()) for sizes in (example, single, other))]


def _resized(
    inputs: Mapping[str, torch.Tensor], axes: Mapping[str, list[Any]], sizes: Mapping[str, int]
) -> dict[str, torch.Tensor]:
    """The inputs repeated or cut along their dynamic axes."""
    resized = {}
    for name, tensor in inputs.items():
        for index, axis in enumerate(axes[name]):
            if isinstance(axis, str):
                tensor = tensor.index_select(index, torch.arange(sizes[axis]) % tensor.size(index))
        resized[name] = tensor
    return resized


def _copy_configuration(model: nn.Module, folder: Path) -> tuple[str, ...]:
    """Copies what a Hugging Face user needs beside the graph; returns notes on what is missing."""
    config = getattr(model, "config", None)
    if not isinstance(config, PretrainedConfig):
        return ()
    config.save_pretrained(folder)
    source = Path(config._name_or_path or "")
    files = [source / name for name in TOKENIZER_FILES if config._name_or_path and (source / name).is_file()]
    for file in files:
        shutil.copy(file, folder / file.name)
    return () if files else ("no tokenizer files: `config._name_or_path` is not a local folder that has them",)
