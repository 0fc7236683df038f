"""Recognises parameters that DeepSpeed's ZeRO manages by the attributes that it sets; DeepSpeed is not imported.

deepspeed 0.19 sets `ds_id` and `ds_status` on parameters that stage 3 partitions, and `_hp_mapping` on parameters that
stages 1 and 2 train.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn


def is_partitioned(model: nn.Module) -> bool:
    """Returns whether ZeRO-3 partitions parameters of `model`; it then gives them other memory in every forward."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def absent_parameters(model: nn.Module) -> list[str]:
    """Returns the names of parameters of `model` whose values ZeRO-3 has removed here: their shape is now (0,)."""
    return [name for name, parameter in model.named_parameters() if _is_absent(parameter)]


def have_copies_in_optimizer(trained: Iterable[nn.Parameter]) -> bool:
    """Returns whether ZeRO's optimizer holds a copy of any parameter in `trained`, and overwrites it in every step."""
    return any(hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping") for parameter in trained)


def _is_absent(parameter: Any) -> bool:
    return getattr(getattr(parameter, "ds_status", None), "name", None) == "NOT_AVAILABLE"
