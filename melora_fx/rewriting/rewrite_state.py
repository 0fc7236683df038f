"""What a rewritten model's root keeps for `fold` and `save_adapter` beside the sites."""

from dataclasses import dataclass

REWRITE_STATE_ATTRIBUTE = "melora_state"
"""Attribute of the module that `rewrite` was called with: its RewriteState."""


@dataclass
class RewriteState:
    """`requires_grad`: of every base parameter before `rewrite`. `kept`: names of the modules kept trainable. `sites`:
    names of what was adapted.
    """

    requires_grad: dict[str, bool]
    kept: tuple[str, ...]
    sites: tuple[str, ...] = ()
