"""Chooses the default targets: the query and value projections, by their usual names."""

from collections import Counter
from collections.abc import Collection, Sequence

from torch import nn

import melora_fx
from melora_fx import MELoRAConfig
from melora_fx.matching.targets import ALL_LINEAR, name_matches

USUAL_TARGETS: tuple[tuple[str, ...], ...] = (
    ("query", "value"),  # BERT, RoBERTa, ALBERT, ELECTRA
    ("q_proj", "v_proj"),  # Llama, Mistral, Qwen, Gemma, OPT, BART
    ("q_lin", "v_lin"),  # DistilBERT, XLM
    ("attn.q", "attn.v"),  # MPNet
    ("query_proj", "value_proj"),  # DeBERTa-v2
    ("q", "v"),  # T5
    ("c_attn",),  # GPT-2
    ("query_key_value",),  # GPT-NeoX, BLOOM, Falcon
    ("Wqkv",),  # ModernBERT, MPT
    ("qkv_proj",),  # Phi-3
    ("in_proj",),  # DeBERTa
)
"""The first row whose names all occur in the model is used. The last rows are packed projections, key included."""

_NAMED = 12


def default_targets(model: nn.Module) -> tuple[str, ...]:
    """Returns the first row of `USUAL_TARGETS` whose names all occur in the model.

    Raises:
        ValueError: if there is no such row; lists the names of the model's linears.
    """
    names = linear_names(model)
    for usual in USUAL_TARGETS:
        if all(_is_there(target, names) for target in usual):
            return usual
    raise ValueError(f"`targets`: the query and value projections of this model have no usual names; {describe(names)}")


def match_targets(model: nn.Module, targets: Sequence[str], config: MELoRAConfig) -> melora_fx.MatchReport:
    """Calls `match`, and adds the names of the model's linears to an error about a name.

    Raises:
        ValueError: if a target matches nothing, or the configuration does not fit.
    """
    try:
        return melora_fx.match(model, list(targets), config)
    except ValueError as error:
        names = linear_names(model)
        if all(target == ALL_LINEAR or _is_there(target, names) for target in targets):
            raise
        raise ValueError(f"{error}\n{describe(names)}") from error


def linear_names(model: nn.Module) -> list[str]:
    """Returns the names of the linears that can be adapted, regardless of the number of blocks."""
    report = melora_fx.match(model, ALL_LINEAR, MELoRAConfig(rank=1, num_blocks=1))
    return [site.name for site in (*report.sites, *report.untargeted)]


def describe(names: Collection[str]) -> str:
    """Returns a sentence with the names of the linears and an example of a fitting `--targets`."""
    counts = Counter(name.rpartition(".")[2] for name in names)
    listed = ", ".join(f"{name} ({count})" for name, count in counts.most_common(_NAMED))
    usual = next((usual for usual in USUAL_TARGETS if all(_is_there(target, names) for target in usual)), None)
    example = ",".join(usual or [name for name, _ in counts.most_common(2)])
    return f"its linears are called {listed}; pass for example `--targets {example}`"


def _is_there(target: str, names: Collection[str]) -> bool:
    return any(name_matches(target, name) for name in names)
