"""ONNX Runtime is imported only if it is used; an error names it if it is missing."""

import sys
from pathlib import Path

import pytest

from exporters import OrtRunner
from exporters.onnx_runtime import import_onnxruntime
from melora_fx import MELoRAError


def test_no_onnx_runtime_names_both_extras(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MELoRAError, match=r"melora_fx\[cpu\].*melora_fx\[gpu\]"):
        import_onnxruntime()
    with pytest.raises(MELoRAError, match="not installed"):
        OrtRunner(tmp_path / "model.onnx")
