"""Loads the model to train, a pretrained transformer with a classification head, and names its new parts."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from melora_fx import MELoRAError
from melora_fx.load_model import load_config, load_weights, refuse_missing

from .tokenizer import load_tokenizer, set_padding


@dataclass(frozen=True)
class Base:
    """A model with its tokenizer; in float32, unless its weights are quantised.

    Attributes:
        folder: the folder that they were loaded from.
        new: names of the modules and parameters that the folder lacks, such as a head. Their values are random, so they
            must be trained and saved with the adapter.
        heads: names of the modules next to the base model that the folder contains; they are trained further.
    """

    folder: Path
    model: Any
    tokenizer: Any
    new: tuple[str, ...]
    heads: tuple[str, ...] = ()

    @property
    def keep_trainable(self) -> list[str]:
        """Patterns for `rewrite` that match the names in `new` and `heads`, but no longer names that end in them."""
        return [f"re:{re.escape(name)}" for name in (*self.new, *self.heads)]


def load_base(folder: Path, labels: Sequence[str]) -> Base:
    """Loads the model in a Hugging Face folder as a classifier of these labels.

    New weights are drawn from torch's generator.

    Raises:
        MELoRAError: if the folder has no model that can classify texts, no tokenizer, or not the model's weights.
    """
    config = load_config(folder)
    tokenizer = load_tokenizer(folder)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    config.get_text_config().use_cache = False  # no classifier needs the keys and values of earlier tokens
    set_padding(tokenizer, config, folder)
    is_quantized = getattr(config, "quantization_config", None) is not None
    options = {} if is_quantized else {"dtype": torch.float32}
    try:
        model, lacking = load_weights(AutoModelForSequenceClassification, folder, config, **options)
    except ValueError as error:  # no such head for this class, or a quantisation without its library
        reason = str(error).splitlines()[0]
        raise MELoRAError(
            f"`{folder}`: its {config.model_type} model cannot be loaded as a classifier: {reason}"
        ) from error
    embeddings = next((name for name, module in model.named_modules() if module is model.get_input_embeddings()), None)
    if f"{embeddings}.weight" in lacking:  # the folder has no pretrained weights
        refuse_missing(folder, type(model).__name__, lacking)
    new = name_new(model, lacking)
    return Base(folder, model, tokenizer, new, tuple(name for name in _beside_base(model) if name not in new))


def label_order(folder: Path, labels: Sequence[str]) -> tuple[str, ...]:
    """Returns the labels in the order of the head in a model folder if it has just these, else in the given order."""
    own = load_config(folder).id2label
    in_order = tuple(str(own[index]) for index in sorted(own))
    return in_order if sorted(in_order) == sorted(labels) else tuple(labels)


def _beside_base(model: Any) -> list[str]:
    """Returns the names of the modules with parameters that a classifier adds to its base model: its head."""
    base = getattr(model, model.base_model_prefix, None)
    if base is None:
        return []
    others = {name: child for name, child in model.named_children() if child is not base}
    return [name for name, child in others.items() if any(True for _ in child.parameters())]


def name_new(model: nn.Module, lacking: Collection[str]) -> tuple[str, ...]:
    """Returns the outermost modules whose tensors are all `lacking`, and the names of the other lacking parameters.

    Any other lacking buffer is named by its module.
    """
    own = list(model.state_dict())
    parameters = dict(model.named_parameters())
    names: dict[str, None] = {}
    for name in lacking:
        parents = name.split(".")[:-1]
        whole = [".".join(parents[:end]) for end in range(1, len(parents) + 1)]
        fitting = (path for path in whole if all(key in lacking for key in own if key.startswith(f"{path}.")))
        names[next(fitting, name if name in parameters else whole[-1])] = None
    return tuple(names)
