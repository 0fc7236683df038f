"""What does a training step cost whose adapters are those of a mixture's experts, over that of the frozen model?

    pip install -e ".[demo,test]"
    python benchmarks/experts.py [--rounds 15] [--only TEXT]

A random Mixtral of two layers, adapters in both stacks of experts, eager, float32, one thread; ours of 8 blocks of rank
8, and PEFT's LoRA of the parameters (`target_parameters`) of equal rank and of equal parameters. The floor is the step
of the frozen model whose input wants its gradient; beside it stands its whole capture, which ours is made of. All sides
of a cell are timed in turn, step by step; the optimizer is AdamW, fused. Columns as in benchmarks/train_step.py. Writes
results/experts.csv and experts.md.
"""

import argparse
import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import peft
import torch
from step_cost import peak_memory_mib, saved_bytes, timed
from torch import nn
from transformers import MixtralConfig, MixtralModel

import melora_fx
from exporters.measuring.machine import device_name, package_versions, source_commit
from exporters.measuring.tables import write_csv
from melora_fx import MELoRAConfig

RESULTS = Path(__file__).parent / "results"
TARGETS = ["gate_up_proj", "down_proj"]
CONFIG = MELoRAConfig(rank=8, num_blocks=8, alpha=16.0)
FACTS = (
    "cell",
    "side",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "ratio",
    "steps",
    "saved_mib",
    "peak_memory_mib",
    "parameters",
)
FIELDS = [*FACTS, "device", "versions", "commit", "time"]


_INTRODUCTION = """\
Random Mixtrals of two layers, adapters in both stacks of experts, eager, float32, one thread. Ours has 8 blocks of rank
8; PEFT's LoRA of the parameters has rank 64, or rank 8 and as many parameters as ours. *frozen*: the model as it is
loaded. Its whole capture is what ours is made of: in the grouped form transformers' operator makes the gradient of the
frozen stacks there, which ours leaves out. Made by benchmarks/experts.py."""


@dataclass(frozen=True)
class Cell:
    """One model, and how its experts are computed."""

    form: str
    tokens: int
    hidden: int = 256
    intermediate: int = 512
    experts: int = 8

    @property
    def key(self) -> str:
        return f"{self.form}, {self.tokens} tokens, {self.experts} experts of {self.hidden} × {self.intermediate}"


CELLS = (
    Cell("grouped_mm", 512),
    Cell("grouped_mm", 512, hidden=512, intermediate=1024),
    Cell("grouped_mm", 512, intermediate=128, experts=32),
    Cell("batched_mm", 64),
)


def base_model(cell: Cell) -> Any:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=128,
        hidden_size=cell.hidden,
        intermediate_size=cell.intermediate,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=cell.experts,
        num_experts_per_tok=2,
    )
    model = MixtralModel(config)
    model.config.use_cache = False
    model.set_experts_implementation(cell.form)
    return model.train().requires_grad_(False)


def captured(cell: Cell, embeddings: torch.Tensor) -> nn.Module:
    return melora_fx.capture.whole_model.capture_whole(base_model(cell), {"inputs_embeds": embeddings.detach()})


def ours(cell: Cell, embeddings: torch.Tensor) -> nn.Module:
    example_inputs = {"inputs_embeds": embeddings.detach()}
    return melora_fx.rewrite(base_model(cell), TARGETS, CONFIG, example_inputs=example_inputs)


def peft_lora(cell: Cell, rank: int) -> nn.Module:
    parameters = [f"mlp.experts.{name}" for name in TARGETS]
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[], target_parameters=parameters)
    return peft.get_peft_model(base_model(cell), config).train()


SIDES: dict[str, Callable[[Cell, torch.Tensor], nn.Module]] = {
    "frozen": lambda cell, _: base_model(cell),
    "frozen, captured whole": captured,
    "ours": ours,
    "PEFT LoRA, equal rank": lambda cell, _: peft_lora(cell, CONFIG.total_rank),
    "PEFT LoRA, equal parameters": lambda cell, _: peft_lora(cell, CONFIG.total_rank // CONFIG.num_blocks),
}


def make_step(model: nn.Module, embeddings: torch.Tensor) -> tuple[Callable[[], None], int]:
    """The training step of one side, and how many parameters it trains; no adapter's B is zero."""
    for name, parameter in model.named_parameters():
        if "lora_b" in name.lower():
            nn.init.normal_(parameter, std=0.01)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True) if parameters else None

    def step() -> None:
        model(inputs_embeds=embeddings).last_hidden_state.square().mean().backward()
        embeddings.grad = None
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step, sum(parameter.numel() for parameter in parameters)


def measure(cell: Cell, rounds: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    embeddings = torch.randn(4, cell.tokens // 4, cell.hidden).mul_(0.5).requires_grad_()
    models = {name: make(cell, embeddings) for name, make in SIDES.items()}
    steps = {name: make_step(model, embeddings) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    gc.collect()
    gc.disable()
    for index in range(rounds + 2):  # two rounds warm up
        for name, (step, _) in steps.items():
            elapsed = timed(step, "cpu")
            if index > 1:
                times[name].append(1e3 * elapsed)
    gc.enable()
    floor = statistics.median(times["frozen"])
    origin = {
        "device": device_name("cpu"),
        "versions": f"{package_versions()}, peft {peft.__version__}",
        "commit": source_commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    rows = []
    for name, values in times.items():
        step, num_parameters = steps[name]
        row = {
            "cell": cell.key,
            "side": name,
            **time_columns(values, floor),
            "saved_mib": round(saved_bytes(models[name], embeddings) / 2**20, 1),
            "peak_memory_mib": peak_memory_mib(step, "cpu"),
            "parameters": num_parameters,
        }
        rows.append(row | origin)
        print(f"    {name:28} {row['median_ms']:9.1f} ms  {row['ratio']:6.3f}", flush=True)
    return rows


def time_columns(milliseconds: list[float], floor: float) -> dict[str, float]:
    p20, _, _, p80 = statistics.quantiles(milliseconds, n=5, method="inclusive")
    median = statistics.median(milliseconds)
    return {
        "median_ms": round(median, 2),
        "p20_ms": round(p20, 2),
        "p80_ms": round(p80, 2),
        "ratio": round(median / floor, 3),
        "steps": len(milliseconds),
    }


def write_report(rows: list[dict[str, Any]], path: Path) -> None:
    """A table for each cell."""
    head = ("side", "ms", "p20 to p80", "over frozen", "kept for the backward, MiB", "peak, MiB", "parameters")
    lines = ["# A step that trains experts", "", _INTRODUCTION]
    for key in dict.fromkeys(row["cell"] for row in rows):
        lines += ["", f"## {key}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        lines += [
            f"| {row['side']} | {row['median_ms']} | {row['p20_ms']} to {row['p80_ms']} | {row['ratio']} "
            f"| {row['saved_mib']} | {row['peak_memory_mib']} | {row['parameters']:,} |"
            for row in rows
            if row["cell"] == key
        ]
    lines += ["", f"{rows[0]['device']}, {rows[0]['versions']}."]
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each side")
    parser.add_argument("--only", default="", help="cells whose name contains this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for cell in CELLS:
        if options.only in cell.key:
            print(cell.key, flush=True)
            rows += measure(cell, options.rounds)
    if not options.only:
        write_csv(rows, FIELDS, RESULTS / "experts.csv")
        write_report(rows, RESULTS / "experts.md")


if __name__ == "__main__":
    main()
