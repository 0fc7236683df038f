"""Whether something is of transformers' classes, asked without importing them: before they are, no object can be."""

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def is_hugging_face_model(model: object) -> TypeGuard["PreTrainedModel"]:
    """Whether `model` is of a class of transformers, or below one."""
    return _is_of("transformers.modeling_utils", "PreTrainedModel", model)


def is_hugging_face_config(config: object) -> TypeGuard["PretrainedConfig"]:
    """Whether `config` is the configuration of such a model."""
    return _is_of("transformers.configuration_utils", "PretrainedConfig", config)


def _is_of(module: str, name: str, value: object) -> bool:
    imported: Any = sys.modules.get(module)
    return imported is not None and isinstance(value, getattr(imported, name))


def first_setting(sources: Iterable[object], name: str) -> Any:
    """The setting of the first of these configurations that has one, None if none has; a tensor as a list or number."""
    found: Any = next((value for source in sources if (value := getattr(source, name, None)) is not None), None)
    return found.tolist() if hasattr(found, "tolist") else found


def decoder_config(model: object) -> Any:
    """The configuration of the part of a model that writes text."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config(decoder=True)
