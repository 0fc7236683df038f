"""How long does rewriting a 7B model take, compared with PEFT's module swapping, and does matching scale?

Both sides rewrite a model of Llama-2-7B's configuration on the meta device, in turn in one process, with a new model
for each run. Then the matcher runs on graphs of 100 to 10,000 nodes. Writes rewrite_speed.csv.
"""

import functools
from argparse import Namespace

import peft
import torch
from torch import fx, nn
from transformers import LlamaConfig, LlamaForCausalLM

import melora_fx
from exporters.measuring.timing import time_in_turn
from melora_fx import MELoRAConfig
from melora_fx.patterns.patterns import find_linear_nodes

from .common.cases import Case, Row, run_cases, timed_rows

TARGETS = {
    "q,v": ["q_proj", "v_proj"],
    "all-linear": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def run(options: Namespace) -> int:
    layers = 2 if options.quick else 32
    model = f"{'two layers of ' if options.quick else ''}Llama-2-7B"
    cases = [
        Case(f"rewrite {model}, {name}", functools.partial(measure_rewrite, targets, layers, options.rounds))
        for name, targets in TARGETS.items()
    ]
    cases += [
        Case(f"match {4 * length + 2} nodes", functools.partial(measure_match, length, options.rounds))
        for length in ((25,) if options.quick else (25, 250, 2500))
    ]
    return run_cases(options, cases, settings=f"rounds {options.rounds}")


def llama_7b(layers: int) -> nn.Module:
    """Returns a Llama-2-7B with `layers` layers on the meta device, without memory for its weights."""
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers))


def with_ours(model: nn.Module, targets: list[str]) -> None:
    melora_fx.rewrite(model, targets, MELoRAConfig(rank=8, num_blocks=8))


def with_peft(model: nn.Module, targets: list[str]) -> None:
    peft.inject_adapter_in_model(peft.LoraConfig(r=64, target_modules=targets), model)


def measure_rewrite(targets: list[str], layers: int, rounds: int) -> list[Row]:
    sides = {"melora_fx": with_ours, "peft": with_peft}
    seconds = time_in_turn(sides, rounds=rounds, prepare=lambda name: (llama_7b(layers), targets))
    return timed_rows(seconds, "peft", {})


class Chain(nn.Module):
    """A chain of `length` products, each with its own matrix."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(8, 8, device="meta")) for _ in range(length))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for weight in self.weights:
            x = torch.relu(x @ weight.T)
        return x


def measure_match(length: int, rounds: int) -> list[Row]:
    """Returns the row of matching, with its time in total and per node of the graph."""
    graph_module = fx.symbolic_trace(Chain(length))

    def match() -> None:
        assert sum(1 for _ in find_linear_nodes(graph_module.graph, graph_module)) == length

    (row,) = timed_rows(time_in_turn({"melora_fx": match}, rounds=rounds), "melora_fx", {})
    return [row | {"microseconds_a_node": round(1e3 * row["median_ms"] / len(graph_module.graph.nodes), 2)}]
