"""Takes models and adapters out of torch: ONNX graphs, the runners that run them, and measurements of their cost.

Each name is imported when it is first used, so that timing a torch model needs no exporter.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exporters.adapters.arithmetic import add_adapters, average_adapters, scale_adapter
    from exporters.adapters.compress import CompressReport, compress_adapter
    from exporters.adapters.gguf_adapter import write_gguf_adapter
    from exporters.adapters.mlx_adapter import write_mlx_adapter
    from exporters.adapters.ort_adapter import write_ort_adapter
    from exporters.generation.generate import generate
    from exporters.measuring.compare import Comparison, compare
    from exporters.measuring.latency import Latency, LatencyTable, measure_latency
    from exporters.peft_adapters.reader import read_peft_adapter
    from exporters.peft_adapters.writer import write_peft_adapter
    from exporters.runtime.ort_runner import OrtRunner
    from exporters.runtime.torch_runner import TorchRunner
    from exporters.tensorrt_check.check import TensorRTReport, check_tensorrt
    from exporters.triton_server.repository import TritonModel, write_triton_repository

    from .export import export_onnx
    from .export_report import ExportReport
    from .onnx_fold import fold_onnx

_MODULES = {
    "adapters.arithmetic": ("add_adapters", "average_adapters", "scale_adapter"),
    "adapters.compress": ("CompressReport", "compress_adapter"),
    "adapters.mlx_adapter": ("write_mlx_adapter",),
    "adapters.gguf_adapter": ("write_gguf_adapter",),
    "adapters.ort_adapter": ("write_ort_adapter",),
    "peft_adapters.reader": ("read_peft_adapter",),
    "peft_adapters.writer": ("write_peft_adapter",),
    "generation.generate": ("generate",),
    "measuring.compare": ("Comparison", "compare"),
    "measuring.latency": ("Latency", "LatencyTable", "measure_latency"),
    "runtime.ort_runner": ("OrtRunner",),
    "runtime.torch_runner": ("TorchRunner",),
    "tensorrt_check.check": ("TensorRTReport", "check_tensorrt"),
    "triton_server.repository": ("TritonModel", "write_triton_repository"),
    "export": ("export_onnx",),
    "export_report": ("ExportReport",),
    "onnx_fold": ("fold_onnx",),
}
"""Module → the public names that it defines. No module may have a public name: importing it would hide that name."""

__all__ = [
    "Comparison",
    "CompressReport",
    "ExportReport",
    "Latency",
    "LatencyTable",
    "OrtRunner",
    "TensorRTReport",
    "TorchRunner",
    "TritonModel",
    "add_adapters",
    "average_adapters",
    "check_tensorrt",
    "compare",
    "compress_adapter",
    "export_onnx",
    "fold_onnx",
    "generate",
    "measure_latency",
    "read_peft_adapter",
    "scale_adapter",
    "write_gguf_adapter",
    "write_mlx_adapter",
    "write_ort_adapter",
    "write_peft_adapter",
    "write_triton_repository",
]


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            globals()[name] = getattr(import_module(f"{__name__}.{module}"), name)
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
