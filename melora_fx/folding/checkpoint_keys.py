"""Maps the names of a model's parameters to the keys of a checkpoint, by transformers' own rules."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from melora_fx.load_model import load_model

from .checkpoint import Checkpoint
from .private import checkpoint_names, is_needed, tied_weights


@dataclass(frozen=True)
class KeyMap:
    """The keys of a model's parameters in a checkpoint.

    Attributes:
        keys: parameter → key.
        converted: parameters that are stored in another form, several under one key or one under several keys.
        tied: parameters that share their memory with others in the model: name → the others.
        tensors: the model's own tensors by name, on the meta device; None if transformers does not know the class.
        lacking: tensors that the model needs, but the checkpoint lacks or has in another size: name → "", or a text
            with both sizes.
    """

    keys: dict[str, str]
    converted: frozenset[str]
    tied: dict[str, tuple[str, ...]]
    tensors: Mapping[str, torch.Tensor] | None = None
    lacking: dict[str, str] = field(default_factory=dict)


def map_keys(checkpoint: Checkpoint, class_name: str | None, num_labels: int | None) -> KeyMap:
    """Returns the keys of a model class's parameters in a checkpoint, by transformers' own rules.

    The class is built on the meta device, without weights. If transformers does not know it, or the checkpoint has no
    configuration, the names are the keys.

    Raises:
        MELoRAError: if the class is not for the checkpoint's model.
    """
    import transformers  # slow to import, so only here

    if checkpoint.config is None or not hasattr(transformers, class_name or ""):
        return names_as_keys(checkpoint)
    model = load_model(checkpoint.directory, with_weights=False, class_name=class_name, num_labels=num_labels)
    keys: dict[str, str] = {}
    converted: set[str] = set()
    for key, name, targets in checkpoint_names(model, checkpoint.tensors):
        if targets:
            converted.update(targets)
        else:
            keys[name] = key
    groups: dict[str, set[str]] = {}
    for name, source in tied_weights(model).items():
        groups.setdefault(source, {source}).add(name)
    tied = {name: tuple(sorted(group - {name})) for group in groups.values() for name in group}
    tensors = model.state_dict()
    found = KeyMap(keys, frozenset(converted), tied, tensors)
    return replace(found, lacking=_lacking(checkpoint, model, tensors, found))


def names_as_keys(checkpoint: Checkpoint) -> KeyMap:
    """Returns the map of a checkpoint whose keys are the names of the parameters."""
    return KeyMap({key: key for key in checkpoint.tensors}, frozenset(), {})


def _lacking(checkpoint: Checkpoint, model: Any, tensors: Mapping[str, torch.Tensor], found: KeyMap) -> dict[str, str]:
    """Returns what `from_pretrained` would report. A tied parameter is not missing if one of its group is stored."""
    lacking: dict[str, str] = {}
    there = {*found.keys, *found.converted}
    for name, tensor in tensors.items():
        if name in found.keys:
            shape = checkpoint.tensors[found.keys[name]].shape
            if shape != tuple(tensor.shape):
                lacking[name] = f"{shape} there, {tuple(tensor.shape)} in the model"
        elif there.isdisjoint((name, *found.tied.get(name, ()))) and is_needed(model, name):
            lacking[name] = ""
    return dict(sorted(lacking.items()))
