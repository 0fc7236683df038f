"""`export_onnx`: a model, merged or unmerged, as an ONNX file that has been compared with torch."""

import contextlib
import inspect
import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx_ir
import torch
from torch import nn

from exporters.graph.axes import DynamicAxes, axes_of, check_dynamic_axes
from exporters.graph.build import count_ops
from exporters.graph.forms import FORMS
from exporters.graph.passes import ExportOptions, build_for_target
from exporters.onnx_files.metadata import METADATA_KEY, describe
from exporters.onnx_files.onnx_file import read_graph
from exporters.tensorrt_check.obstacles import refuse_obstacles
from melora_fx import MELoRAError, folded, sites
from melora_fx.capture.example_inputs import as_arguments
from melora_fx.files import staging_folder, writing
from melora_fx.names import unwrap
from melora_fx.rewriting.sites import is_disabled

from .export_files import copy_configuration, keep_failed, move_files, onnx_file_path, show_progress
from .export_report import ExportReport
from .onnx_runtime import import_onnxruntime
from .private import runs_under_accelerate
from .verify import Verification, check_file
from .verify import verify as compare_with_torch

ADAPTERS = ("fold", "keep", "swap")
TARGETS = ("portable", "ort-cpu", "ort-cuda", "tensorrt")
PRECISIONS = ("auto", "fp32", "fp16")


def export_onnx(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | Sequence[Any],
    path: str | os.PathLike[str],
    *,
    adapter: str = "fold",
    target: str = "portable",
    precision: str = "auto",
    dynamic_axes: DynamicAxes = "auto",
    form: str = "auto",
    opset: int | None = None,
    verify: bool = True,
) -> ExportReport:
    """Writes `model` as an ONNX graph; the model is as before afterwards.

    Beside NAME.onnx: its weights NAME.onnx.data, the report NAME.export.json and, for a Hugging Face model, its
    configuration and its tokenizer's files, from `config._name_or_path` where that is a local folder. All is written to
    a temporary folder, checked there, and then moved; other files in the folder stay. A graph that fails the check is
    left in the folder NAME.failed instead.

    Args:
        model: a rewritten model, or a plain one, which is exported as it is, in float32. A causal language model is
            exported without a key-value cache.
        example_inputs: a dict of keyword arguments or a tuple of positional ones, tensors or constants of the graph (a
            number, a text, None); a batch of one is doubled where the batch is dynamic. Its number of tokens stands for
            that of a typical run where `form` is "auto".
        path: the .onnx file, or a folder, in which it is called model.onnx.
        adapter: "fold" exports the merged weights, "keep" the adapters as nodes of the graph, "swap" these nodes with
            the adapters as optional inputs, of any rank: without any the graph computes the base. Inside `disabled`
            "fold" and "keep" export the base.
        target: "portable": standard ONNX operators only; "ort-cpu", "ort-cuda": ONNX Runtime's fused operators for that
            provider; "tensorrt": only what TensorRT builds.
        precision: "fp32"; "fp16": weights and computation in half precision, inputs and outputs unchanged; "auto":
            "fp16" for "ort-cuda", else "fp32".
        dynamic_axes: "auto": all that the model leaves free; or input name → {axis: name}, every other axis fixed.
        form: how "keep" writes an update: "block", "dense", or "auto": for each site the faster one.
        opset: ONNX operator set; None leaves the exporter's default.
        verify: check the graph by `onnx.checker` and compare it with torch on ONNX Runtime's CPU, at other sizes too.

    Raises:
        ValueError, TypeError: for an option or inputs of no accepted form.
        MELoRAError: where the model cannot be folded, or has no sites for "swap" or is inside `disabled` then; where it
            cannot be exported, or not with these dynamic axes or for this target; where the folder cannot be written,
            ONNX Runtime is not installed, or the graph is not equal to torch. No file of an earlier export is touched.
    """
    start = time.perf_counter()
    choices = (
        ("adapter", adapter, ADAPTERS),
        ("target", target, TARGETS),
        ("precision", precision, PRECISIONS),
        ("form", form, FORMS),
    )
    for name, value, allowed in choices:
        if value not in allowed:
            raise ValueError(f"`{name}` (={value!r}) must be one of {', '.join(map(repr, allowed))}")
    if target == "tensorrt" and adapter == "swap":
        raise ValueError('TensorRT takes no optional inputs: `adapter="swap"` needs another target, or use "keep"')
    _refuse_autocast(model)
    inputs = _as_keywords(model, example_inputs, dynamic_axes)
    check_dynamic_axes(inputs, dynamic_axes)
    if precision == "auto":
        precision = "fp16" if target == "ort-cuda" else "fp32"
    if verify or precision == "fp16":
        import_onnxruntime()
    if half := {str(p.dtype) for p in model.parameters() if p.dtype in (torch.float16, torch.bfloat16)}:
        raise MELoRAError(
            f"the model holds {' and '.join(sorted(half))} weights: export `model.float()`, for a half precision graph "
            'with `precision="fp16"`'
        )
    path = onnx_file_path(path)
    model = unwrap(model)
    if adapter == "swap" and is_disabled(model):
        raise MELoRAError(
            '`adapter="swap"` makes inputs of the adapters, which `disabled` has switched off: export outside of the block'
        )
    if is_disabled(model):
        adapter = "keep"  # the base is what the model computes now
    if adapter == "swap" and not sites(model):
        raise MELoRAError('`adapter="swap"` needs a rewritten model: its sites say where adapters go')
    if adapter != "fold" and not is_disabled(model):
        _refuse_grouped(model)
    options = ExportOptions(adapter, target, precision, form, dynamic_axes, opset)
    facts = describe(model, adapter, target) | {"precision": precision}
    with show_progress(f"exporting {path.name}") as step, staging_folder(path) as staging, _prepared(model, adapter):
        graph_model, found = build_for_target(model, inputs, options, step)
        facts |= found
        graph_model.metadata_props[METADATA_KEY] = json.dumps(facts)
        step("writing")
        with writing(path):
            onnx_ir.save(graph_model, staging / path.name, external_data=f"{path.name}.data")
            notes = copy_configuration(model, staging)
        verification = None
        try:
            if target == "tensorrt":
                refuse_obstacles(read_graph(staging / path.name), path.name)
            if verify:
                step("comparing with torch")
                check_file(staging / path.name)
                verification = compare_with_torch(model, inputs, staging / path.name, precision)
        except MELoRAError as error:
            raise MELoRAError(f"{error}\nthe graph is left in `{keep_failed(staging, path)}`") from error
        report = _report(path, graph_model, facts, verification, notes)
        names = sorted(file.name for file in staging.iterdir())
        report |= {"files": (f"{path.stem}.export.json", *names), "seconds": time.perf_counter() - start}
        with writing(path):
            (staging / f"{path.stem}.export.json").write_text(json.dumps(report, indent=2) + "\n")
            move_files(staging, path)
    return ExportReport(**report)


def _refuse_grouped(model: nn.Module) -> None:
    """Raises for adapters beside products of rows that are sorted by expert: there is no ONNX operator for them."""
    grouped = [f"`{name}`" for name, site in sites(model).items() if "grouped_mm" in site.pattern]
    if grouped:
        raise MELoRAError(
            f"{', '.join(grouped)}: an adapter of experts that are computed by `grouped_mm` cannot stay in a graph: "
            'export with `adapter="fold"`, or call `model.set_experts_implementation("batched_mm")` before `rewrite`'
        )


def _refuse_autocast(model: nn.Module) -> None:
    """Raises for a model that accelerate, or a Trainer, has put under autocast: the graph would have its casts."""
    if runs_under_accelerate(model):
        raise MELoRAError(
            "`model` runs under accelerate's autocast (`mixed_precision`, a Trainer's `bf16` or `fp16`), which a graph "
            "would keep: call `accelerator.unwrap_model(model, keep_fp32_wrapper=False)` first"
        )


def _as_keywords(
    model: nn.Module, example_inputs: Mapping[str, Any] | Sequence[Any], dynamic_axes: DynamicAxes
) -> dict[str, Any]:
    """The example inputs by name: a graph's inputs have names."""
    is_mapping = isinstance(dynamic_axes, Mapping)
    if dynamic_axes != "auto" and not (is_mapping and all(isinstance(axes, Mapping) for axes in dynamic_axes.values())):
        raise ValueError(f'`dynamic_axes` (={dynamic_axes!r}) must be "auto" or input name → {{axis: name}}')
    fixed = not isinstance(dynamic_axes, str) and not any(0 in axes for axes in dynamic_axes.values())
    args, kwargs = as_arguments(example_inputs, double=not fixed)
    parameters = inspect.signature(model.forward).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    if len(args) > len(names):
        raise TypeError(
            f"`{type(model).__name__}.forward` takes {len(names)} named arguments, `example_inputs` gives {len(args)}: "
            "pass a dict"
        )
    inputs = dict(zip(names, args, strict=False)) | kwargs
    for name, value in inputs.items():
        if not isinstance(value, torch.Tensor | bool | int | float | str | None):
            raise TypeError(
                f"`example_inputs`: `{name}` is a {type(value).__name__}, a graph's input must be a tensor (a number, "
                "a text or None becomes a constant of the graph)"
            )
    return {name: inputs[name] for name in sorted(inputs, key=lambda name: names.index(name) if name in names else -1)}


def _prepared(model: nn.Module, adapter: str) -> contextlib.AbstractContextManager[None]:
    return folded(model) if adapter == "fold" and sites(model) else contextlib.nullcontext()


def _report(
    path: Path,
    graph_model: onnx_ir.Model,
    facts: Mapping[str, Any],
    verification: Verification | None,
    notes: tuple[str, ...],
) -> dict[str, Any]:
    """The fields of an `ExportReport`, but for the files and the time."""
    graph = graph_model.graph
    return {
        "path": str(path),
        "adapter": facts["adapter"],
        "target": facts["target"],
        "precision": facts["precision"],
        "forms": dict(Counter(facts["forms"].values())),
        "opset": graph_model.opset_imports[""],
        "num_nodes": sum(1 for _ in graph.all_nodes()),
        "op_counts": count_ops(graph_model),
        "inputs": {value.name or "": axes_of(value) for value in graph.inputs if not value.is_initializer()},
        "num_adapter_inputs": sum(1 for value in graph.inputs if value.is_initializer()),
        "outputs": {value.name or "": axes_of(value) for value in graph.outputs},
        "notes": notes,
        **(asdict(verification) if verification else {"compared": (), "max_abs_error": None, "max_rel_error": None}),
    }
