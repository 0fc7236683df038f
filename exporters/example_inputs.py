"""Builds example inputs for tracing the models of Hugging Face folders."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "preprocessor_config.json",
)
"""Files that turn a user's data into a model's inputs; `preprocessor_config.json` is the one for images and sound."""


def example_inputs(model: PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
    """Returns inputs with two rows: images for a vision model, else sentences, or token ids if there is no tokenizer.

    An encoder-decoder model also gets `decoder_input_ids`, the first five tokens of each row, unless it is a sequence
    classifier, which computes its own.
    """
    if model.main_input_name == "pixel_values":
        config: Any = model.config
        size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        return {"pixel_values": torch.randn(2, config.num_channels, size, size)}
    inputs = _sentences(model, folder)
    is_classifier = type(model).__name__.endswith("ForSequenceClassification")
    if "decoder_input_ids" in inspect.signature(model.forward).parameters and not is_classifier:
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :5].contiguous()
    return inputs


def _sentences(model: PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        tokens = torch.arange(16).remainder(model.config.get_text_config().vocab_size).expand(2, -1).contiguous()
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    from transformers import AutoTokenizer  # slow to import, so only here

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    sentences = ["The quick brown fox jumps over the lazy dog.", "A second, shorter sentence."]
    return dict(tokenizer(sentences, padding=True, return_tensors="pt"))
