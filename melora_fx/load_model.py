"""The model in a Hugging Face folder."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from .errors import MELoRAError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_model(
    folder: Path, *, with_weights: bool = True, class_name: str | None = None, num_labels: int | None = None
) -> "PreTrainedModel":
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
    import transformers  # heavy: only where it is used

    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except Exception as error:  # transformers and its validation raise many kinds
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
        try:
            with torch.device("meta"):
                return model_class(config).eval()
        except Exception as error:  # whatever a model does with sizes that do not fit
            raise MELoRAError(f"`{folder}/config.json` makes no {name}: {type(error).__name__}: {error}") from error
    try:
        return model_class.from_pretrained(folder, config=config).eval()
    except (OSError, SafetensorError) as error:
        raise MELoRAError(f"`{folder}`: the weights cannot be read: {error}") from error
