"""How long does it take to rewrite a 7B model, beside PEFT's module swapping, and does matching scale?

    python benchmarks/rewrite_speed.py

Llama-2-7B's configuration on the meta device, both sides in turn in one process, a fresh model for each run; then the
matcher on graphs of 100 to 10,000 linears. Writes benchmarks/results/rewrite_speed.csv.
"""

import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from torch import fx, nn
from transformers import LlamaConfig, LlamaForCausalLM

import melora_fx
from melora_fx import MELoRAConfig
from melora_fx.patterns.patterns import find_linear_nodes

RESULTS = Path(__file__).parent / "results" / "rewrite_speed.csv"
ROUNDS = 7
TARGETS = {
    "q,v": ["q_proj", "v_proj"],
    "all-linear": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def llama_7b() -> nn.Module:
    """The architecture of Llama-2-7B without memory for its weights."""
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(num_hidden_layers=32))


def with_ours(model: nn.Module, targets: list[str]) -> None:
    melora_fx.rewrite(model, targets, MELoRAConfig(rank=8, num_blocks=8))


def with_peft(model: nn.Module, targets: list[str]) -> None:
    peft.inject_adapter_in_model(peft.LoraConfig(r=64, target_modules=targets), model)


def seconds(action: Callable[[nn.Module, list[str]], None], targets: list[str]) -> float:
    model = llama_7b()
    start = time.perf_counter()
    action(model, targets)
    return time.perf_counter() - start


class Chain(nn.Module):
    """A number of products with own matrices, in one graph."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(8, 8, device="meta")) for _ in range(length))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for weight in self.weights:
            x = torch.relu(x @ weight.T)
        return x


def microseconds_a_node(length: int) -> tuple[int, float]:
    """(nodes of the graph, matching time for one of them): the best of five."""
    graph_module = fx.symbolic_trace(Chain(length))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        assert sum(1 for _ in find_linear_nodes(graph_module.graph, graph_module)) == length
        times.append(time.perf_counter() - start)
    num_nodes = len(graph_module.graph.nodes)
    return num_nodes, 1e6 * min(times) / num_nodes


def main() -> None:
    rows: list[dict[str, object]] = []
    for name, targets in TARGETS.items():
        times: dict[str, list[float]] = {"melora_fx": [], "peft": []}
        for _ in range(ROUNDS):
            times["melora_fx"].append(seconds(with_ours, targets))
            times["peft"].append(seconds(with_peft, targets))
        medians = {side: statistics.median(values) for side, values in times.items()}
        for side, median in medians.items():
            rows.append(
                {
                    "what": f"rewrite Llama-2-7B, {name}",
                    "side": side,
                    "median_ms": round(1000 * median, 1),
                    "ratio_to_peft": round(median / medians["peft"], 3),
                }
            )
    for length in (25, 250, 2500):
        num_nodes, microseconds = microseconds_a_node(length)
        rows.append(
            {
                "what": f"match {num_nodes} nodes",
                "side": "melora_fx",
                "microseconds_a_node": round(microseconds, 2),
            }
        )
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["what", "side", "median_ms", "ratio_to_peft", "microseconds_a_node"])
        writer.writeheader()
        writer.writerows(rows)
    print(f"torch {torch.__version__}, peft {peft.__version__}, {ROUNDS} rounds\n{RESULTS.read_text()}")


if __name__ == "__main__":
    main()
