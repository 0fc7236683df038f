"""melora_fx: rewrites the linear nodes of a PyTorch model into frozen base + MELoRA subgraphs.

The names below stand in the order of a model's life.
"""

from .config import MELoRAConfig
from .match import match
from .match_report import LinearSite, MatchReport
from .rewrite import rewrite
from .adapter import AdapterSite, adapter_parameters, sites
from .state import load_adapter, save_adapter
from .trainer import AdapterCheckpointCallback
from .adapter import disabled
from .fold import check_fold, fold, folded
from .fold_report import FoldReport, SiteFold
from .fold_checkpoint import fold_checkpoint
from .errors import MELoRAError

__all__ = [
    "MELoRAConfig",
    "match",
    "MatchReport",
    "LinearSite",
    "rewrite",
    "sites",
    "AdapterSite",
    "adapter_parameters",
    "save_adapter",
    "load_adapter",
    "AdapterCheckpointCallback",
    "disabled",
    "folded",
    "check_fold",
    "FoldReport",
    "SiteFold",
    "fold",
    "fold_checkpoint",
    "MELoRAError",
]
