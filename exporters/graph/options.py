"""What an export was asked for."""

from dataclasses import dataclass
from pathlib import Path

from .axes import DynamicAxes

ADAPTERS = ("fold", "keep", "swap")
TARGETS = ("portable", "ort-cpu", "ort-cuda", "tensorrt")
PRECISIONS = ("auto", "fp32", "fp16")
FORMS = ("auto", "block", "dense")

FUSED_TARGETS = {"ort-cpu": "cpu", "ort-cuda": "cuda"}
"""Target → the provider whose fusions it gets."""


@dataclass(frozen=True)
class ExportOptions:
    """The arguments of `export_onnx` beside the model and its inputs.

    Attributes:
        path: the .onnx file, also where a folder was given.
        precision: "fp32" or "fp16": "auto" has been settled.
        adapter, target, form, dynamic_axes, opset, verify: as they were given.
    """

    path: Path
    adapter: str
    target: str
    precision: str
    form: str
    dynamic_axes: DynamicAxes
    opset: int | None
    verify: bool

    @property
    def leaves_stale_types(self) -> bool:
        """Whether the graph goes through fusions or the conversion to half precision, which leave types and shapes that
        are no longer right.
        """
        return self.precision == "fp16" or self.target in FUSED_TARGETS
