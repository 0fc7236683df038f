"""melora_fx: rewrites the linear nodes of a PyTorch model into frozen base + MELoRA subgraphs.

The names below stand in the order of a model's life.
"""

from .config import MELoRAConfig
from melora_fx.matching.match import match
from melora_fx.matching.report import LinearSite, MatchReport
from melora_fx.rewriting.rewrite import rewrite
from melora_fx.rewriting.sites import AdapterSite, adapter_parameters, sites
from melora_fx.saving.load import load_adapter
from melora_fx.saving.save import save_adapter
from melora_fx.saving.trainer import AdapterCheckpointCallback
from melora_fx.rewriting.sites import disabled
from melora_fx.folding.fold import check_fold, fold, folded
from melora_fx.folding.report import FoldReport, SiteFold
from melora_fx.folding.unload import unload
from melora_fx.folding.fold_checkpoint import fold_checkpoint
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
    "unload",
    "fold_checkpoint",
    "MELoRAError",
]
