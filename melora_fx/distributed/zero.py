"""Parameters that DeepSpeed's ZeRO manages, told by the attributes that it puts on them; DeepSpeed is not imported.

deepspeed 0.19: `ds_id` and `ds_status` on those that stage 3 partitions, `_hp_mapping` on those that stages 1 and 2
train.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn


def is_partitioned(model: nn.Module) -> bool:
    """Whether ZeRO-3 partitions parameters of `model`: it puts other memory into them in every forward."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def absent_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters of `model` that ZeRO-3 has left no values of here: their shape is (0,) now."""
    return [name for name, parameter in model.named_parameters() if _is_absent(parameter)]


def have_copies_in_optimizer(trained: Iterable[nn.Parameter]) -> bool:
    """Whether ZeRO's optimizer holds copies of any of these, which it writes over them in every step."""
    return any(hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping") for parameter in trained)


def _is_absent(parameter: Any) -> bool:
    return getattr(getattr(parameter, "ds_status", None), "name", None) == "NOT_AVAILABLE"
