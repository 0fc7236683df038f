"""Runners give the model's outputs by name, and refuse what they cannot run."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support import assert_equal, bert, output_of, randn, tokens, tower

from exporters import OrtRunner, TorchRunner, export_onnx
from exporters.runtime import import_onnxruntime
from melora_fx import MELoRAError


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runners")
    export_onnx(tower(), (randn(2, 24),), folder, verify=False)
    return folder / "model.onnx"


def test_torch_runner_returns_the_models_outputs() -> None:
    outputs = TorchRunner(bert()).run({name: value.numpy() for name, value in tokens().items()})
    assert set(outputs) == {"last_hidden_state", "pooler_output"}
    assert_equal(torch.from_numpy(outputs["last_hidden_state"]), output_of(bert(), tokens()))


def test_torch_runner_puts_the_number_of_threads_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = tower(), []
    model.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    TorchRunner(model, threads=2).run({"x": randn(2, 24)})
    assert seen == [2]
    assert torch.get_num_threads() == before


def test_ort_runner_takes_arrays_and_tensors(path: Path) -> None:
    runner = OrtRunner(path, threads=1)
    x = randn(3, 24)
    assert runner.threads == 1
    assert_equal(*(torch.from_numpy(runner.run({"x": value})["output"]) for value in (x, x.numpy())))
    np.testing.assert_allclose(runner.run({"x": x})["output"], output_of(tower(), x).numpy(), rtol=1e-5, atol=1e-5)


def test_unknown_provider(path: Path) -> None:
    with pytest.raises(ValueError, match="`provider` \\(='npu'\\) must be one of 'cpu'"):
        OrtRunner(path, provider="npu")


def test_missing_and_broken_files(tmp_path: Path, path: Path) -> None:
    with pytest.raises(MELoRAError, match="does not exist"):
        OrtRunner(tmp_path / "none.onnx")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(path.read_bytes()[:100])
    with pytest.raises(MELoRAError, match="ONNX Runtime cannot load"):
        OrtRunner(broken)


@pytest.mark.parametrize(
    ("inputs", "text"),
    [({}, "missing \\['x'\\]"), ({"x": randn(2, 24), "y": randn(1)}, "unknown \\['y'\\]"), ({"x": randn(2, 7)}, "run")],
    ids=["missing", "unknown", "shape"],
)
def test_inputs_are_checked(path: Path, inputs: dict[str, torch.Tensor], text: str) -> None:
    with pytest.raises(MELoRAError, match=text):
        OrtRunner(path).run(inputs)


def test_no_onnx_runtime_names_both_extras(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MELoRAError, match=r"melora_fx\[cpu\].*melora_fx\[gpu\]"):
        import_onnxruntime()
    with pytest.raises(MELoRAError, match="not installed"):
        OrtRunner(path)
