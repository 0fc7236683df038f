"""Small models with adapters of every kind, with which other programs must compute the same."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import melora_fx
from melora_fx import MELoRAConfig
from melora_fx.saving.adapter_file import read_adapter
from support.gguf_models import gpt2, llama, mixtral
from support.models import bert_classifier, fill, output_of, tokens

BLOCKS = MELoRAConfig(rank=2, num_blocks=2, alpha=3.0)
UNEVEN = MELoRAConfig(rank=(1, 3), num_blocks=2, alpha=(2.0, 5.0))
STABLE = MELoRAConfig(rank=3, num_blocks=3, use_rslora=True)
PARTS = MELoRAConfig(rank=(1, 2, 1), num_blocks=3, split=3)


@dataclass(frozen=True)
class Case:
    """A model, its targets, and the parts that are kept trainable."""

    build: Callable[[], Any]
    targets: Any
    kept: tuple[str, ...] = ()

    def adapted(self) -> nn.Module:
        """Returns the model with an adapter that moves its logits by more than their own size."""
        return fill(melora_fx.rewrite(self.build(), self.targets, keep_trainable=self.kept)).eval()


CASES = {
    "BERT": Case(bert_classifier, {"query": BLOCKS, "value": UNEVEN, "re:.*layer.*dense": STABLE}),
    "BERT, a head": Case(bert_classifier, {"query": BLOCKS, "value": UNEVEN}, ("classifier",)),
    "GPT-2, split": Case(gpt2, {"c_attn": PARTS, "c_fc": BLOCKS, "mlp.c_proj": UNEVEN}),
    "Llama": Case(
        llama,
        {"q_proj": BLOCKS, "k_proj": UNEVEN, "v_proj": UNEVEN, "o_proj": STABLE, "re:.*(up|down|gate)_proj": BLOCKS},
    ),
    "Mixtral": Case(mixtral, {"q_proj": UNEVEN, "re:.*experts.*": BLOCKS}),
}


@torch.no_grad()
def logits_of(model: nn.Module) -> torch.Tensor:
    """Returns a model's output for the same tokens, (2, 5)."""
    return output_of(model, tokens())


def worst_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the largest difference relative to the largest logit."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def merged(peft_model: Any) -> nn.Module:
    """Returns a copy of a PEFT model with the adapter merged into its weights."""
    return copy.deepcopy(peft_model).merge_and_unload()


def assert_same_blocks(one: Path, other: Path) -> None:
    """Checks that two adapter folders have the same sites, bits of every A_i and s_i B_i, and trained modules."""
    first, second = read_adapter(one), read_adapter(other)
    assert first.configs.keys() == second.configs.keys()
    for site, config in first.configs.items():
        ours, theirs = first.tensors_of(site), second.tensors_of(site)
        assert (config.num_blocks, config.ranks, ours.part_sizes) == (
            theirs.config.num_blocks,
            theirs.config.ranks,
            theirs.part_sizes,
        )
        assert torch.equal(ours.lora_a, theirs.lora_a)
        assert torch.equal(ours.scaled_b(), theirs.scaled_b())
    assert first.kept == second.kept
    heads = first.kept_tensors()
    assert heads.keys() == second.kept_tensors().keys()
    assert all(torch.equal(tensor, heads[name]) for name, tensor in second.kept_tensors().items())
