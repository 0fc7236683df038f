"""Sessions compute on the requested provider, or are not created."""

from pathlib import Path

import pytest
import torch
from support.onnx_files import WEIGHT, write_graph

from exporters import OrtRunner
from exporters.onnx_runtime import import_onnxruntime
from exporters.runtime.providers import CPU, CUDA, TENSORRT, choose_provider
from exporters.runtime.session import _reason, _remedy, make_session
from melora_fx import MELoRAError

AVAILABLE = import_onnxruntime().get_available_providers()


@pytest.mark.skipif(CUDA in AVAILABLE, reason="needs the CPU package, but onnxruntime-gpu is installed")
@pytest.mark.parametrize(("provider", "name"), [("cuda", CUDA), ("tensorrt", TENSORRT)], ids=["cuda", "tensorrt"])
def test_a_provider_that_the_package_lacks(tmp_path: Path, provider: str, name: str) -> None:
    path = write_graph(tmp_path, data=WEIGHT)
    with pytest.raises(MELoRAError, match=rf"{name} is not in .*melora_fx\[gpu\].*only one may be installed"):
        OrtRunner(path, provider=provider)
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}


@pytest.mark.skipif(CUDA not in AVAILABLE, reason="needs onnxruntime-gpu")
@pytest.mark.skipif(torch.cuda.is_available() or Path("/dev/nvidia0").exists(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_no_silent_fallback_to_the_cpu(tmp_path: Path, provider: str, capfd: pytest.CaptureFixture[str]) -> None:
    path = write_graph(tmp_path, data=WEIGHT)
    with pytest.raises(MELoRAError, match=r"is missing|CUDA failure"):
        OrtRunner(path, provider=provider)
    assert "Falling back" not in capfd.readouterr().out


def test_sessions_are_made_as_chosen(tmp_path: Path) -> None:
    path = write_graph(tmp_path, data=WEIGHT)
    choice = choose_provider("cpu", path, {"x": ("batch", 2)}, threads=1, shapes={"batch": (4, 4, 4)})
    session = make_session(import_onnxruntime(), path, choice)
    assert session.get_providers() == [CPU]
    assert session.get_session_options().intra_op_num_threads == 1
    assert session.get_outputs()[0].shape == [4, 3]
    assert not session._enable_fallback, "a failed run is not tried again on the CPU"


@pytest.mark.parametrize(
    ("library", "text"),
    [
        ("libcuda.so.1", "driver"),
        ("libnvinfer.so.10", 'TensorRT 10: pip install "tensorrt>=10,<11"'),
        ("libcublasLt.so.13", "melora_fx"),
    ],
    ids=["driver", "tensorrt", "cuda"],
)
def test_each_missing_library_has_its_remedy(library: str, text: str) -> None:
    assert text in _remedy(library)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("file.cc:1 Call CUDA failure 35: driver is old ; GPU=-1 ; hostname=h", "CUDA failure 35: driver is old"),
        ("file.cc:1 Create [ERROR] [TensorRT] The value is wrong.\n", "The value is wrong."),
        ("something else", "something else"),
    ],
    ids=["cuda", "tensorrt", "other"],
)
def test_errors_are_what_was_said(said: str, reason: str) -> None:
    """Texts of onnxruntime-gpu 1.31, shortened."""
    assert _reason(RuntimeError(said)) == reason
