"""Recognises objects of transformers without importing it: until it is imported, no object can be of its classes."""

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def is_hugging_face_model(model: object) -> TypeGuard["PreTrainedModel"]:
    """Returns whether `model` is a transformers model, of one of its classes or a subclass."""
    return _is_of("transformers.modeling_utils", "PreTrainedModel", model)


def is_hugging_face_config(config: object) -> TypeGuard["PretrainedConfig"]:
    """Returns whether `config` is the configuration of a transformers model."""
    return _is_of("transformers.configuration_utils", "PretrainedConfig", config)


def _is_of(module: str, name: str, value: object) -> bool:
    imported: Any = sys.modules.get(module)
    return imported is not None and isinstance(value, getattr(imported, name))


def first_setting(sources: Iterable[object], name: str) -> Any:
    """Returns the first setting `name` among `sources` that is not None, else None; tensors as lists or numbers."""
    found: Any = next((value for source in sources if (value := getattr(source, name, None)) is not None), None)
    return found.tolist() if hasattr(found, "tolist") else found


def decoder_config(model: object) -> Any:
    """Returns the configuration of the part of a model that generates text."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config(decoder=True)
