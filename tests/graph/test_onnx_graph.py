"""The names of a graph's inputs, outputs and axes."""

from typing import NamedTuple

import pytest
import torch
from support.models import randn
from torch import nn

from exporters.graph.axes import axes_of
from exporters.graph.build import build_graph, count_ops
from exporters.graph.named_tensors import named_outputs
from melora_fx import MELoRAError


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


@pytest.mark.parametrize(
    ("outputs", "names"),
    [
        (torch.zeros(1), ["output"]),
        ((torch.zeros(1), torch.zeros(2)), ["output_0", "output_1"]),
        ({"logits": torch.zeros(1), "loss": None, "states": (torch.zeros(1),)}, ["logits", "states_0"]),
        (Pair(torch.zeros(1), torch.zeros(1)), ["first", "second"]),
    ],
    ids=["tensor", "tuple", "dict", "named_tuple"],
)
def test_outputs_are_named_by_their_fields(outputs: object, names: list[str]) -> None:
    assert list(named_outputs(outputs)) == names


class Cross(nn.Module):
    """Two sequences of different lengths."""

    def forward(self, query: torch.Tensor, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return query @ memory.transpose(1, 2), memory + 1


def test_axes_are_named_for_people() -> None:
    graph = build_graph(Cross(), {"query": randn(2, 5, 8), "memory": randn(2, 7, 8)}).graph_model.graph
    assert {value.name: axes_of(value) for value in graph.inputs} == {
        "query": ("batch", "sequence", 8),
        "memory": ("batch", "memory_sequence", 8),
    }
    assert [value.name for value in graph.outputs] == ["output_0", "output_1"]
    assert axes_of(graph.outputs[0]) == ("batch", "sequence", "memory_sequence")


def test_ops_are_counted_and_the_opset_obeyed() -> None:
    graph_model = build_graph(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), {"input": randn(2, 8)}, opset=18).graph_model
    assert count_ops(graph_model) == {"Gemm": 1, "Relu": 1}
    assert graph_model.opset_imports[""] == 18


def test_failures_carry_the_exporters_own_words() -> None:
    class Item(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x[0].item() > 0 else -x

    with pytest.raises(MELoRAError, match="`Item` cannot be exported: "):
        build_graph(Item(), {"x": randn(3)})
