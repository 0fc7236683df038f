"""The description of the machine, and the memory and file size of a graph."""

import importlib.metadata
import re
import subprocess
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from support.models import randn
from support.onnx_files import data_of

from exporters import export_onnx
from exporters.measuring.machine import device_name, file_size_mib, package_versions, peak_memory_mib, source_commit
from melora_fx import MELoRAError


class _Wide(torch.nn.Module):
    """8 MiB of weights, and 8 MiB of a hidden state for 512 rows."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(256, 4096)
        self.down = torch.nn.Linear(4096, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wide") / "wide.onnx"
    export_onnx(_Wide(), {"x": randn(2, 256)}, path, verify=False)
    return path


@pytest.mark.slow
def test_peak_memory_grows_with_the_input_and_not_with_this_process(graph: Path) -> None:
    small, large = (peak_memory_mib(graph, {"x": randn(rows, 256).numpy()}, 1) for rows in (2, 4096))
    assert small is not None
    assert large is not None
    assert 4 < small < 100, "the weights, but not the memory of this process"
    assert large - small > 32, "a hidden state of 64 MiB"


def test_a_graph_that_does_not_run_says_why(graph: Path) -> None:
    with pytest.raises(MELoRAError, match=r"wide.onnx` cannot be run in a separate process: .*y"):
        peak_memory_mib(graph, {"y": randn(2, 256).numpy()}, 1)


def test_the_file_size_counts_external_data(graph: Path) -> None:
    both = sum(file.stat().st_size for file in (graph, data_of(graph)))
    assert file_size_mib(graph) == both / 2**20 > 8
    inline = graph.with_name("inline.onnx")
    onnx.save(onnx.load(graph), inline)
    assert file_size_mib(inline) == inline.stat().st_size / 2**20


def test_device_versions_and_commit() -> None:
    assert re.fullmatch(r".+, \d+ cores", device_name("cpu"))
    versions = package_versions()
    public = torch.__version__.partition("+")[0]  # all that the metadata of PyPI's wheel has
    assert any(f"torch {version}; " in versions for version in (torch.__version__, public))
    assert versions.endswith(f"onnxruntime {onnxruntime.__version__}")
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    if git.returncode == 0 and source_commit():
        assert source_commit().removesuffix("-dirty") == git.stdout.strip()


def test_code_that_runs_from_its_folder_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def installed(name: str) -> str:
        if name == "melora_fx":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(importlib.metadata, "version", installed)
    assert package_versions("peft").startswith("melora_fx not installed; torch 1.0; ")
    assert package_versions("peft").endswith("; peft 1.0")
