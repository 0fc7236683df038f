"""One walk finds every kind of linear in the order of the graph, by the node's function and not by its name."""

import operator

import pytest
import torch
from support.models import IN, OUT, randn
from torch import fx, nn
from torch.nn import functional as F

import melora_fx
from melora_fx.patterns.patterns import PATTERNS, find_linear_nodes


class Mixed(nn.Module):
    """A linear, a product with a stack, another linear, and all of them again."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(randn(IN, IN))
        self.stack = nn.Parameter(randn(3, OUT, IN))
        self.last = nn.Parameter(randn(OUT, OUT))

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        hidden = torch.bmm(self.stack[ids], F.linear(x, self.first).unsqueeze(-1)).squeeze(-1)
        return torch.bmm(self.stack[ids], (x @ self.first).unsqueeze(-1)).squeeze(-1) + hidden @ self.last


def test_the_walk_is_in_the_order_of_the_graph() -> None:
    model = Mixed()
    found = list(find_linear_nodes(fx.symbolic_trace(model).graph, model))
    assert [linear.parameter for linear in found] == ["first", "stack", "first", "stack", "last"]
    positions = {node: index for index, node in enumerate(found[0].node.graph.nodes)}
    assert [positions[linear.node] for linear in found] == sorted(positions[linear.node] for linear in found)


@fx.wrap
def bmm(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Differs from torch's function of this name."""
    return torch.bmm(left, right) * 2


@fx.wrap
def grouped_mm(x: torch.Tensor, stack: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """Differs from torch's function of this name."""
    return x @ stack[0] + len(offs)


def test_a_function_with_the_name_of_an_operator_is_none() -> None:
    class Own(Mixed):
        def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            return bmm(self.stack[ids], x.unsqueeze(-1)), grouped_mm(x, self.stack.mT, ids)

    model = Own()
    assert not list(find_linear_nodes(fx.symbolic_trace(model).graph, model))


class Named(nn.Module):
    """Inputs, children and operators with names of views, or called only with keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.view = nn.Tanh()
        self.bmm = nn.Tanh()
        self.stack = nn.Parameter(randn(2, 8, 8))
        self.weight = nn.Parameter(randn(8, 8))

    def forward(self, x: torch.Tensor, t: torch.Tensor, float: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
        hidden = torch.matmul(self.linear(x) @ self.weight, t)
        hidden = torch.matmul(hidden, torch.transpose(input=t, dim0=0, dim1=1))
        hidden = F.linear(hidden, self.view(self.weight), float) + self.bmm(self.stack)[0, 0]
        return torch.addmm(to, F.linear(hidden, self.weight, float), self.weight.t())


@pytest.mark.parametrize("whole", [False, True], ids=["in_place", "whole"])
def test_names_of_inputs_and_children_are_not_those_of_views(whole: bool) -> None:
    inputs = (randn(3, 8), randn(8, 8), randn(8), randn(3, 8))
    report = melora_fx.match(Named(), "linear", melora_fx.MELoRAConfig(2, 2), example_inputs=inputs if whole else None)
    assert [site.name for site in report.sites] == ["linear"]
    assert "stack" not in dict(report.skipped)  # a child called `bmm` is not a product
    traced = fx.symbolic_trace(Named())
    assert [linear.parameter for linear in find_linear_nodes(traced.graph, traced)].count("weight") == 3


def test_a_registered_operator_is_found_without_its_overload() -> None:
    class Packets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(randn(8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.aten.linear(x, self.weight)

    model = Packets()
    (linear,) = find_linear_nodes(fx.symbolic_trace(model).graph, model)
    assert linear.parameter == "weight"


def test_operands_are_those_of_a_linear() -> None:
    """`F.linear` of the operands is the node's own value."""

    class Forms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(randn(OUT, IN))
            self.matrix = nn.Parameter(randn(IN, OUT))
            self.bias = nn.Parameter(randn(OUT))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (
                F.linear(x, self.weight, self.bias),
                torch.addmm(self.bias, x, self.weight.t()),
                x @ self.matrix,
                x.mm(self.weight.t()),
                torch.addmm(self.bias, x, self.matrix, beta=2.0),
                F.linear(x, self.weight[:12]),
            )

    model = Forms()
    graph_module = fx.symbolic_trace(model)
    x = randn(3, IN)
    outputs = model(x)
    found = list(find_linear_nodes(graph_module.graph, model))
    assert [linear.operands is not None for linear in found] == [True] * 4 + [False] * 2
    for linear, output in zip(found[:4], outputs, strict=False):
        assert linear.operands is not None
        weight = operator.attrgetter(str(linear.parameter))(model)
        bias = None if linear.operands.bias is None else model.bias
        torch.testing.assert_close(F.linear(x, weight.t() if linear.weight_is_transposed else weight, bias), output)


def test_every_operator_of_the_table_can_be_called() -> None:
    """Functions, names of methods of a tensor, and registered operators by their full names."""
    for pattern in PATTERNS:
        for key in pattern.operators:
            if not isinstance(key, str):
                assert callable(key)
            elif "." not in key:
                assert callable(getattr(torch.Tensor, key))
            elif key.startswith("aten."):
                _, name, overload = key.split(".")
                assert str(getattr(getattr(torch.ops.aten, name), overload)) == key
