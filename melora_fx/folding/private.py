"""Undocumented functions of transformers that folds need: how a checkpoint becomes a model.

An upgrade that removes one breaks this file and `tests/test_private.py`, which calls all of them.
"""

import re
from collections.abc import Iterable
from typing import Any


def checkpoint_names(model: Any, keys: Iterable[str]) -> list[tuple[str, str, tuple[str, ...]]]:
    """Returns what `from_pretrained` would do with each key of a checkpoint: (key, parameter, converted parameters).

    The third is empty if the key's tensor becomes the parameter unchanged. Otherwise it lists all parameters that the
    tensor is converted into, together with the tensors of other keys. transformers has no function that says this
    without loading. transformers 5.23.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping  # slow to import, so only here
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    own = model.state_dict()
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found = []
    for key in sorted(keys, key=dot_natural_key):  # some rules depend on the order
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, own)
        if name not in own and key in own:  # the rule is for older checkpoints with other keys
            name = key
            pattern = None
        converted: tuple[str, ...] = ()
        if pattern is not None:
            first, *others = by_pattern[pattern].target_patterns
            converted = (name, *(name.replace(first, other) for other in others))
        found.append((key, name, converted))
    return found


def is_needed(model: Any, name: str) -> bool:
    """Returns whether `from_pretrained` reports a tensor that a checkpoint lacks as missing. transformers 5.23."""
    patterns = model._keys_to_ignore_on_load_missing or ()
    return not any(re.search(pattern, name) for pattern in patterns)


def tied_weights(model: Any) -> dict[str, str]:
    """Maps each parameter that a model ties to the one that it is tied to; needs no weights. transformers 5.23."""
    return getattr(model, "all_tied_weights_keys", {})
