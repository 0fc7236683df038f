"""Loads the model of a Hugging Face folder."""

import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from .errors import MELoRAError
from .names import first_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAMED = 8


def load_model(
    folder: Path,
    *,
    with_weights: bool = True,
    class_name: str | None = None,
    num_labels: int | None = None,
    labels: Sequence[str] = (),
    pad_token_id: int | None = None,
    brought: Collection[str] = (),
    dtype: torch.dtype | None = None,
) -> "PreTrainedModel":
    """Returns the model of a folder, in evaluation mode. Never runs code from the folder.

    Args:
        folder: contains config.json and, if `with_weights`, the weights.
        with_weights: False builds the model on the meta device, without reading any weight.
        class_name: name of the transformers class; None uses the first of the configuration's `architectures`.
        num_labels: number of labels of a classification head; None keeps the configuration's.
        labels: names of the labels, in the order of their indices; if empty, the configuration's are kept.
        pad_token_id: the padding token; None keeps the configuration's.
        brought: names of tensors that an adapter provides: the folder may lack them, or have them in other shapes.
        dtype: dtype of the weights; None keeps the folder's.

    Raises:
        MELoRAError: if the folder has no readable configuration or weights; if transformers lacks the class, or the
            class does not fit the configuration; or if the model needs weights that the folder lacks and `brought`
            does not name.
    """
    config = load_config(folder)
    import transformers  # slow to import, so only here

    if num_labels is not None and num_labels != config.num_labels:
        config.num_labels = num_labels
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
    if pad_token_id is not None:
        config.get_text_config().pad_token_id = pad_token_id
    name = class_name or (config.architectures or [None])[0]
    model_class: Any = getattr(transformers, name or "", None)
    if model_class is None:
        raise MELoRAError(f"`{folder}`: transformers has no model class {name!r}")
    if not isinstance(config, model_class.config_class):
        raise MELoRAError(f"`{folder}` holds a {config.model_type} model, not the {name} that was requested")
    if not with_weights:
        try:
            with torch.device("meta"):
                return model_class(config).eval()
        except Exception as error:  # a model may raise anything for sizes that do not fit
            raise MELoRAError(
                f"no {name} can be built from `{folder}/config.json`: {type(error).__name__}: {error}"
            ) from error
    model, new = load_weights(model_class, folder, config, **({} if dtype is None else {"dtype": dtype}))
    refuse_missing(folder, type(model).__name__, new, brought=brought)
    return model


def load_config(folder: Path) -> Any:
    """Returns the configuration of a folder.

    Raises:
        MELoRAError: if it is missing or cannot be read, or if the model is custom code in the folder.
    """
    file = folder / "config.json"
    if not os.path.isfile(file):
        raise MELoRAError(f"`{folder}` is not a Hugging Face model folder: it has no config.json")
    from transformers import CONFIG_MAPPING, AutoConfig  # slow to import, so only here

    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if "auto_map" in content and content.get("model_type") not in CONFIG_MAPPING:
            raise MELoRAError(
                f"`{folder}`: its model is custom code (`auto_map` in config.json), which is not run: use a model that "
                "is part of transformers"
            )
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except MELoRAError:
        raise
    except Exception as error:  # transformers and its validation raise many kinds
        raise MELoRAError(f"`{file}` cannot be read: {error}") from error


def load_weights(model_class: Any, folder: Path, config: Any, **options: Any) -> tuple[Any, dict[str, str]]:
    """Returns the model in evaluation mode, and its new tensors by name: those that the folder lacks or has in another
    shape.

    New tensors have the random values of a fresh model. The value for a name is "" if the folder lacks the tensor, else
    a text with both shapes. Tensors that transformers does not count as missing, such as tied weights, are left out.

    Args:
        model_class: a class of transformers, or one of its auto classes.
        folder: contains the weights.
        config: the model's configuration.
        options: arguments for `from_pretrained`.

    Raises:
        MELoRAError: if the weights cannot be read.
    """
    try:
        model, info = model_class.from_pretrained(
            folder,
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            **options,
        )
    except (OSError, RuntimeError, EOFError, SafetensorError, UnpicklingError) as error:
        line = str(error).partition("\n")[0]
        raise MELoRAError(f"`{folder}`: the weights cannot be read: {line}") from error
    new = dict.fromkeys(info["missing_keys"], "")
    new |= {name: f"{tuple(stored)} there, {tuple(own)} in the model" for name, stored, own in info["mismatched_keys"]}
    return model.eval(), dict(sorted(new.items()))


def refuse_missing(folder: Path, class_name: str, lacking: Mapping[str, str], *, brought: Collection[str] = ()) -> None:
    """Raises MELoRAError if a folder lacks weights, or has them in another shape, and no adapter provides them.

    Args:
        folder: the folder.
        class_name: the model's class.
        lacking: the new tensors, as `load_weights` returns them.
        brought: names of tensors that an adapter provides.
    """
    lines = [f"`{name}`" + (f" ({size})" if size else "") for name, size in lacking.items() if name not in brought]
    if not lines:
        return
    raise MELoRAError(
        f"`{folder}` lacks weights of {class_name}, which would be random: {first_of(lines, _NAMED)}. Pass the "
        "folder that they were saved in, or an adapter that was trained with them: `melora-fx train` trains and saves "
        "all new weights; in code, `rewrite(…, keep_trainable=[…])` does"
    )
