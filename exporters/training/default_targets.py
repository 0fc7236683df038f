"""Which linears are adapted where the user names none: the query and value projections, by their usual names."""

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
"""The first row all of whose names a model has is taken; the last ones are packed projections, of the key too."""

_NAMED = 12


def default_targets(model: nn.Module) -> tuple[str, ...]:
    """The usual names that the model has.

    Raises:
        ValueError: where it has none of them; lists what it has.
    """
    names = linear_names(model)
    for usual in USUAL_TARGETS:
        if all(_is_there(target, names) for target in usual):
            return usual
    raise ValueError(f"`targets`: this model has no usual names of query and value projections; {describe(names)}")


def match_targets(model: nn.Module, targets: Sequence[str], config: MELoRAConfig) -> melora_fx.MatchReport:
    """As `match`; an error about a name says what the model's linears are called.

    Raises:
        ValueError: for a target that matches nothing, or a configuration that does not fit.
    """
    try:
        return melora_fx.match(model, list(targets), config)
    except ValueError as error:
        names = linear_names(model)
        if all(target == ALL_LINEAR or _is_there(target, names) for target in targets):
            raise
        raise ValueError(f"{error}\n{describe(names)}") from error


def linear_names(model: nn.Module) -> list[str]:
    """The linears that can be adapted, whatever the number of blocks."""
    report = melora_fx.match(model, ALL_LINEAR, MELoRAConfig(rank=1, num_blocks=1))
    return [site.name for site in (*report.sites, *report.untargeted)]


def describe(names: Collection[str]) -> str:
    """What the linears are called, and an example of an option that fits."""
    counts = Counter(name.rpartition(".")[2] for name in names)
    listed = ", ".join(f"{name} ({count})" for name, count in counts.most_common(_NAMED))
    usual = next((usual for usual in USUAL_TARGETS if all(_is_there(target, names) for target in usual)), None)
    example = ",".join(usual or [name for name, _ in counts.most_common(2)])
    return f"its linears are called {listed}, so for example `--targets {example}`"


def _is_there(target: str, names: Collection[str]) -> bool:
    return any(name_matches(target, name) for name in names)
