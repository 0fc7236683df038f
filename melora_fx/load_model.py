"""The model in a Hugging Face folder."""

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
    """The model in a folder, in evaluation mode. Code that lies in the folder is never run.

    Args:
        folder: has config.json and, for `with_weights`, the weights.
        with_weights: False builds the model on the meta device, without reading any weight.
        class_name: transformers' class to use; None takes the first of the configuration's `architectures`.
        num_labels: number of labels of a classification head; None leaves the configuration's.
        labels: their names, in the order of their indices; none leaves the configuration's.
        pad_token_id: the padding token; None leaves the configuration's.
        brought: names of tensors that an adapter brings: the folder may lack them, or have them in other sizes.
        dtype: of the weights; None leaves the folder's.

    Raises:
        MELoRAError: for a folder without a configuration, weights or a known class, and for weights that the model
            needs and that neither the folder has nor `brought` names.
    """
    config = load_config(folder)
    import transformers  # heavy: only where it is used

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
        raise MELoRAError(f"`{folder}` holds a {config.model_type} model, not the {name} that was asked for")
    if not with_weights:
        try:
            with torch.device("meta"):
                return model_class(config).eval()
        except Exception as error:  # whatever a model does with sizes that do not fit
            raise MELoRAError(f"`{folder}/config.json` makes no {name}: {type(error).__name__}: {error}") from error
    model, new = load_weights(model_class, folder, config, **({} if dtype is None else {"dtype": dtype}))
    refuse_missing(folder, type(model).__name__, new, brought=brought)
    return model


def load_config(folder: Path) -> Any:
    """The configuration in a folder.

    Raises:
        MELoRAError: where there is none, it cannot be read, or its model is code that lies in the folder.
    """
    file = folder / "config.json"
    if not os.path.isfile(file):
        raise MELoRAError(f"`{folder}` is not a Hugging Face model folder: it has no config.json")
    from transformers import CONFIG_MAPPING, AutoConfig  # heavy: only where they are used

    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if "auto_map" in content and content.get("model_type") not in CONFIG_MAPPING:
            raise MELoRAError(
                f"`{folder}`: its model is code of its own (`auto_map` in config.json), which is not run: only models "
                "of transformers can be used"
            )
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except MELoRAError:
        raise
    except Exception as error:  # transformers and its validation raise many kinds
        raise MELoRAError(f"`{file}` cannot be read: {error}") from error


def load_weights(model_class: Any, folder: Path, config: Any, **options: Any) -> tuple[Any, dict[str, str]]:
    """(model in evaluation mode, what is new in it): its tensors that the folder lacks, or has in another size.

    These hold the random values of a fresh model; those in another size are mapped to a text that says which. What
    transformers counts as there, such as a tied weight, is not among them.

    Args:
        model_class: a class of transformers, or one of its auto classes.
        folder: has the weights.
        config: the model's.
        options: of `from_pretrained`.

    Raises:
        MELoRAError: where the weights cannot be read.
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
    """Raises MELoRAError for weights that a folder has not, or in another size, unless an adapter brings them.

    Args:
        folder: the folder.
        class_name: the model's class.
        lacking: as `load_weights` gives it.
        brought: names of tensors that an adapter brings.
    """
    lines = [f"`{name}`" + (f" ({size})" if size else "") for name, size in lacking.items() if name not in brought]
    if not lines:
        return
    raise MELoRAError(
        f"`{folder}` lacks weights of {class_name}, which would be random: {first_of(lines, _NAMED)}. Give the "
        "folder that they were saved in, or an adapter that was trained with them: `melora-fx train` trains and saves "
        "all that is new, in code `rewrite(…, keep_trainable=[…])` does"
    )
