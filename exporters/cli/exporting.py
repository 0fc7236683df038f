"""`melora-fx export`: writes a base and an adapter as an ONNX graph, and what else its runtime needs."""

from pathlib import Path
from typing import Annotated, Any

import typer

from exporters.export_report import ExportReport
from exporters.onnx_files.cache_names import PAST_AXIS, SOURCE_AXIS, TOTAL_AXIS
from exporters.runtime.providers import Shapes
from exporters.targets import ADAPTERS, FORMS, PRECISIONS, TARGETS, find, in_words

from .options import axis_range, named_in
from .terminal import hide_loading_bars

_DEFAULT_SHAPES = {"batch": (1, 8, 32), "sequence": (16, 64, 128)}
_STEP_SHAPES = {
    "batch": (1, 1, 8),
    "sequence": (1, 1, 128),
    PAST_AXIS: (0, 64, 128),
    TOTAL_AXIS: (1, 65, 256),
    SOURCE_AXIS: (1, 64, 128),
}
"""The default shapes of a decoder with a cache."""
_SHAPES_TEXT = ", ".join(f"{axis}={low}:{usual}:{high}" for axis, (low, usual, high) in _DEFAULT_SHAPES.items())

_AdapterDir = Annotated[
    Path | None, typer.Argument(help="Adapter folder, as written by save_adapter; default: only the base.")
]
_BaseOf = Annotated[
    Path | None,
    typer.Option(
        help="For graphs without an adapter: folder of the adapter that fold-onnx will merge; sets class and head."
    ),
]
_Adapter = Annotated[str, typer.Option(help=f"Adapter: {in_words(ADAPTERS)}.", autocompletion=named_in(ADAPTERS))]
_Target = Annotated[str, typer.Option(help=f"Runtime: {in_words(TARGETS)}.", autocompletion=named_in(TARGETS))]
_Precision = Annotated[
    str,
    typer.Option(
        help=f'Precision: {in_words(PRECISIONS)}; "auto": the default of the target.',
        autocompletion=named_in(PRECISIONS),
    ),
]
_Form = Annotated[str, typer.Option(help=f"Unmerged updates: {in_words(FORMS)}.", autocompletion=named_in(FORMS))]
_Shapes = Annotated[
    list[Any],
    typer.Option(
        parser=axis_range,
        metavar="AXIS=MIN:OPT:MAX",
        help="Axis sizes for TensorRT and Triton; may be repeated. Default: " + _SHAPES_TEXT,
    ),
]
_Cache = Annotated[
    bool | None,
    typer.Option(
        "--cache/--no-cache", help="Whether a decoder gets a key-value cache; default: the model's configuration."
    ),
]
_Triton = Annotated[
    Path | None, typer.Option(help="Also write the graph into this Triton Inference Server model repository.")
]


def export(
    model_dir: Annotated[Path, typer.Argument(help="Hugging Face model folder of the base.")],
    out: Annotated[Path, typer.Option("-o", "--out", help=".onnx file to write, or a folder for model.onnx.")],
    adapter_dir: _AdapterDir = None,
    base_of: _BaseOf = None,
    adapter: _Adapter = "fold",
    target: _Target = "portable",
    precision: _Precision = "auto",
    form: _Form = "auto",
    cache: _Cache = None,
    verify: Annotated[bool, typer.Option(help="Compare the graph's outputs with those of torch.")] = True,
    shapes: _Shapes = [],  # noqa: B006  (typer copies it)
    triton: _Triton = None,
) -> None:
    """Export a base model, with or without an adapter, as an ONNX graph, and compare it with torch."""
    from exporters.example_inputs import example_inputs
    from exporters.export import export_onnx
    from exporters.triton_server.repository import write_triton_repository

    asked = dict(shapes)
    if len(asked) < len(shapes):
        raise ValueError(f"`--shapes` names an axis twice: {', '.join(axis for axis, _ in shapes)}")
    model = _load_adapted(model_dir, adapter_dir, base_of)
    report = export_onnx(
        model,
        example_inputs(model, model_dir),
        out,
        adapter=adapter,
        target=target,
        precision=precision,
        form=form,
        use_cache="auto" if cache is None else cache,
        verify=verify,
    )
    print(report)
    ranges = _ranges(report, asked)
    written_for = find("target", target, TARGETS)
    if written_for.explain is not None:
        print(written_for.explain(report.path, shapes=ranges))
    if triton is not None:
        print(write_triton_repository(report.path, triton, shapes=ranges, provider=written_for.provider))


def _load_adapted(model_dir: Path, adapter_dir: Path | None, base_of: Path | None) -> Any:
    """Returns the base with the adapter; or only the base, with the class and head of the adapter in `base_of`."""
    import torch

    from melora_fx import load_adapter
    from melora_fx.load_model import load_model
    from melora_fx.saving.adapter_file import read_adapter

    if adapter_dir is not None and base_of is not None:
        raise ValueError("`--base-of` is for graphs without an adapter: leave out `--base-of` or the adapter")
    hide_loading_bars()
    source = adapter_dir or base_of
    saved = read_adapter(source) if source else None
    facts = saved.model if saved else {}
    model = load_model(
        model_dir,
        class_name=facts.get("class"),
        num_labels=facts.get("num_labels"),
        labels=facts.get("labels", ()),
        pad_token_id=facts.get("pad_token_id"),
        brought=saved.kept_tensors() if saved else (),
        dtype=torch.float32,  # graphs are built in float32; half precision is an option of the export
    )
    if adapter_dir is not None:
        load_adapter(model, adapter_dir)
    elif saved is not None:  # zeros of a new head would be optimised away, and fold-onnx could not store a trained one
        model.load_state_dict(saved.kept_tensors(), strict=False)
    return model


def _ranges(report: ExportReport, asked: Shapes) -> Shapes:
    """Returns the requested ranges and the default ones, the latter only for axes that are free in the graph.

    If ranges are requested and the graph has no cache, all defaults are included.
    """
    free = {axis for axes in report.inputs.values() for axis in axes}
    default = _STEP_SHAPES if PAST_AXIS in free else _DEFAULT_SHAPES
    if asked and default is _DEFAULT_SHAPES:
        return {**default, **asked}
    return {**{axis: sizes for axis, sizes in default.items() if axis in free}, **asked}
