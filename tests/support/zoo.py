"""Tiny random models of every architecture that docs/ARCHITECTURES.md lists.

`sites` is how many linears "all-linear" must adapt, counted by hand from the architecture: the layers times the linears
of a layer, plus the linears outside the layers, without heads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import nn

from support.models import randn, tokens

V = 50
H = 24
F = 36
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_ENCODER = {
    "vocab_size": V,
    "hidden_size": H,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": F,
    "max_position_embeddings": 40,
}
_DECODER = _ENCODER | _TOKENS | {"num_key_value_heads": 1}
_SEQ2SEQ = {
    "vocab_size": V,
    "d_model": H,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": F,
    "decoder_ffn_dim": F,
    "decoder_start_token_id": 2,
} | _TOKENS
_VISION = {
    "hidden_size": H,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": F,
    "image_size": 16,
    "patch_size": 8,
}


@dataclass(frozen=True)
class Entry:
    """`build` returns the model, `inputs(batch, length)` its keyword arguments; `refused` counts what has no pattern.

    `in_place` is the number of sites in place, if it differs from `sites`; `inductor` compiles it with Inductor too.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], dict[str, torch.Tensor]]
    sites: int
    in_place: int | None = None  # if the in-place capture must refuse some of them
    refused: int = 0
    inductor: bool = False


def _text(batch: int, length: int) -> dict[str, torch.Tensor]:
    return tokens(batch, length, seed=batch + length)


def _pair(batch: int, length: int) -> dict[str, torch.Tensor]:
    return _text(batch, length) | {"decoder_input_ids": tokens(batch, 4, seed=9)["input_ids"]}


def _image(batch: int, _: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": randn(batch, 3, 16, 16)}


def _audio(batch: int, _: int) -> dict[str, torch.Tensor]:
    return {"input_features": randn(batch, 8, 32), "decoder_input_ids": tokens(batch, 4)["input_ids"]}


def _image_and_text(batch: int, length: int) -> dict[str, torch.Tensor]:
    return _image(batch, length) | _text(batch, length)


def _vectors(batch: int, length: int) -> dict[str, torch.Tensor]:
    return {"x": randn(batch, length, H)}


class HandWritten(nn.Module):
    """`x @ W.T + b`, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(F, H) / 5)
        self.b = nn.Parameter(torch.randn(F))
        self.v = nn.Parameter(torch.randn(F, H) / 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ self.w.T + self.b) @ self.v


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention` as self-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(H, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class CrossAttention(SelfAttention):
    """`nn.MultiheadAttention` on another sequence: its packed weight is used in pieces."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x.flip(1), x.flip(1), need_weights=False)[0]


class Encoder(nn.Module):
    """`nn.TransformerEncoder` of two layers."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(H, 2, F, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(x)


def _hf(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(hf, model)(getattr(hf, config)(**options))


def _mixtral() -> nn.Module:
    model = hf.MixtralForCausalLM(hf.MixtralConfig(**_DECODER, num_local_experts=4, num_experts_per_tok=2))
    model.set_experts_implementation("batched_mm")  # the default does not compute in float64
    return model


def _clip() -> nn.Module:
    text = _ENCODER | _TOKENS
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=_VISION, projection_dim=12))


ZOO: dict[str, Entry] = {
    "BERT": Entry(
        _hf("BertForSequenceClassification", "BertConfig", **_ENCODER), _text, sites=2 * 6 + 1, inductor=True
    ),
    "RoBERTa": Entry(
        _hf("RobertaForSequenceClassification", "RobertaConfig", **_ENCODER | {"pad_token_id": 0}), _text, sites=2 * 6
    ),
    "DistilBERT": Entry(
        _hf(
            "DistilBertForSequenceClassification",
            "DistilBertConfig",
            vocab_size=V,
            dim=H,
            n_layers=2,
            n_heads=2,
            hidden_dim=F,
            max_position_embeddings=40,
        ),
        _text,
        sites=2 * 6,
    ),
    "ALBERT": Entry(
        _hf("AlbertForSequenceClassification", "AlbertConfig", **_ENCODER, embedding_size=12), _text, sites=6 + 2
    ),
    "DeBERTa-v2": Entry(
        _hf(
            "DebertaV2ForSequenceClassification",
            "DebertaV2Config",
            **_ENCODER,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_buckets=8,
        ),
        _text,
        sites=2 * 8,
    ),
    "ModernBERT": Entry(
        _hf(
            "ModernBertForSequenceClassification",
            "ModernBertConfig",
            **_ENCODER,
            **_TOKENS,
            cls_token_id=1,
            sep_token_id=2,
            global_attn_every_n_layers=2,
        ),
        _text,
        sites=2 * 4,
    ),
    "MPNet": Entry(_hf("MPNetForSequenceClassification", "MPNetConfig", **_ENCODER), _text, sites=2 * 6),
    "ELECTRA": Entry(
        _hf("ElectraForSequenceClassification", "ElectraConfig", **_ENCODER, embedding_size=12), _text, sites=2 * 6 + 1
    ),
    "GPT-2": Entry(
        _hf("GPT2LMHeadModel", "GPT2Config", vocab_size=V, n_embd=H, n_layer=2, n_head=2, n_positions=40, **_TOKENS),
        _text,
        sites=2 * 4,
        inductor=True,
    ),
    "Llama": Entry(_hf("LlamaForCausalLM", "LlamaConfig", **_DECODER), _text, sites=2 * 7, inductor=True),
    "Mistral": Entry(_hf("MistralForCausalLM", "MistralConfig", **_DECODER), _text, sites=2 * 7),
    "Qwen2": Entry(_hf("Qwen2ForCausalLM", "Qwen2Config", **_DECODER), _text, sites=2 * 7),
    "Qwen3": Entry(_hf("Qwen3ForCausalLM", "Qwen3Config", **_DECODER, head_dim=12), _text, sites=2 * 7),
    "Gemma 3": Entry(
        _hf("Gemma3ForCausalLM", "Gemma3TextConfig", **_DECODER, head_dim=12, sliding_window=8), _text, sites=2 * 7
    ),
    "Phi-3": Entry(_hf("Phi3ForCausalLM", "Phi3Config", **_DECODER), _text, sites=2 * 4),
    "GPT-NeoX": Entry(_hf("GPTNeoXForCausalLM", "GPTNeoXConfig", **_ENCODER, **_TOKENS), _text, sites=2 * 4),
    "Falcon": Entry(
        _hf(
            "FalconForCausalLM",
            "FalconConfig",
            vocab_size=V,
            hidden_size=H,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=40,
            **_TOKENS,
        ),
        _text,
        sites=2 * 4,
    ),
    "OPT": Entry(
        _hf(
            "OPTForCausalLM",
            "OPTConfig",
            vocab_size=V,
            hidden_size=H,
            num_hidden_layers=2,
            num_attention_heads=2,
            ffn_dim=F,
            max_position_embeddings=40,
            word_embed_proj_dim=H,
            **_TOKENS,
        ),
        _text,
        sites=2 * 6,
    ),
    "Mixtral": Entry(_mixtral, _text, sites=2 * 7),
    "T5": Entry(
        _hf(
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=V,
            d_model=H,
            d_kv=12,
            d_ff=F,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
        ),
        _pair,
        sites=2 * 6 + 2 * 10,
    ),
    "BART": Entry(
        _hf(
            "BartForConditionalGeneration", "BartConfig", **_SEQ2SEQ, max_position_embeddings=40, forced_eos_token_id=2
        ),
        _pair,
        sites=6 + 10,
    ),
    "Whisper": Entry(
        _hf(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            **_SEQ2SEQ,
            num_mel_bins=8,
            max_source_positions=16,
            max_target_positions=20,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        ),
        _audio,
        sites=6 + 10,
    ),
    "ViT": Entry(_hf("ViTForImageClassification", "ViTConfig", **_VISION), _image, sites=2 * 6, inductor=True),
    "DINOv2": Entry(_hf("Dinov2ForImageClassification", "Dinov2Config", **_VISION, mlp_ratio=2), _image, sites=2 * 6),
    "CLIP": Entry(_clip, _image_and_text, sites=2 * 6 + 2 * 6 + 2),
    "nn.TransformerEncoder": Entry(Encoder, _vectors, sites=2 * 4, in_place=4, refused=0),
    "nn.MultiheadAttention": Entry(SelfAttention, _vectors, sites=2, in_place=0),
    "nn.MultiheadAttention, cross": Entry(CrossAttention, _vectors, sites=2, in_place=0),
    "x @ self.w.T + self.b": Entry(HandWritten, _vectors, sites=2),
}


SIX = ("BERT", "GPT-2", "Llama", "T5", "ViT", "Mixtral")
"""The architectures that a sweep tries by default: one of each kind of transformers' models."""

HUGGING_FACE = tuple(name for name in ZOO if not name.startswith(("nn.", "x @")))


def build(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Returns a model in eval mode, with weights so large that every site changes the output, and inputs of batch 2."""
    torch.manual_seed(0)
    entry = ZOO[name]
    model = entry.build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=0.3)
            elif parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model, entry.inputs(2, 6)
