"""melora_fx: rewrites the linear nodes of a PyTorch model into frozen base + MELoRA subgraphs.

The names below stand in the order of a model's life.
"""

from .config import MELoRAConfig
from .match import LinearSite, MatchReport, match
from .rewrite import rewrite

from .adapter import AdapterSite, adapter_parameters, sites  # isort: skip
from .state import load_adapter, save_adapter

from .adapter import disabled  # isort: skip
from .fold import fold, folded

from .errors import MELoRAError  # isort: skip

__all__ = [
    "AdapterSite",
    "LinearSite",
    "MELoRAConfig",
    "MELoRAError",
    "MatchReport",
    "adapter_parameters",
    "disabled",
    "fold",
    "folded",
    "load_adapter",
    "match",
    "rewrite",
    "save_adapter",
    "sites",
]
