"""The memory of an export: the model is folded in place and never copied, whatever the target."""

import subprocess
import sys
from pathlib import Path

import pytest

EXPORT = """
import sys, warnings
sys.path.insert(0, "tests")

import torch
from transformers import LlamaConfig, LlamaForCausalLM
import melora_fx
from exporters import export_onnx
from support.peak_memory import PeakMemory

warnings.simplefilter("ignore")
out, target, verify, dtype = sys.argv[1], sys.argv[2], sys.argv[3] == "verify", getattr(torch, sys.argv[4])
sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 4, "vocab_size": 32000}
model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=16, num_key_value_heads=4)).eval().to(dtype)
model = melora_fx.rewrite(model, ["q_proj", "v_proj"], melora_fx.MELoRAConfig())
inputs = {"input_ids": torch.ones(2, 8, dtype=torch.long)}

weights = sum(parameter.nbytes for parameter in model.parameters())
in_float32 = 4 * sum(parameter.numel() for parameter in model.parameters())
with PeakMemory() as memory:
    export_onnx(model, inputs, out, target=target, verify=verify)
print(in_float32, (weights + memory.growth) / in_float32)
"""


@pytest.mark.slow_cases("ort-cuda-verify-float32", "ort-cpu-no-bfloat16")
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads /proc")
@pytest.mark.parametrize(
    ("target", "verify", "dtype"),
    [("portable", "no", "float32"), ("ort-cpu", "no", "bfloat16"), ("ort-cuda", "verify", "float32")],
)
def test_the_peak_is_below_1_6_times_the_weights(target: str, verify: str, dtype: str, tmp_path: Path) -> None:
    """Counts the memory of the process, without pages of the written file, which ONNX Runtime maps and the system can
    reclaim. For a model in half precision the weights count in float32, as they are in the graph.
    """
    command = [sys.executable, "-c", EXPORT, str(tmp_path / "model.onnx"), target, verify, dtype]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    weights, ratio = map(float, result.stdout.split())
    assert weights > 1e9
    assert 1.0 < ratio <= 1.6
