"""Refuses invalid exports before any work is done, and decides what the graph will contain of the adapters."""

from torch import fx, nn

from exporters.graph.export import AdapterForm, ExportOptions, Sites
from melora_fx import MELoRAError
from melora_fx.capture.model_settings import HALF
from melora_fx.distributed.tensors import is_sharded
from melora_fx.names import first_of, unwrap
from melora_fx.rewriting.sites import is_disabled
from melora_fx.whole_capture.dynamic_axes import refuse_malformed_axes

from .export_files import refuse_folder
from .onnx_runtime import import_onnxruntime
from .private import runs_under_accelerate
from .targets import NO_ADAPTER


def refuse_arguments(model: nn.Module, options: ExportOptions) -> None:
    """Raises ValueError or MELoRAError for everything that can be refused without looking at the adapters."""
    refuse_malformed_axes(options.dynamic_axes)
    if options.adapter.is_swappable and not options.target.takes_swap:
        raise ValueError(
            f'`target="{options.target.name}"` accepts no optional inputs, which `adapter="{options.adapter.name}"` '
            'needs: use another target, or "keep"'
        )
    if runs_under_accelerate(model):
        raise MELoRAError(
            "`model` runs under accelerate's autocast (`mixed_precision`, a Trainer's `bf16` or `fp16`), which a graph "
            "would keep: call `accelerator.unwrap_model(model, keep_fp32_wrapper=False)` first"
        )
    if sharded := [name for name, parameter in model.named_parameters() if is_sharded(parameter)]:
        raise MELoRAError(
            f"{first_of(sharded)}: sharded over processes, but a graph contains whole weights: call `save_adapter`, "
            "then export in a single process: the model with the adapter, or the base for `fold_onnx`"
        )
    if options.verify or options.precision.needs_runtime:
        import_onnxruntime()
    if isinstance(unwrap(model), fx.GraphModule) and (half := half_dtypes(model)):
        raise MELoRAError(
            f"the model is a graph that computes in {' and '.join(half)}: capture `model.float()`; for a graph in "
            'half precision, export the capture with `precision="fp16"`'
        )
    refuse_folder(options.path)


def half_dtypes(model: nn.Module) -> list[str]:
    """Returns the names of the half-precision dtypes among the model's parameters, sorted."""
    found = {parameter.dtype for parameter in model.parameters() if parameter.dtype in HALF}
    return sorted(str(dtype).removeprefix("torch.") for dtype in found)


def held_adapter(model: nn.Module, asked: AdapterForm, found: Sites) -> AdapterForm:
    """Returns the adapter form of the graph: `asked`, or `NO_ADAPTER` if the model has no sites or computes its base.

    Raises:
        MELoRAError: if the model's adapters cannot be exported in the form `asked`.
    """
    if asked.refuse is not None:
        asked.refuse(model, found)
    held = asked if found and not is_disabled(model) else NO_ADAPTER
    grouped = [f"`{name}`" for name, site in found.items() if not site.record.is_aten]
    if held.stays and grouped:  # there is no ONNX operator for them
        raise MELoRAError(
            f"{', '.join(grouped)}: an adapter of experts that are computed by `grouped_mm` cannot stay in a graph: "
            'export with `adapter="fold"`, or call `model.set_experts_implementation("batched_mm")` before `rewrite`'
        )
    return held
