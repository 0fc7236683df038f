"""Less usual decoders: with windows, with user-defined forwards, in training, compiled."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from support.decoders import SIZES, example, llama, spread
from support.models import assert_unchanged

from exporters import OrtRunner, export_onnx
from exporters.generation.decoder import CachedDecoder


def with_window(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "Mistral":
        return spread(hf.MistralForCausalLM(hf.MistralConfig(**SIZES, sliding_window=4)))
    types = ["sliding_attention", "full_attention"]
    config = hf.Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=4, layer_types=types)
    return spread(hf.Gemma3ForCausalLM(config))


@pytest.mark.slow_cases("Mistral-ort-cpu", "Gemma3-portable")
@pytest.mark.parametrize("target", ["portable", "ort-cpu"])
@pytest.mark.parametrize("kind", ["Mistral", "Gemma3"])
def test_a_window_passes_over_the_cache(tmp_path: Path, kind: str, target: str) -> None:
    """The export's own check compares with torch's whole cache; this test compares with no cache."""
    model = with_window(kind)
    report = export_onnx(model, example(), tmp_path, target=target)
    ids, mask = np.arange(26).reshape(2, 13) + 3, np.ones((2, 13), np.int64)
    mask[0, :3] = 0
    decoder = CachedDecoder(OrtRunner(report.path), 2)
    steps = [decoder.step(ids[:, :6], mask[:, :6])]
    steps += [decoder.step(ids[:, end - 1 : end], mask[:, :end]) for end in range(7, 14)]
    for row, start in enumerate((3, 0)):
        with torch.no_grad():
            expected = model(torch.from_numpy(ids[row : row + 1, start:]), use_cache=False).logits[0].numpy()
        logits = np.concatenate(steps, axis=1)[row, start:]
        np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)


class WithoutPositions(hf.LlamaForCausalLM):
    def forward(self, input_ids: Any, attention_mask: Any = None, cache: Any = None, use_cache: Any = None) -> Any:
        return super().forward(input_ids, attention_mask, cache=cache, use_cache=use_cache)


def in_training() -> Any:
    model = llama(attention_dropout=0.5).train()
    model.activation_checkpointing_enable()
    return model


def with_its_own_forward() -> Any:
    model = llama()
    inner = model.forward

    def doubled(input_ids: Any, attention_mask: Any = None, cache: Any = None, use_cache: Any = None) -> Any:
        outputs = inner(input_ids, attention_mask, cache=cache, use_cache=use_cache)
        outputs.logits = 2 * outputs.logits
        return outputs

    model.forward = doubled
    return model


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method")
@pytest.mark.parametrize(
    "make",
    [
        in_training,
        with_its_own_forward,
        lambda: spread(WithoutPositions(hf.LlamaConfig(**SIZES))),
        lambda: torch.compile(llama(), backend="eager"),
        lambda: llama(output_hidden_states=True),
    ],
    ids=["in training", "its own forward", "without positions", "compiled", "more outputs"],
)
def test_less_usual_models(tmp_path: Path, make: Any) -> None:
    """One text, exported with its first token, and run token by token."""
    torch.manual_seed(0)
    model = make()
    with assert_unchanged(model):
        report = export_onnx(model, {"input_ids": torch.tensor([[5]])}, tmp_path)
    assert [*report.outputs][:2] == ["logits", "present.0.key"]
    decoder = CachedDecoder(OrtRunner(report.path), 1)
    steps = [decoder.step(np.array([[token]]), np.ones((1, place + 1))) for place, token in enumerate((5, 9, 4))]
    with torch.no_grad(), nullcontext(model.eval()):
        expected = model(input_ids=torch.tensor([[5, 9, 4]]), use_cache=False).logits[0].numpy()
    np.testing.assert_allclose(np.concatenate(steps, 1)[0], expected, atol=1e-4 * np.abs(expected).max(), rtol=0)
