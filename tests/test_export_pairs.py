"""Encoder-decoder models become two graphs: an encoder's, and a decoder's with a cache."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from support.decoders import CONFIG, spread, write_tokenizer
from support.models import assert_unchanged, fill

import melora_fx
from exporters import export_onnx, generate
from melora_fx import MELoRAError

PROMPTS = ["w5 w9 w4 w20 w33", "w7 w8", "w11"]
SIZES = {"vocab_size": 51, "d_model": 32, "pad_token_id": 0, "eos_token_id": 50}
BART = SIZES | {
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
}


def t5() -> Any:
    torch.manual_seed(0)
    config = hf.T5Config(**SIZES, decoder_start_token_id=0, d_kv=16, d_ff=40, num_layers=2, num_heads=2)
    return hf.T5ForConditionalGeneration(config)


def bart(**settings: Any) -> Any:
    torch.manual_seed(0)
    return hf.BartForConditionalGeneration(hf.BartConfig(**BART, decoder_start_token_id=2, **settings))


MODELS = {
    "T5": t5,
    "BART": lambda: bart(forced_eos_token_id=None),
    "BART that begins with a token of its own": lambda: bart(forced_bos_token_id=7, forced_eos_token_id=None),
}


def loaded(name: str, folder: Path) -> Any:
    """Returns a model loaded from a folder with a tokenizer, with a filled adapter."""
    model = spread(MODELS[name]())
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return fill(melora_fx.rewrite(type(model).from_pretrained(folder).eval(), "all-linear", CONFIG))


def by_torch(model: Any, folder: Path, new_tokens: int = 12) -> list[str]:
    """Returns what torch writes for each prompt alone."""
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    written = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=False,
            num_beams=1,
            max_new_tokens=new_tokens,
        )
        written.append(tokenizer.decode(ids[0], skip_special_tokens=True))
    return written


def example(folder: Path) -> dict[str, torch.Tensor]:
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(PROMPTS[:2], padding=True, return_tensors="pt")
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.slow_cases("T5-keep-portable", "BART-swap-ort-cpu", "BART that *")
@pytest.mark.parametrize(
    ("name", "adapter", "target"),
    [
        ("T5", "swap", "portable"),
        ("T5", "keep", "portable"),
        ("T5", "fold", "ort-cpu"),
        ("BART", "swap", "ort-cpu"),
        ("BART", "keep", "ort-cpu"),
        ("BART that begins with a token of its own", "fold", "portable"),
    ],
)
def test_what_a_pair_writes_is_torchs(tmp_path: Path, name: str, adapter: str, target: str) -> None:
    model = loaded(name, tmp_path / "base")
    melora_fx.save_adapter(model, tmp_path / "adapter")
    with assert_unchanged(model):
        report = export_onnx(model, example(tmp_path / "base"), tmp_path / "out", adapter=adapter, target=target)
    assert report.path.endswith("decoder_model.onnx")
    assert report.encoder is not None
    assert list(report.encoder.outputs)[:2] == ["last_hidden_state", "present.0.encoder.key"]
    assert report.encoder.path in str(report)
    own = {"adapter": tmp_path / "adapter"} if adapter == "swap" else {}
    assert generate(tmp_path / "out", PROMPTS, max_new_tokens=12, **own) == by_torch(model, tmp_path / "base")
    for index, prompt in enumerate(PROMPTS):
        alone = generate(report.path, prompt, max_new_tokens=12, **own)
        assert alone == by_torch(model, tmp_path / "base")[index : index + 1]
    if adapter == "swap":
        with melora_fx.disabled(model):
            expected = by_torch(model, tmp_path / "base")
        assert generate(tmp_path / "out", PROMPTS, max_new_tokens=12) == expected


def test_a_file_holds_one_graph(tmp_path: Path) -> None:
    inputs = {"input_ids": torch.tensor([[5, 9, 4], [7, 8, 3]])}
    with pytest.raises(MELoRAError, match="an encoder-decoder model is exported as two graphs: name a folder"):
        export_onnx(t5(), inputs, tmp_path / "t5.onnx", use_cache=True)
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_a_file_holds_a_graph_without_a_cache(tmp_path: Path) -> None:
    tokens = torch.tensor([[5, 9, 4], [7, 8, 3]])
    inputs = {"input_ids": tokens, "decoder_input_ids": tokens[:, :2].contiguous()}
    report = export_onnx(t5(), inputs, tmp_path / "t5.onnx")
    assert "logits" in report.outputs
    assert any(note.startswith("without a key-value cache: an encoder-decoder model") for note in report.notes)
