"""What does a training step with adapters in a mixture's experts cost, relative to the frozen model's step?

A random Mixtral of two layers with adapters in both stacks of experts; eager, float32, one thread. Ours have 8 blocks
of rank 8. PEFT's LoRA of the parameters (`target_parameters`) has equal rank or equal parameters. The floor is a step
of the frozen model with an input that requires a gradient. The whole capture of the frozen model, which ours is built
on, is timed too. All sides of a case are timed in turn, step by step, with fused AdamW. Columns as in train_step.
Writes experts.csv and experts.md.
"""

import functools
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers import MixtralConfig, MixtralModel

import melora_fx
from exporters.measuring.tables import markdown_table
from exporters.measuring.timing import time_in_turn
from melora_fx import MELoRAConfig
from melora_fx.whole_capture.whole_model import capture_whole

from .common.cases import Case, Row, run_cases, timed_rows
from .common.models import fill
from .common.origin import written_by
from .training.step_cost import make_step, peak_memory_mib, saved_mib

TARGETS = ["gate_up_proj", "down_proj"]
CONFIG = MELoRAConfig(rank=8, num_blocks=8, alpha=16.0)
_INTRODUCTION = """\
Random Mixtrals of two layers with adapters in both stacks of experts; eager, float32, one thread. Ours has 8 blocks of
rank 8. PEFT's LoRA of the parameters has rank 64, or rank 8 and as many parameters as ours. *frozen*: the unchanged
model. *frozen, captured whole*: its whole capture, which ours is built on. In the grouped form transformers' operator
computes the gradient of the frozen stacks there; ours leaves it out. Measured with `python -m benchmarks experts`."""


@dataclass(frozen=True)
class Mixture:
    """A model, and the form in which its experts are computed."""

    form: str
    tokens: int
    hidden: int = 256
    intermediate: int = 512
    experts: int = 8

    @property
    def name(self) -> str:
        return f"{self.form}, {self.tokens} tokens, {self.experts} experts of {self.hidden} × {self.intermediate}"


MIXTURES = (
    Mixture("grouped_mm", 512),
    Mixture("grouped_mm", 512, hidden=512, intermediate=1024),
    Mixture("grouped_mm", 512, intermediate=128, experts=32),
    Mixture("batched_mm", 64),
)
QUICK = (Mixture("grouped_mm", 16, hidden=32, intermediate=64, experts=4),)


def run(options: Namespace) -> int:
    torch.set_num_threads(1)
    cases = [
        Case(mixture.name, functools.partial(measure, mixture, options.rounds))
        for mixture in (QUICK if options.quick else MIXTURES)
    ]
    return run_cases(options, cases, settings=f"rounds {options.rounds}", write_report=write_report)


def base_model(mixture: Mixture) -> Any:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=128,
        hidden_size=mixture.hidden,
        intermediate_size=mixture.intermediate,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=mixture.experts,
        num_experts_per_tok=2,
    )
    model = MixtralModel(config)
    model.config.use_cache = False
    model.set_experts_implementation(mixture.form)
    return model.train().requires_grad_(False)


def captured(mixture: Mixture, embeddings: torch.Tensor) -> nn.Module:
    return capture_whole(base_model(mixture), {"inputs_embeds": embeddings.detach()})


def ours(mixture: Mixture, embeddings: torch.Tensor) -> nn.Module:
    example_inputs = {"inputs_embeds": embeddings.detach()}
    return melora_fx.rewrite(base_model(mixture), TARGETS, CONFIG, example_inputs=example_inputs)


def peft_lora(mixture: Mixture, rank: int) -> nn.Module:
    parameters = [f"mlp.experts.{name}" for name in TARGETS]
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[], target_parameters=parameters)
    return peft.get_peft_model(base_model(mixture), config).train()


SIDES: dict[str, Callable[[Mixture, torch.Tensor], nn.Module]] = {
    "frozen": lambda mixture, _: base_model(mixture),
    "frozen, captured whole": captured,
    "ours": ours,
    "PEFT LoRA, equal rank": lambda mixture, _: peft_lora(mixture, CONFIG.total_rank),
    "PEFT LoRA, equal parameters": lambda mixture, _: peft_lora(mixture, CONFIG.total_rank // CONFIG.num_blocks),
}


def measure(mixture: Mixture, rounds: int) -> list[Row]:
    torch.manual_seed(0)
    embeddings = torch.randn(4, mixture.tokens // 4, mixture.hidden).mul_(0.5).requires_grad_()
    models = {name: fill(make(mixture, embeddings)) for name, make in SIDES.items()}
    steps = {name: make_step(model, embeddings) for name, model in models.items()}
    seconds = time_in_turn({name: step for name, (step, _) in steps.items()}, rounds=rounds, warmup=2)
    facts = {
        name: {
            "saved_mib": saved_mib(models[name], embeddings),
            "peak_memory_mib": peak_memory_mib(step, "cpu"),
            "parameters": num_parameters,
        }
        for name, (step, num_parameters) in steps.items()
    }
    return timed_rows(seconds, "frozen", facts)


def write_report(rows: Sequence[Mapping[str, str]], folder: Path) -> None:
    """Writes experts.md: a table for each case."""
    headings = ("side", "ms", "p20 to p80", "over frozen", "kept for the backward, MiB", "peak, MiB", "parameters")
    lines = ["# A step that trains experts", "", _INTRODUCTION]
    for name in dict.fromkeys(row["case"] for row in rows):
        table = [
            (
                row["side"],
                f"{float(row['median_ms']):.2f}",
                f"{float(row['p20_ms']):.2f} to {float(row['p80_ms']):.2f}",
                f"{float(row['ratio']):.3f}",
                f"{float(row['saved_mib']):.1f}",
                row["peak_memory_mib"],
                f"{int(row['parameters']):,}",
            )
            for row in rows
            if row["case"] == name
        ]
        lines += ["", f"## {name}", "", *markdown_table(headings, table)]
    lines += ["", f"{written_by('experts', rows)}."]
    (folder / "experts.md").write_text("\n".join(lines) + "\n")
