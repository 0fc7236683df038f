"""The graph of a whole model moves with its tensors; the meta device stands for all others."""

import copy
import io

import pytest
import torch
from support.models import IN, OUT, assert_equal, fill, randn
from torch import Tensor, fx, nn

import melora_fx
from melora_fx import MELoRAConfig
from melora_fx.rewriting.graph_device import devices_of, inner_modules, put_on_device

CONFIG = MELoRAConfig(rank=2, num_blocks=3)
CPU = torch.device("cpu")
META = torch.device("meta")


class Positions(nn.Module):
    """Creates tensors on the device of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, IN)
        self.linear = nn.Linear(IN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        numbers = torch.arange(x.shape[1], device=x.device)
        return self.linear(x + self.table(numbers)) * torch.ones(OUT).to(x.device, x.dtype)


class PositionsApart(Positions):
    """Creates them in regions that `torch.export` turns into separate graphs, one inside the other."""

    def forward(self, x: Tensor) -> Tensor:
        def scaled(x: Tensor) -> Tensor:
            with torch.no_grad():
                numbers = torch.arange(x.shape[1], device=x.device)
            return x + self.table(numbers)

        return self.linear(torch.cond(x.sum() > 0, scaled, lambda x: x * torch.full((IN,), 2.0, device=x.device), (x,)))


def captured(device: torch.device = CPU) -> nn.Module:
    torch.manual_seed(0)
    model = Positions().to(device)
    return fill(melora_fx.rewrite(model, "linear", CONFIG, example_inputs=(randn(2, 5, IN).to(device),)))


def named_devices(graph: fx.Graph) -> set[torch.device]:
    found: set[torch.device] = set()
    for node in graph.nodes:
        leaves = torch.utils._pytree.tree_leaves((node.args, node.kwargs))
        found |= {leaf for leaf in leaves if isinstance(leaf, torch.device)}
    return found


def inner_devices(model: nn.Module) -> list[set[torch.device]]:
    """Returns the devices named in each graph that the model's graph calls, if it names any."""
    found = [named_devices(inner.graph) for inner in inner_modules(model, model.graph)]
    return [devices for devices in found if devices]


def on_meta(model: nn.Module) -> bool:
    return model(randn(3, 4, IN).to(META)).is_meta and named_devices(model.graph) == {META}


def test_moved_and_moved_back():
    model = captured()
    x = randn(3, 4, IN)
    expected = model(x)
    state = copy.deepcopy(model.state_dict())
    assert on_meta(model.to(META))
    model.to_empty(device=CPU).load_state_dict(state)
    assert_equal(model(x), expected)
    assert named_devices(model.graph) == {CPU}


@pytest.mark.parametrize("assign", [False, True])
def test_captured_on_another_device_than_it_runs_on(assign):
    model = captured(META)
    model = model if assign else model.to_empty(device=CPU)
    model.load_state_dict(captured().state_dict(), assign=assign)
    assert_equal(model(randn(3, 4, IN)), captured()(randn(3, 4, IN)))


def test_loaded_onto_another_device():
    buffer = io.BytesIO()
    torch.save(captured(), buffer)
    buffer.seek(0)
    assert on_meta(torch.load(buffer, weights_only=False, map_location=META))


def test_copies_are_where_they_were_made():
    model = captured()
    copied = copy.deepcopy(model).to(META)
    assert on_meta(copied)
    assert on_meta(copy.deepcopy(copied))
    assert named_devices(model.graph) == {CPU}


def test_moved_inside_disabled():
    model = captured()
    with melora_fx.disabled(model):
        assert on_meta(model.to(META))
        assert "lora" not in str(model.graph)
    assert "lora" in str(model.graph)
    assert on_meta(model)


def test_graphs_that_the_graph_calls_follow():
    model = melora_fx.rewrite(PositionsApart(), "linear", CONFIG, example_inputs=(randn(2, 5, IN),))
    copied = copy.deepcopy(model)
    assert inner_devices(model) == [{CPU}, {CPU}]
    model.to(META)
    assert inner_devices(model) == [{META}, {META}]
    assert not any("'cpu'" in inner.code for inner in inner_modules(model, model.graph))
    assert inner_devices(copied) == [{CPU}, {CPU}]


def test_a_change_of_dtype_leaves_the_class_alone():
    model = captured()
    before = type(model)
    assert type(model.double()) is before


def test_a_module_traced_in_place_keeps_what_its_code_names():
    model = Positions()
    melora_fx.rewrite(model, "linear", CONFIG)
    assert model.to(META)(randn(3, 4, IN).to(META)).is_meta


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param({CPU}, {CPU}, id="nowhere"),
        pytest.param({CPU}, {CPU, META}, id="to_several"),
        pytest.param({CPU}, set(), id="without_tensors"),
        pytest.param({META}, {CPU}, id="from_another"),
    ],
)
def test_a_graph_that_stays(before, after):
    graph = captured().graph
    assert not put_on_device(graph, before, after)
    assert named_devices(graph) == {CPU}


def test_a_device_without_a_number_is_that_of_its_type():
    graph = fx.Graph()
    options = {"device": torch.device("cuda")}
    graph.output(graph.call_function(torch.ops.aten.arange.default, (4,), options))
    second, third = torch.device("cuda", 1), torch.device("cuda", 2)
    assert not put_on_device(graph, {CPU}, {second})
    assert put_on_device(graph, {second}, {third})
    assert named_devices(graph) == {third}
    assert not put_on_device(graph, {second}, {CPU})


def test_devices_of_a_model():
    model = Positions()
    model.table.to(META)
    assert devices_of(model) == {CPU, META}
