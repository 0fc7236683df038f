"""Checks whether graphs can be exported and run here."""

from benchmarks.common.needs import CACHE, ONNXRUNTIME
from melora_fx.versions import package_version

from .parts import GRAPHS

MIN_TRANSFORMERS = (5, 23)
"""The first version with ONNX Runtime's fusions in its exporter."""
_PROVIDERS = {
    "cuda": ("CUDAExecutionProvider", 'pip uninstall onnxruntime && pip install "onnxruntime-gpu[cuda,cudnn]"'),
    "tensorrt": (
        "TensorrtExecutionProvider",
        'pip uninstall onnxruntime && pip install "onnxruntime-gpu[cuda,cudnn]" "tensorrt>=10,<11"',
    ),
}


def why_no_graph() -> str:
    """Returns what to install before graphs can be exported; empty if nothing is missing."""
    if missing := [reason for need in GRAPHS if (reason := need.why_missing(CACHE))]:
        return "; ".join(missing)
    transformers = package_version("transformers")
    if tuple(int(part) for part in transformers.split(".")[:2]) >= MIN_TRANSFORMERS:
        return ""
    wanted = ".".join(map(str, MIN_TRANSFORMERS))
    return f"transformers {transformers} exports no graphs for ONNX Runtime: pip install 'transformers>={wanted}'"


def why_no_session(provider: str) -> str:
    """Returns what to install before a graph can run on a `provider` of `OrtRunner`; empty if nothing is missing."""
    if reason := ONNXRUNTIME.why_missing(CACHE):
        return reason
    import onnxruntime

    name, remedy = _PROVIDERS[provider]
    return "" if name in onnxruntime.get_available_providers() else f"ONNX Runtime has no {name}: {remedy}"
