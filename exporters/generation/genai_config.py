"""Writes `genai_config.json`, which onnxruntime-genai needs to generate with a graph."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporters.graph.export import Export
from exporters.hugging_face import decoder_config, first_setting
from exporters.onnx_files.cache_names import (
    LOGITS,
    MASK,
    PAST_PATTERN,
    POSITIONS,
    PRESENT_PATTERN,
    TOKENS,
    is_past,
)
from exporters.onnx_files.companions import GENAI_CONFIG

TYPES = (
    "chatglm", "ernie4_5", "gemma", "gemma2", "gemma3_text", "gptoss", "granite", "hunyuandensev1", "internlm2",
    "llama", "mistral", "nemotron", "olmo", "phi", "phi3", "phi3small", "phimoe", "qwen2", "qwen3", "smollm3",
)  # fmt: skip
"""Types of decoders that onnxruntime-genai 0.18 runs with the inputs and outputs named in its configuration."""

_ANY_DECODER = "decoder"
"""onnxruntime-genai's type for all others, GPT-2 too: its type `gpt2` has keys and values in one tensor."""

_OTHER_NAMES = {"gpt_oss": "gptoss", "hunyuan_v1_dense": "hunyuandensev1"}
"""A model's type in transformers → in onnxruntime-genai, if they differ."""


def write_genai_config(export: Export, folder: Path) -> tuple[str, ...]:
    """Writes `genai_config.json` for a decoder's graph into `folder`; if it cannot, returns a note for the user."""
    config: Any = export.model.config
    if not export.has_own_mask:
        return (
            f"no {GENAI_CONFIG}: onnxruntime-genai cannot run an encoder and decoder of type {config.model_type!r} as "
            "these two graphs; use `exporters.generate`",
        )
    kind = _OTHER_NAMES.get(config.model_type, config.model_type)
    described = genai_config(export, kind if kind in TYPES else _ANY_DECODER)
    (folder / GENAI_CONFIG).write_text(json.dumps(described, indent=4) + "\n")
    return ()


def genai_config(export: Export, kind: str) -> dict[str, Any]:
    """Returns the configuration in the form that onnxruntime-genai's own builder writes.

    The past and the present share a buffer if ONNX Runtime's attention extends the cache itself.
    """
    text = decoder_config(export.model)
    past = [value for name, value in export.inputs.items() if is_past(name)]
    _, kv_heads, _, head_size = past[0].shape
    context = int(getattr(text, "max_position_embeddings", None) or 2048)
    settings = _token_ids(export.model)
    provider = export.options.target.provider
    return {
        "model": {
            **settings,
            "context_length": context,
            "decoder": {
                "session_options": {
                    "log_id": "onnxruntime-genai",
                    "provider_options": [{provider: {}}] if provider != "cpu" else [],
                },
                "filename": export.options.path.name,
                "head_size": head_size,
                "hidden_size": text.hidden_size,
                "inputs": _input_names(export.inputs),
                "outputs": {
                    "logits": LOGITS,
                    "present_key_names": PRESENT_PATTERN.replace("%s", "key"),
                    "present_value_names": PRESENT_PATTERN.replace("%s", "value"),
                },
                "num_attention_heads": text.num_attention_heads,
                "num_hidden_layers": len(past) // 2,
                "num_key_value_heads": kv_heads,
            },
            "type": kind,
            "vocab_size": text.vocab_size,
        },
        "search": {
            "do_sample": False,
            "max_length": context,
            "num_beams": 1,
            "past_present_share_buffer": export.has_one_token_steps,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 50,
            "top_p": 1.0,
        },
    }


def _input_names(inputs: Mapping[str, Any]) -> dict[str, str]:
    positions = {"position_ids": POSITIONS} if POSITIONS in inputs else {}
    return {
        "input_ids": TOKENS,
        "attention_mask": MASK,
        **positions,
        "past_key_names": PAST_PATTERN.replace("%s", "key"),
        "past_value_names": PAST_PATTERN.replace("%s", "value"),
    }


def _token_ids(model: Any) -> dict[str, Any]:
    """Returns the tokens that begin, end and pad texts: from the generation configuration, else the model's.

    onnxruntime-genai looks up padding like any token, so its id must be in the vocabulary: the model's padding token,
    else an end token, else 0.
    """
    text = decoder_config(model)
    sources = [getattr(model, "generation_config", None), text]
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    found = {name: first_setting(sources, name) for name in names}
    ends = [] if found["eos_token_id"] is None else found["eos_token_id"]
    pads = (found["pad_token_id"], *(ends if isinstance(ends, list) else [ends]), 0)
    pad = next(token for token in pads if token is not None and 0 <= token < text.vocab_size)
    return {"bos_token_id": found["bos_token_id"] or 0, "eos_token_id": ends, "pad_token_id": pad}
