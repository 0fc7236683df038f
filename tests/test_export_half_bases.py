"""Bases in half precision: their tensors become float32 one by one for an export, and are restored afterwards."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.decoders import CONFIG, example, llama
from support.models import IN, assert_equal, assert_unchanged, fill, randn, rewritten_tower, tower

import melora_fx
from exporters import OrtRunner, export_onnx
from melora_fx import MELoRAError
from melora_fx.capture.model_settings import in_float32

HALF = [torch.float16, torch.bfloat16]


@pytest.mark.slow_cases("keep-torch.bfloat16", "fold-torch.float16")
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("adapter", ["fold", "keep", "swap"])
def test_the_graph_is_that_of_the_model_in_float32(tmp_path: Path, dtype: torch.dtype, adapter: str) -> None:
    model = fill(rewritten_tower().to(dtype))
    with assert_unchanged(model):
        report = export_onnx(model, {"x": randn(2, IN)}, tmp_path / "half.onnx", adapter=adapter)
    name = str(dtype).removeprefix("torch.")
    assert f"the model's weights are {name}: the graph is built from them in float32" in report.notes
    export_onnx(model.float(), {"x": randn(2, IN)}, tmp_path / "float.onnx", adapter=adapter)
    inputs = {"x": randn(5, IN).numpy()}
    found, expected = (OrtRunner(tmp_path / f"{which}.onnx").run(inputs)["output"] for which in ("half", "float"))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.slow_cases("*bfloat16")
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_decoders(tmp_path: Path, dtype: torch.dtype) -> None:
    model = fill(melora_fx.rewrite(llama().to(dtype), "all-linear", CONFIG))
    with assert_unchanged(model):
        report = export_onnx(model, example(), tmp_path, adapter="swap", target="ort-cpu")
    assert report.max_rel_error <= 1e-4


def test_an_export_that_fails_leaves_the_model_in_half_precision(tmp_path: Path) -> None:
    model = tower().bfloat16()
    with assert_unchanged(model), pytest.raises(MELoRAError, match="does not accept `example_inputs`"):
        export_onnx(model, {"x": randn(2, IN + 1)}, tmp_path)


def test_tensors_become_float32_one_by_one() -> None:
    model = tower().bfloat16()
    first, second, *_ = model.parameters()
    second.data = second.data.float()
    address = second.data_ptr()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    buffer = torch.ones(3, dtype=torch.float16)
    model.register_buffer("scale", buffer)
    with in_float32(model):
        assert {tensor.dtype for tensor in (*model.parameters(), *model.buffers())} == {torch.float32}
        assert next(model.parameters()) is first
        assert second.data_ptr() == address, "float32 tensors are not touched"
    assert model.scale is buffer
    assert buffer.dtype == torch.float16
    for parameter, values in zip(model.parameters(), before, strict=True):
        assert_equal(parameter.detach(), values)


def test_a_change_inside_is_kept() -> None:
    model = torch.nn.Linear(2, 2).bfloat16()
    with in_float32(model), torch.no_grad():
        model.weight.fill_(1.5)
    assert model.weight.dtype == torch.bfloat16
    assert (model.weight == 1.5).all()
