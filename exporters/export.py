"""Exports a model, merged or unmerged, as an ONNX file, and compares the file with torch."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from exporters.decoders.parts import Part, parts_of, sites_in
from exporters.graph.export import AdapterForm, Export, ExportOptions, Sites
from exporters.graph.named_tensors import named_inputs
from exporters.onnx_files.companions import write_companions
from exporters.onnx_files.metadata import METADATA_KEY, describe, write_description
from exporters.onnx_files.onnx_file import read_graph
from exporters.onnx_files.save_graph import save_graph
from melora_fx import MELoRAError, sites
from melora_fx.capture.model_settings import in_float32
from melora_fx.files import output_path, staging_folder, writing
from melora_fx.names import unwrap
from melora_fx.progress import show_progress
from melora_fx.whole_capture.dynamic_axes import DynamicAxes, refuse_wrong_axes

from .export_checks import half_dtypes, held_adapter, refuse_arguments
from .export_files import keep_failed, onnx_file_path, publish, refuse_other_model, report_path
from .export_report import ExportReport
from .targets import ADAPTERS, FORMS, NO_ADAPTER, PRECISIONS, TARGETS, find

if TYPE_CHECKING:
    from .verify import Verification


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
    use_cache: bool | str = "auto",
    verify: bool = True,
) -> ExportReport:
    """Writes `model` as an ONNX graph; afterwards the model is as before.

    Next to the graph NAME.onnx it writes the weights, NAME.onnx.HASH.data, and the report, NAME.export.json. For a
    Hugging Face model it adds the configurations and, if `config._name_or_path` is a local folder, the tokenizer's
    files from there. For a decoder with a cache and no encoder it adds onnxruntime-genai's genai_config.json, which
    describes the graph that was written last. All files are written to a temporary folder, checked there, and then
    moved; other files in the folder stay. Whenever the process is killed, either the earlier graph or the new one is
    there, each with its own weights. The files of a graph that fails the check are left in the folder NAME.failed.

    Args:
        model: a rewritten model, or a plain one, which is exported unchanged. It is exported in float32: weights in
            half precision are converted one at a time, and back afterwards; weights that shared memory no longer do.
        example_inputs: a dict of keyword arguments or a tuple of positional ones. Tensors, of any shape that the model
            accepts, are copied and become inputs of the graph; numbers, strings and None become constants. A batch of
            one is doubled if the batch is dynamic. If `form` is "auto", the example should have as many tokens as a
            typical run.
        path: the .onnx file, or a folder for model.onnx. An encoder-decoder model with a cache needs a folder for
            encoder_model.onnx and decoder_model.onnx.
        adapter: a name in `exporters.targets.ADAPTERS`: "fold" exports the merged weights, "keep" the adapters as nodes
            of the graph, "swap" the same nodes with the adapters as optional inputs of any rank; without these inputs
            the graph computes the base. Inside `disabled`, "fold" and "keep" export the base.
        target: a name in `exporters.targets.TARGETS`: the runtime that the graph is for. "portable" is for all.
        precision: a name in `exporters.targets.PRECISIONS`, or "auto" for the target's default. Inputs and outputs have
            the dtypes of the float32 model in every precision, except a key-value cache, which is float16 with "fp16".
        dynamic_axes: "auto" frees axes 0 and 1 of each tensor, and further axes as long as some tensor's axis 1, if
            they are longer than 1 and the model lets them vary. Or input name → {axis: name}: every other axis is
            fixed, and the graph cannot have a key-value cache.
        form: how "keep" and "swap" write an update: "block", "dense", "gated" or "auto", the faster one for each site.
            "gated" blocks are skipped while there is no adapter, and are some per cent slower with one; without "swap",
            in half precision, with a cache, or on a GPU they are plain blocks. "auto" writes "swap" as gated blocks,
            because "dense" makes adapter files larger; only in a decoder with a cache does it choose the faster form.
        opset: version of the ONNX operator set; None uses the exporter's default.
        use_cache: whether the graph of a decoder accepts and returns a key-value cache: True, False, or "auto", which
            follows `model.config.use_cache` if the model can generate. If "auto" cannot add the cache, the report's
            notes say why. Inputs and outputs have the names that optimum and onnxruntime-genai use
            (`exporters.onnx_files.cache_names`).
        verify: whether to check the graph with `onnx.checker` and to compare it with torch on ONNX Runtime's CPU, also
            at other sizes than the example's.

    Returns:
        the report. For an encoder-decoder model with a cache it is on the decoder's graph, and its `encoder` is the
        report on the encoder's.

    Raises:
        ValueError, TypeError: if an option or an example input is not of an accepted form.
        MELoRAError: if `use_cache` is True and the model cannot have such a cache; if the model cannot be folded, or
            is sharded; for "swap" inside `disabled` or without sites; if the model cannot be exported, or not with
            this adapter form, with these dynamic axes or for this target; if the folder cannot be written, or contains
            another model's configuration, tokenizer or weights; if ONNX Runtime is not installed; if the graph is not
            equal to torch. Files of an earlier export are not touched then.
    """
    found_target = find("target", target, TARGETS)
    options = ExportOptions(
        path=onnx_file_path(output_path(path)),
        adapter=find("adapter", adapter, ADAPTERS),
        target=found_target,
        precision=find("precision", precision, PRECISIONS, auto=found_target.precision),
        form=find("form", form, FORMS),
        dynamic_axes=dynamic_axes,
        opset=opset,
        verify=verify,
    )
    refuse_arguments(model, options)
    inputs = named_inputs(model, example_inputs, dynamic_axes)
    refuse_wrong_axes(inputs, dynamic_axes)
    model = unwrap(model)
    found = sites(model)
    held = held_adapter(model, options.adapter, found)
    half = half_dtypes(model)
    notes = (f"the model's weights are {' and '.join(half)}: the graph is built from them in float32",) if half else ()
    with (
        show_progress(f"exporting {options.path.name}") as step,
        contextlib.ExitStack() as folders,
        in_float32(model),
    ):
        parts, cache_notes = parts_of(
            model,
            inputs,
            use_cache,
            has_own_axes=not isinstance(dynamic_axes, str),
            is_folder=Path(path).suffix != options.path.suffix,
        )
        written: list[tuple[ExportReport, Path]] = []
        for part in parts:
            own = replace(options, path=options.path.with_name(part.file)) if part.file else options
            staging = folders.enter_context(staging_folder(own.path))
            report = _export(model, part, own, held, found, staging, step)
            written.append((replace(report, notes=(*notes, *cache_notes, *report.notes)), staging))
        for report, staging in written:
            _publish(report, Path(report.path), staging)
        if half:
            gc.collect()  # graphs are reference cycles: they would keep float32 weights during the conversion back
    return replace(written[-1][0], encoder=written[0][0] if len(written) > 1 else None)


def _export(
    model: nn.Module,
    part: Part,
    options: ExportOptions,
    held: AdapterForm,
    found: Sites,
    staging: Path,
    step: Callable[[str], None],
) -> ExportReport:
    """Writes one graph and its companion files into `staging`, and compares the graph with the model."""
    from exporters.graph.build import build_graph  # these two import onnx_ir and onnxscript
    from exporters.graph.passes import graph_facts, run_passes

    start = time.perf_counter()
    own = sites_in(model, part, found)
    facts = _describe(model, options, held, own, found)  # before the fold: it describes the base's weights
    with contextlib.ExitStack() as values:
        notes = _write_companions(model, options.path, staging)
        step("translating the model")
        values.enter_context(held.values(model, found))
        built = build_graph(model, part.inputs, part.forward, dynamic_axes=options.dynamic_axes, opset=options.opset)
        export = Export(
            built.graph_model, model, part.inputs, part.forward, options, held, own, values, [*built.conditions]
        )
        step("rewriting the graph")
        run_passes(export)
        step("writing")
        notes += _write(export, facts | graph_facts(export), staging)
        verification = _verify(export, staging, step)
        if verification and list(verification.conditions) != export.conditions:
            export.conditions = list(verification.conditions)
            write_description(staging / options.path.name, facts | graph_facts(export))
        return _report(export, verification, notes + built.left_out, staging, start)


def _describe(model: nn.Module, options: ExportOptions, held: AdapterForm, own: Sites, found: Sites) -> dict[str, Any]:
    """Returns the description of the file without the facts that the passes find."""
    described, whole = ({}, {}) if held is NO_ADAPTER else (own, found)
    facts = describe(model, described, whole, held.name, options.target.name, is_swappable=held.is_swappable)
    return facts | {"precision": options.precision.name}


def _write_companions(model: nn.Module, path: Path, staging: Path) -> tuple[str, ...]:
    """Writes the companion files into `staging`, and refuses another model's folder; returns notes for the user."""
    with writing(path):
        notes = write_companions(model, staging)
        refuse_other_model(staging, path)
    return notes


def _write(export: Export, facts: Mapping[str, Any], staging: Path) -> tuple[str, ...]:
    """Writes the graph with its description and weights and, for a decoder with a cache, the configuration for
    onnxruntime-genai; returns notes for the user.
    """
    notes: tuple[str, ...] = ()
    if export.has_cache:
        from exporters.generation.genai_config import write_genai_config

        with writing(export.options.path):
            notes = write_genai_config(export, staging)
            refuse_other_model(staging, export.options.path)
    export.graph_model.metadata_props[METADATA_KEY] = json.dumps(facts)
    with writing(export.options.path):
        save_graph(export.graph_model, staging / export.options.path.name)
    return notes


def _verify(export: Export, staging: Path, step: Callable[[str], None]) -> Verification | None:
    """Checks the written file; if it is refused, moves the files of the graph to the folder NAME.failed."""
    from . import verify  # imports onnx

    options = export.options
    file = staging / options.path.name
    try:
        if options.target.check is not None:
            options.target.check(read_graph(file), options.path.name)
        if not options.verify:
            return None
        step("comparing with torch")
        verify.check_file(file)
        return verify.verify(export, file)
    except MELoRAError as error:
        raise MELoRAError(f"{error}\nthe graph is left in `{keep_failed(staging, options.path)}`") from error


def _report(
    export: Export, verification: Verification | None, notes: tuple[str, ...], staging: Path, start: float
) -> ExportReport:
    from exporters.graph.axes import axes_of
    from exporters.graph.build import count_ops

    options = export.options
    graph = export.graph
    return ExportReport(
        path=str(options.path),
        files=(report_path(options.path).name, *sorted(file.name for file in staging.iterdir())),
        adapter=export.adapter.name,
        target=options.target.name,
        precision=options.precision.name,
        forms=dict(Counter(export.forms.values())),
        opset=export.graph_model.opset_imports[""],
        num_nodes=sum(1 for _ in graph.all_nodes()),
        op_counts=count_ops(export.graph_model),
        inputs={value.name or "": axes_of(value) for value in graph.inputs if not value.is_initializer()},
        ranges={axis: str(sizes) for axis, sizes in export.ranges().items()},
        assumed=tuple(condition.text for condition in export.conditions),
        constants=export.constants(),
        num_adapter_inputs=sum(1 for value in graph.inputs if value.is_initializer()),
        outputs={value.name or "": axes_of(value) for value in graph.outputs},
        compared=verification.compared if verification else (),
        max_abs_error=verification.max_abs_error if verification else None,
        max_rel_error=verification.max_rel_error if verification else None,
        notes=notes,
        seconds=time.perf_counter() - start,
    )


def _publish(report: ExportReport, path: Path, staging: Path) -> None:
    """Writes the report next to the other files, and moves all of them to their final place."""
    with writing(path):
        (staging / report_path(path).name).write_text(json.dumps(asdict(report), indent=2) + "\n")
        publish(staging, path)
