"""CUDA graphs that are captured by hand: a replay computes with the current values of x, A and B."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.cuda import DEVICE, ON_CUDA, assert_all_near, assert_sums_near, by_lowering, cuda_alone
from support.lowered import DROPOUT, MANY, lowered, step
from support.models import IN, fill, output_of, randn, tower
from torch import Tensor, nn

import melora_fx

pytestmark = [*ON_CUDA, cuda_alone]


def on_device() -> nn.Module:
    return tower().to(DEVICE)


def x_of(seed: int = 1) -> Tensor:
    return randn(*MANY, IN, seed=seed).to(DEVICE)


def warm_up(function: Callable[[], Any]) -> None:
    """Runs the function on another stream, as a capture requires."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)


@by_lowering()
def test_a_cuda_graph_by_hand_replays_the_forward_with_the_present_values(lowering):
    model = lowered(on_device, lowering)
    held = x_of()
    with torch.no_grad():
        warm_up(lambda: model(held))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = model(held)
        for seed in (2, 3):
            fill(model, seed)
            held.copy_(x_of(seed))
            graph.replay()
            torch.cuda.synchronize()
            assert_sums_near(output, output_of(model, held).double(), 3)


@by_lowering()
def test_a_cuda_graph_by_hand_replays_a_step(lowering):
    model = lowered(on_device, lowering)
    held = x_of()
    warm_up(lambda: step(model, held))
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(held).square().mean().backward()
    found = {name: parameter.grad for name, parameter in melora_fx.adapter_parameters(model).items()}
    fill(model, 2)
    held.copy_(x_of(2))
    graph.replay()
    torch.cuda.synchronize()
    found = {name: gradient.clone() for name, gradient in found.items()}
    step(model, held)
    expected = {name: parameter.grad for name, parameter in melora_fx.adapter_parameters(model).items()}
    assert_all_near(found.values(), [each.double() for each in expected.values()], 3)


def test_a_cuda_graph_by_hand_refuses_dropout():
    """Every replay would drop the same values."""
    model = lowered(on_device, config=DROPOUT).train()
    held = x_of()
    warm_up(lambda: model(held))
    with pytest.raises(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
        model(held)
