"""Hugging Face model folders for the command line: the model, and inputs to trace it with."""

import inspect
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from melora_fx import MELoRAError

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "preprocessor_config.json",
)  # fmt: skip


def load_model(
    folder: Path, *, with_weights: bool = True, class_name: str | None = None, num_labels: int | None = None
) -> PreTrainedModel:
    """The model in a folder, in evaluation mode.

    Args:
        folder: has config.json and, for `with_weights`, the weights.
        with_weights: False builds the model on the meta device, without reading any weight.
        class_name: transformers' class to use; None takes the first of the configuration's `architectures`.
        num_labels: number of labels of a classification head; None leaves the configuration's.

    Raises:
        MELoRAError: for a folder without a configuration, weights or a known class.
    """
    if not (folder / "config.json").is_file():
        raise MELoRAError(f"`{folder}` is not a Hugging Face model folder: it has no config.json")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise MELoRAError(f"`{folder}/config.json` cannot be read: {error}") from error
    if num_labels is not None:
        config.num_labels = num_labels
    name = class_name or (config.architectures or [None])[0]
    model_class: Any = getattr(transformers, name or "", None)
    if model_class is None:
        raise MELoRAError(f"`{folder}`: transformers has no model class {name!r}")
    if not isinstance(config, model_class.config_class):
        raise MELoRAError(f"`{folder}` holds a {config.model_type} model, not the {name} that was asked for")
    if not with_weights:
        with torch.device("meta"):
            return model_class(config).eval()
    try:
        return model_class.from_pretrained(folder, config=config).eval()
    except (OSError, SafetensorError) as error:
        raise MELoRAError(f"`{folder}`: the weights cannot be read: {error}") from error


def example_inputs(model: PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
    """Inputs of two rows: sentences, or mere token ids where the folder has no tokenizer; images for a vision model.

    A decoder beside an encoder gets the first tokens of its own.
    """
    if model.main_input_name == "pixel_values":
        config: Any = model.config
        size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        return {"pixel_values": torch.randn(2, config.num_channels, size, size)}
    inputs = _sentences(model, folder)
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :5].contiguous()
    return inputs


def _sentences(model: PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        tokens = torch.arange(16).remainder(model.config.get_text_config().vocab_size).expand(2, -1).contiguous()
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    sentences = ["The quick brown fox jumps over the lazy dog.", "A second, shorter sentence."]
    return dict(tokenizer(sentences, padding=True, return_tensors="pt"))
