"""Lowered models with filled adapters, their training step, and helpers that count and compare their parts."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import melora_fx
from melora_fx import MELoRAConfig
from support.models import (
    IN,
    OUT,
    Holder,
    fill,
    output_of,
)

CONFIG = MELoRAConfig(rank=5, num_blocks=3, alpha=5.0)  # merges above 19 tokens, and computes gradients by blocks
DROPOUT = replace(CONFIG, dropout=0.5)
LOWERINGS = ("weight", "activation", "triton")
FEW = (2, 5)
MANY = (4, 30)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # two orders of summation in float32; sums of up to 120 products
JIT_IS_DEPRECATED = pytest.mark.filterwarnings(r"ignore:`torch\.jit\.:DeprecationWarning")


def lowered(build: Callable[[], nn.Module], lowering: str = "auto", config: MELoRAConfig = CONFIG, **options: Any):
    """Returns a model with filled adapters on all linears; the same values for each lowering."""
    return fill(melora_fx.rewrite(build(), "all-linear", replace(config, lowering=lowering), **options))


def linear(config: MELoRAConfig = CONFIG, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(4)
    return fill(melora_fx.rewrite(Holder(nn.Linear(IN, OUT).to(dtype)), "inner", config))


def adapter_gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in melora_fx.adapter_parameters(model).items()}


def step(model: nn.Module, x: Tensor, run: Callable[..., Tensor] | None = None) -> list[Tensor]:
    """Returns the output, and the gradients of the input and of everything that is trained."""
    x = x.detach().requires_grad_()
    model.zero_grad()
    output = model(x) if run is None else run(x)
    output.float().square().mean().backward()
    return [output.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, backend="aot_eager", fullgraph=True)


def assert_close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, **CLOSE)


def num_calls(calls: list[bool], model: nn.Module, x: Any) -> int:
    calls.clear()
    output_of(model, x)
    return len(calls)


class Operators:
    """A backend that runs graphs as `aot_eager` does, and remembers their operators."""

    def __init__(self) -> None:
        self.graphs: list[fx.Graph] = []

    def __call__(self, module: fx.GraphModule, inputs: Any) -> Any:
        self.graphs.append(module.graph)
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    def count(self, name: str) -> int:
        return sum(name in str(node.target) for graph in self.graphs for node in graph.nodes)


def seeded(function: Callable[..., Any], *args: Any) -> Any:
    torch.manual_seed(3)
    return function(*args)


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def targets(graph: fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes]
