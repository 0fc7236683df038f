"""float16 graphs: types, numbers, and values that half precision cannot represent."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from support.exports import Exports
from support.models import tokens
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from exporters import OrtRunner, export_onnx
from exporters.runtime.session import HALF_CONFIG

FLOAT = onnx.TensorProto.FLOAT
FLOAT16 = onnx.TensorProto.FLOAT16


@pytest.mark.slow_cases("portable-swap", "ort-cuda-fold")
@pytest.mark.parametrize("adapter", ["fold", "keep", "swap"])
@pytest.mark.parametrize("target", ["portable", "ort-cuda"])
def test_weights_are_half_and_inputs_and_outputs_as_they_were(adapter: str, target: str, exports: Exports) -> None:
    report = exports("adapted bert", adapter=adapter, target=target, precision="fp16")
    graph = onnx.load(report.path).graph
    inputs = {value.name for value in graph.input}
    large = [item for item in graph.initializer if np.prod(item.dims) > 20 and item.name not in inputs]
    assert {item.data_type for item in large} - {onnx.TensorProto.INT64} == {FLOAT16}
    assert {value.type.tensor_type.elem_type for value in graph.output} == {FLOAT}
    assert report.max_rel_error is not None
    assert 1e-6 < report.max_rel_error < 2e-2
    if adapter == "swap":
        kinds = {v.type.tensor_type.elem_type for v in graph.input if "lora" in v.name}
        assert kinds == {FLOAT}


@pytest.mark.slow
@pytest.mark.parametrize("target", ["portable", "ort-cuda"])
def test_norms_of_large_activations_do_not_overflow(target: str, tmp_path: Path) -> None:
    """Activations of 1,000, as in language models; half precision cannot represent their squares."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1000 / model.model.embed_tokens.weight.abs().max())
    report = export_onnx(model, tokens(), tmp_path, target=target, precision="fp16")
    assert report.max_rel_error is not None
    assert report.max_rel_error < 2e-2


def test_the_sums_of_experts_stay_in_float32(tmp_path: Path) -> None:
    """ONNX Runtime's CPU has no sum into chosen rows in half precision."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
    report = export_onnx(MixtralForCausalLM(config).eval(), tokens(), tmp_path, target="ort-cpu", precision="fp16")
    assert report.max_rel_error is not None
    assert report.max_rel_error < 2e-2


@pytest.mark.slow
def test_values_beyond_the_range_are_cut_to_it(tmp_path: Path) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((64, 64), 1e6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight

    export_onnx(Wide(), {"x": torch.zeros(2, 64)}, tmp_path, precision="fp16", verify=False)
    x = np.zeros((2, 64), np.float32)
    x[:, 0] = 1e-3
    np.testing.assert_allclose(OrtRunner(tmp_path / "model.onnx").run({"x": x})["output"], 65.5, rtol=1e-2)


@pytest.mark.slow
def test_a_transposed_input_of_a_product(tmp_path: Path) -> None:
    """Without `HALF_CONFIG`, ONNX Runtime 1.32 crashes the process when it loads this graph on an x86 CPU."""

    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(24, 48)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x.transpose(0, 1)).transpose(0, 1)

    export_onnx(Sequence(), {"x": torch.randn(2, 6, 24)}, tmp_path, precision="fp16")
    runner = OrtRunner(tmp_path / "model.onnx", session_config={"session.intra_op.allow_spinning": "0"})
    assert runner.describe()["session_config"] == HALF_CONFIG | {"session.intra_op.allow_spinning": "0"}
