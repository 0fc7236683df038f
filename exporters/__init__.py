"""exporters: what leaves torch: ONNX graphs, the runners that compute them, and what they cost."""

from exporters.adapters.ort_adapter import write_ort_adapter
from exporters.measuring.compare import Comparison, compare
from exporters.measuring.latency import Latency, LatencyTable, measure_latency
from exporters.runtime.ort_runner import OrtRunner
from exporters.runtime.torch_runner import TorchRunner
from exporters.tensorrt_check.check import TensorRTReport, check_tensorrt
from exporters.triton_server.repository import TritonModel, write_triton_repository

from .export import export_onnx
from .export_report import ExportReport
from .fold_onnx import fold_onnx

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
