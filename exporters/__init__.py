"""exporters: what leaves torch: ONNX graphs, the runners that compute them, and what they cost."""

from .compare import Comparison, Latency, LatencyTable, compare, measure_latency
from .export import ExportReport, export_onnx
from .fold_onnx import fold_onnx
from .ort_runner import OrtRunner
from .runners import TorchRunner
from .swap import write_ort_adapter
from .tensorrt import TensorRTReport, check_tensorrt
from .triton import TritonModel, write_triton_repository

__all__ = [
    "Comparison",
    "ExportReport",
    "Latency",
    "LatencyTable",
    "OrtRunner",
    "TensorRTReport",
    "TorchRunner",
    "TritonModel",
    "check_tensorrt",
    "compare",
    "export_onnx",
    "fold_onnx",
    "measure_latency",
    "write_ort_adapter",
    "write_triton_repository",
]
