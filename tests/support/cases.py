"""Rewritten models in each capture, built once and copied."""

import copy
from collections.abc import Callable

from torch import nn

import melora_fx
from melora_fx import MELoRAConfig
from support.models import TOWER_CONFIG, bert, fill, gpt2, randn, tokens, tower

BERT_TARGETS = ["query", "value", "dense"]


BERT_CONFIG = MELoRAConfig(rank=2, num_blocks=3, alpha=3.0)


GPT2_TARGETS = ["c_attn", "c_fc", "c_proj"]


GPT2_CONFIG = MELoRAConfig(rank=(2, 1, 2), num_blocks=3, alpha=3.0)


def _rewritten(build: Callable[[], nn.Module], captured: bool) -> nn.Module:
    if build is bert:
        inputs = tokens() if captured else None
        model = melora_fx.rewrite(build(), BERT_TARGETS, BERT_CONFIG, example_inputs=inputs)
    elif build is gpt2:
        inputs = {"input_ids": tokens()["input_ids"]} if captured else None
        model = melora_fx.rewrite(build(), GPT2_TARGETS, GPT2_CONFIG, example_inputs=inputs)
    else:
        inputs = (randn(2, 5, 24),) if captured else None
        model = melora_fx.rewrite(build(), "all-linear", TOWER_CONFIG, example_inputs=inputs)
    return fill(model)


_CASES = {
    f"{name}-{'whole' if captured else 'in_place'}": (build, captured)
    for name, build in {"tower": tower, "bert": bert, "gpt2": gpt2}.items()
    for captured in (False, True)
}


_made: dict[str, nn.Module] = {}


class Case:
    """A rewritten model with filled adapters, the plain model that it comes from, and inputs for both."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.build, self.captured = _CASES[name]
        if name not in _made:
            _made[name] = _rewritten(self.build, self.captured)
        self.model = copy.deepcopy(_made[name])
        self.plain = self.build()
        self.inputs = randn(3, 4, 24) if self.build is tower else tokens(3, 7)
        if self.build is gpt2 and self.captured:
            self.inputs = {"input_ids": self.inputs["input_ids"]}
