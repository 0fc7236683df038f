"""melora_fx: rewrites the linear nodes of a PyTorch model into frozen base + MELoRA subgraphs.

The names below are in the order of a model's life. Each is imported on first use: importing `MELoRAError` needs no
torch, and only the import of `AdapterCheckpointCallback` needs transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import MELoRAConfig
    from melora_fx.matching.match import match
    from melora_fx.matching.report import LinearSite, MatchReport
    from melora_fx.rewriting.rewrite import rewrite
    from melora_fx.rewriting.sites import AdapterSite, adapter_parameters, sites
    from melora_fx.saving.save import save_adapter
    from melora_fx.saving.load import load_adapter
    from melora_fx.saving.trainer import AdapterCheckpointCallback
    from melora_fx.rewriting.sites import disabled
    from melora_fx.folding.fold import check_fold, fold, folded
    from melora_fx.folding.report import FoldReport, SiteFold
    from melora_fx.folding.unload import unload
    from melora_fx.folding.fold_checkpoint import fold_checkpoint
    from .errors import MELoRAError

_MODULES = {
    "config": ("MELoRAConfig",),
    "matching.match": ("match",),
    "matching.report": ("LinearSite", "MatchReport"),
    "rewriting.rewrite": ("rewrite",),
    "rewriting.sites": ("AdapterSite", "adapter_parameters", "disabled", "sites"),
    "saving.save": ("save_adapter",),
    "saving.load": ("load_adapter",),
    "saving.trainer": ("AdapterCheckpointCallback",),
    "folding.fold": ("check_fold", "fold", "folded"),
    "folding.report": ("FoldReport", "SiteFold"),
    "folding.unload": ("unload",),
    "folding.fold_checkpoint": ("fold_checkpoint",),
    "errors": ("MELoRAError",),
}
"""Maps each module to its public names. No module or folder next to this file may have one of these names: importing
it would hide the public name."""

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


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            globals()[name] = getattr(import_module(f"{__name__}.{module}"), name)
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
